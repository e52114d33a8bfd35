"""Readers' labels for a run that says no classes are refused, before anything is computed or written."""

from __future__ import annotations

from cxr_tf.config import parse_experiment, to_toml
from cxr_tf.run import write_json


def test_readers_are_refused_where_nothing_is_classified(run_cli, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    experiment = parse_experiment(
        {"name": "masks", "data": {"shards": str(tmp_path / "shards")}, "model": {"classification": False}},
        where="test",
    )
    (run / "config.toml").write_text(to_toml(experiment.model_dump(mode="json")), encoding="utf-8")
    write_json(
        run / "operating.json",
        {"classes": [], "task": "multiclass", "size": 64, "storage_size": 64, "temperature": 1.0, "thresholds": {},
         "mask_threshold": 0.5},
    )  # fmt: skip
    readers = tmp_path / "readers.csv"
    readers.write_text("film,reader,label\n1,A,ill\n", encoding="utf-8")
    before = sorted(run.rglob("*"))
    done = run_cli("evaluate", run, "--readers", readers)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = " ".join(done.stderr.split())
    assert "readers.csv: readers' labels are compared with the classes" in message
    assert "this run only segments" in message and "leave out --readers" in message
    assert sorted(run.rglob("*")) == before
