"""The commands one after another, on generated films, as a user gives them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cxr_tf.config import load_experiment
from cxr_tf.data.prepare import prepare_dataset
from cxr_tf.data.radiograph import read_radiograph
from cxr_tf.errors import CxrError
from cxr_tf.evaluate.evaluation import evaluate
from cxr_tf.models.outputs import load_model
from cxr_tf.predict import Predictor
from cxr_tf.run import RunError, open_run
from cxr_tf.train.finetune import finetune
from cxr_tf.train.loop import read_metrics
from export.errors import ExportError
from export.run import export_run


def _films(root):
    return sorted((root / "siim" / "train").rglob("*.dcm"))


def test_the_run_folder_holds_what_the_contract_says(journey):
    run = journey / "run"
    for name in ("config.toml", "metrics.jsonl", "model.keras", "encoder.keras", "environment.json", "parts.csv"):
        assert (run / name).is_file(), name
    operating = json.loads((run / "operating.json").read_text())
    assert operating["classes"][0] == "Negative for Pneumonia"
    assert set(operating["thresholds"]) == set(operating["classes"])
    assert operating["temperature"] > 0
    assert operating["chosen_on"]["films"] > 0
    assert (operating["size"], operating["storage_size"]) == (64, 96)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["data_hash"] == operating["data_hash"]
    assert environment["versions"]["keras"]
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r] == [2, 4, 6, 8, 10, 12]


def test_no_patient_is_on_two_sides(journey):
    with (journey / "run" / "parts.csv").open() as file:
        rows = list(csv.DictReader(file))
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["patient_key"], set()).add(row["part"])
    assert {row["part"] for row in rows} == {"train", "validation", "test"}
    assert all(len(parts) == 1 for parts in sides.values())


def test_evaluation_has_figures_with_intervals_and_pictures(journey):
    out = journey / "run" / "evaluation"
    metrics = json.loads((out / "metrics.json").read_text())
    macro = metrics["study"]["macro"]
    assert 0 <= macro["auroc"]["value"] <= 1
    assert "voc_average_precision" in macro
    assert "dice" in metrics["segmentation"]
    drawn = ("roc", "precision_recall", "confusion", "reliability", "forest", "robustness", "uncertainty")
    for name in (f"{name}.png" for name in (*drawn, "films", "best", "worst", "uncertain")):
        with Image.open(out / "figures" / name) as picture:
            assert min(picture.size) > 200, name
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics["n"]["images"]
    total = sum(float(rows[0][f"probability:{name}"]) for name in metrics["classes"])
    assert total == pytest.approx(1.0, abs=1e-4)


def test_the_report_and_the_card_say_whether_it_may_be_deployed(journey, run_cli):
    run = journey / "run"
    page = (run / "evaluation" / "report.html").read_text()
    verdict = json.loads((run / "evaluation" / "readiness.json").read_text())
    assert not verdict["ready"]
    assert "Not ready." in page and "Research use, not a medical device" in page
    for criterion in verdict["criteria"]:
        assert criterion["title"] in page
    assert not re.search(r"<script|https?://|src=\"(?!data:)|@import|url\(", page)
    card = (run / "MODEL_CARD.md").read_text()
    for heading in ("Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data"):
        assert f"## {heading}" in card
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    for part in ("shortcuts", "subgroups", "explanation", "robustness", "uncertainty", "calibration"):
        assert metrics[part], part


def test_an_audit_of_a_run_goes_by_its_parts(journey, run_cli, tmp_path):
    done = run_cli("audit", journey / "run", "--out", tmp_path / "audit")
    with (journey / "run" / "parts.csv").open() as file:
        parts = [row["part"] for row in csv.DictReader(file)]
    for part in ("train", "validation", "test"):
        assert f"{part} {parts.count(part)}" in done.stdout
    assert "on several sides: 0" in done.stdout and "Traceback" not in done.stderr
    again = run_cli("audit", journey / "run", journey / "shards", "--out", tmp_path / "audit")
    assert again.returncode == 1 and "given twice" in again.stderr


def test_no_identifier_leaves_the_reader(journey):
    import pydicom

    planted = set()
    for film in _films(journey)[:20]:
        header = pydicom.dcmread(film, stop_before_pixels=True)
        planted |= {str(header.PatientID), str(header.PatientName), header.StudyInstanceUID, header.SOPInstanceUID}
    planted = {word.encode() for word in planted if len(word) > 3}
    assert len(planted) > 20
    local = {"manifest.csv", "rejected.csv", "noted.csv"}
    for folder in ("shards", "run"):
        for path in (journey / folder).rglob("*"):
            if path.is_file() and path.name not in local:
                content = path.read_bytes()
                assert not [word for word in planted if word in content], path


def test_prediction_of_a_run_and_of_its_export_agree(journey, run_cli, tmp_path):
    film = _films(journey)[0]
    done = run_cli("export", journey / "run", "--out", tmp_path / "export")
    assert done.returncode == 0, done.stderr
    assert "report.html: has them, too" in done.stdout
    page = (journey / "run" / "evaluation" / "report.html").read_text()
    assert "Is it the same when it is exported?" in page and "savedmodel" in page
    assert (tmp_path / "export" / "serving" / "models.config").is_file()
    exported = tmp_path / "export" / "savedmodel" / "1"
    done = run_cli("predict", exported, film, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "a" / "predictions.csv").open() as file:
        (row,) = csv.DictReader(file)
    pixels = read_radiograph(film)
    said = Predictor(journey / "run")(pixels)
    assert row.pop("film") == str(film)
    area = float(row.pop("mask_area"))
    assert (row.pop("mask"), row.pop("noted")) == (f"{film.stem}.mask.png", "")
    assert {name: float(value) for name, value in row.items()} == pytest.approx(said.probabilities, abs=1e-5)
    assert said.mask.shape == pixels.shape
    assert area == pytest.approx((said.mask >= 0.5).mean(), abs=1e-3)
    for name in (f"{film.stem}.mask.png", f"{film.stem}.overlay.png"):
        with Image.open(tmp_path / "a" / name) as picture:
            assert picture.size == pixels.shape[::-1]
    with pytest.raises(ExportError, match="exists already"):
        export_run(open_run(journey / "run"), "savedmodel", tmp_path / "export")


def test_a_broken_film_is_named_and_the_others_are_predicted(journey, run_cli, tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    shutil.copy(_films(journey)[0], films / "good.dcm")
    (films / "broken.dcm").write_bytes(_films(journey)[1].read_bytes()[:2000])
    (films / "notes.txt").write_text("not a film")
    done = run_cli("predict", journey / "run", films, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "broken.dcm" in done.stderr
    assert "Traceback" not in done.stderr
    with (tmp_path / "out" / "predictions.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["film"].endswith("good.dcm")


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(journey, run_cli):
    before = (journey / "run" / "model.keras").stat().st_mtime_ns
    done = run_cli("train", journey / "experiment.toml", "--out", journey / "run")
    assert done.returncode == 0
    assert (journey / "run" / "model.keras").stat().st_mtime_ns == before
    done = run_cli("train", journey / "experiment.toml", "--out", journey / "run", "--set", "train.steps=13")
    assert done.returncode == 1
    assert "train.steps: 12 there, 13 asked for" in done.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.shards=none", "none"),
        ('data.classes=["Typcal Appearance"]', 'Did you mean "Typical Appearance"?'),
        ('data.where={view=["XX"]}', "view"),
        ("model.encoder=densnet121", 'Did you mean "densenet121"?'),
        ("model.weights=none.keras", "none.keras"),
        ('data.where={"label:Atypical Appearance"=[0]}', "Atypical Appearance"),
        ('data.where={"label:Typical Appearance"=[1]}', "Typical Appearance"),
        ("train.checkpoint_every=1", None),
    ],
)
def test_training_says_what_is_wrong_before_it_writes(journey, tmp_path, monkeypatch, override, words):
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: None)  # it cannot be taken back
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))  # what is right ends here
    with pytest.raises(CxrError) as error:
        finetune(load_experiment(journey / "experiment.toml", [override]), tmp_path / "run")
    assert (words or "are free") in str(error.value)
    assert words is None or not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path, journey, run_cli):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.txt").write_text("mine")
    done = run_cli("train", journey / "experiment.toml", "--out", tmp_path / "full")
    assert done.returncode == 1
    assert "no run of ours" in done.stderr
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["photo.txt"]


def test_an_unfinished_run_is_neither_judged_nor_exported(tmp_path, journey):
    (tmp_path / "run").mkdir()
    shutil.copy(journey / "run" / "config.toml", tmp_path / "run")
    for use in (evaluate, lambda run: export_run(run, "savedmodel", tmp_path / "out")):
        with pytest.raises(RunError, match="not finished"):
            use(open_run(tmp_path / "run"))


def test_films_are_never_overwritten(journey, run_cli, tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    Image.fromarray(read_radiograph(_films(journey)[0])).save(films / "a.png")
    before = (films / "a.png").read_bytes()
    done = run_cli("predict", journey / "run", films, "--out", films)
    assert done.returncode == 1
    assert "holds files already" in done.stderr
    assert [p.name for p in films.iterdir()] == ["a.png"]
    assert (films / "a.png").read_bytes() == before


def test_when_no_film_can_be_read_nothing_is_written(journey, run_cli, tmp_path):
    (tmp_path / "empty.dcm").write_bytes(b"")
    done = run_cli("predict", journey / "run", tmp_path / "empty.dcm", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "empty.dcm" in done.stderr
    assert not (tmp_path / "out").exists()


def _copy_of_run(journey, tmp_path, without=()):
    shutil.copytree(journey / "run", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", *without))
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["operating.json", "parts.csv", "environment.json", "model.keras"])
def test_a_damaged_run_is_said_to_be_damaged(journey, tmp_path, name):
    run = _copy_of_run(journey, tmp_path)
    (run / name).write_text("{")
    with pytest.raises(CxrError, match=name):
        evaluate(open_run(run))
    assert not (run / "evaluation").exists()


def test_a_run_whose_shards_are_other_data_goes_no_further(journey, tmp_path):
    prepare_dataset("siim", journey / "siim", tmp_path / "shards", storage_size=64, workers=1)
    run = _copy_of_run(journey, tmp_path)
    settings = run / "config.toml"
    settings.write_text(settings.read_text().replace(str(journey / "shards"), str(tmp_path / "shards")))
    for use in (evaluate, lambda run: export_run(run, "savedmodel", tmp_path / "out")):
        with pytest.raises(RunError, match="is not what"):
            use(open_run(run))
    (run / "operating.json").unlink()
    with pytest.raises(RunError, match="is not what"):
        finetune(open_run(run).experiment, run)


def test_evaluate_takes_overrides_that_do_not_touch_the_training(journey, tmp_path):
    run = _copy_of_run(journey, tmp_path)
    assert open_run(run, ["evaluate.replicates=200"]).experiment.evaluate.replicates == 200
    with pytest.raises(RunError, match=r"train\.steps"):
        open_run(run, ["train.steps=3"])


@pytest.mark.slow
def test_a_shard_that_is_cut_off_while_training_is_named(journey, tmp_path):
    shutil.copytree(journey / "shards", tmp_path / "shards")
    run = tmp_path / "run"
    command = ["train", str(journey / "experiment.toml"), "--out", str(run), "--set", "train.steps=4000"]
    command += ["--set", f"data.shards={tmp_path / 'shards'}"]
    process = subprocess.Popen([sys.executable, "-m", "cxr_tf", *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not read_metrics(run / "metrics.jsonl"):
        time.sleep(0.1)
    for shard in (tmp_path / "shards").glob("*.tfrecord"):
        os.truncate(shard, 100)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert ".tfrecord" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("head", ["classification", "segmentation"])
def test_one_head_alone_goes_the_whole_way(journey, run_cli, tmp_path, head):
    other = {"classification": "segmentation", "segmentation": "classification"}[head]
    overrides = ["--set", f"model.{other}=false", "--set", "train.steps=4", "--set", "train.ema=0.5"]
    run = tmp_path / "run"
    for command in (
        ("train", journey / "experiment.toml", "--out", run, *overrides),
        ("evaluate", run),
        ("export", run),
        ("predict", run / "export" / "savedmodel" / "1", _films(journey)[0], "--out", tmp_path / "out"),
    ):
        done = run_cli(*command)
        assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert ("image" in metrics) == (head == "classification")
    assert ("segmentation" in metrics) == (head == "segmentation")


@pytest.mark.slow
def test_killed_in_mid_epoch_and_started_again_ends_in_the_same_weights(journey, tmp_path, run_cli):
    command = ["train", str(journey / "experiment.toml"), "--out", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "-m", "cxr_tf", *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        if rows and rows[-1]["step"] >= 6:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "operating.json").exists(), "it was not killed in time"
    done = run_cli(*command)
    assert done.returncode == 0, done.stderr
    expected, found = (load_model(run / "model.keras").get_weights() for run in (journey / "run", tmp_path / "run"))
    for before, after in zip(expected, found, strict=True):
        np.testing.assert_array_equal(before, after)
