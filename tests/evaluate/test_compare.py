"""Runs compared on the same films: figures and paired differences by hand, refusals, tables for a paper."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_tf.config import parse_experiment, to_toml
from cxr_tf.errors import CxrError
from cxr_tf.evaluate import metrics as m
from cxr_tf.evaluate.bootstrap import bootstrap
from cxr_tf.evaluate.calibration import calibration_error
from cxr_tf.evaluate.compare import ComparisonError, compare, latex, summary, write_comparison
from cxr_tf.evaluate.judge import judge
from cxr_tf.evaluate.metrics import Ranked
from cxr_tf.run import Run, open_run

CLASSES = ["no finding", "A&B_1"]
N = 160


def write_run(
    folder: Path,
    *,
    skill: float = 1.0,
    seed: int = 0,
    weights: str | None = None,
    heads: tuple[bool, bool] = (True, True),
    labels: np.ndarray | None = None,
    keys: np.ndarray | None = None,
    data_hash: str = "a" * 64,
) -> Run:
    """What `train` and `evaluate` leave of a run, without a model; films of two to a patient."""
    keys = np.arange(100, 100 + N) if keys is None else keys
    patients = keys // 2
    rng = np.random.default_rng(seed)
    y = np.eye(2)[np.random.default_rng(99).integers(2, size=N)] if labels is None else labels
    logit = rng.normal(size=N) + skill * (2 * np.nan_to_num(y[:, 1]) - 1)
    p = np.stack([1 / (1 + np.exp(logit)), 1 / (1 + np.exp(-logit))], 1)
    model = {"classification": heads[0], "segmentation": heads[1]} | ({"weights": weights} if weights else {})
    experiment = parse_experiment(
        {
            "name": "x",
            "data": {"shards": str(folder / "no-shards"), "classes": CLASSES},
            "model": model,
            "evaluate": {"replicates": 200},
        }
    )
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(experiment.model_dump(mode="json")))
    operating = {"classes": CLASSES, "task": "multiclass", "size": 64, "storage_size": 64, "temperature": 1.0}
    operating |= {"thresholds": dict.fromkeys(CLASSES, 0.5), "mask_threshold": 0.5}
    (folder / "operating.json").write_text(json.dumps(operating))
    (folder / "environment.json").write_text(json.dumps({"data_hash": data_hash}))
    parts = pd.DataFrame({"part": "train", "patient_key": np.arange(40) // 4, "study_key": np.arange(40)})
    parts.rename_axis("film").to_csv(folder / "parts.csv")
    table = pd.DataFrame({"patient_key": patients, "study_key": keys}, index=pd.Index(keys, name="film"))
    for c, name in enumerate(CLASSES):
        table[f"label:{name}"] = y[:, c]
        if heads[0]:
            table[f"probability:{name}"] = p[:, c]
    masks = None
    if heads[1]:
        dice = np.where(np.arange(N) % 2 == 0, rng.random(N), np.nan)
        nan = np.full(N, np.nan)
        masks = m.MaskScores(dice, dice, nan, ~np.isnan(dice), np.zeros(N, bool), nan, nan, nan)
        table["dice"] = dice
    judged = judge(
        labels=y,
        probabilities=p if heads[0] else None,
        classes=CLASSES,
        patients=patients,
        studies=keys,
        task="multiclass",
        thresholds=[0.5, 0.5],
        masks=masks,
        replicates=10,
    )
    (folder / "evaluation").mkdir()
    table.to_csv(folder / "evaluation" / "predictions.csv", float_format="%.6g")
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(judged))
    return open_run(folder)


@pytest.fixture
def two(tmp_path: Path) -> list[Run]:
    first = write_run(tmp_path / "random", skill=0.3)
    return [first, write_run(tmp_path / "mo_co", skill=1.2, seed=1, weights="runs/siim-moco_50%/encoder.keras")]


def predictions(run: Run) -> pd.DataFrame:
    return pd.read_csv(run.folder / "evaluation" / "predictions.csv", index_col="film")


def arrays(run: Run) -> tuple[np.ndarray, np.ndarray]:
    table = predictions(run)
    return tuple(table[[f"{kind}:{c}" for c in CLASSES]].to_numpy() for kind in ("probability", "label"))


def test_figures_are_those_of_the_metrics_and_differences_are_paired(two: list[Run]) -> None:
    found = json.loads(json.dumps(compare(two), allow_nan=False))
    assert (found["first"], found["n"]) == ("random", {"images": N, "patients": N // 2})
    assert (found["replicates"], found["level"]) == (200, 0.95)
    for run, told in zip(two, found["runs"], strict=True):
        p, y = arrays(run)
        macro = {name: pair["value"]["value"] for name, pair in told["macro"].items()}
        assert macro["auroc"] == pytest.approx(m.auroc(p, y).mean())
        assert macro["average_precision"] == pytest.approx(m.average_precision(p, y).mean())
        assert macro["ece"] == pytest.approx(calibration_error(p, y, "multiclass"))
        assert macro["dice"] == pytest.approx(predictions(run)["dice"].mean())
        assert told["macro"]["dice"]["value"]["n"] == N // 2
        for c, name in enumerate(CLASSES):
            assert told["classes"][name]["auroc"]["value"]["value"] == pytest.approx(m.auroc(p, y)[c])
    first, second = found["runs"]
    assert all(pair["difference"] is None for pair in first["macro"].values())
    for figure, pair in second["macro"].items():
        difference = pair["value"]["value"] - first["macro"][figure]["value"]["value"]
        assert pair["difference"]["value"] == pytest.approx(difference)
    ranked = [Ranked(p[:, 1], y[:, 1]) for p, y in map(arrays, two)]
    expected = bootstrap(
        lambda w: {"d": m.auroc_of(*ranked[1].counts(w)) - m.auroc_of(*ranked[0].counts(w))},
        predictions(two[0])["patient_key"].to_numpy(),
        replicates=200,
        seed=0,
    )["d"]
    got = second["classes"][CLASSES[1]]["auroc"]["difference"]
    assert [got[k] for k in ("value", "low", "high")] == pytest.approx([expected.value, expected.low, expected.high])
    assert got["low"] > 0


def test_rows_say_what_a_run_started_from_and_was_trained_on(two: list[Run]) -> None:
    found = compare(two)
    assert [run["started_from"] for run in found["runs"]] == ["random weights", "siim-moco_50%"]
    training = {"films": 40, "patients": 10, "labeled_films": None, "labeled_patients": None}  # the shards are gone
    assert [run["training"] for run in found["runs"]] == [training] * 2


def test_labeled_training_films_are_counted_where_the_shards_are(journey: Path, tmp_path: Path) -> None:
    """A run of the command line, compared with a copy of itself under another name."""
    shutil.copytree(journey / "run", tmp_path / "again")
    runs = [open_run(journey / "run"), open_run(tmp_path / "again")]
    found = compare(runs)
    films = runs[0].shards().manifest
    parts = runs[0].parts()
    train = parts.index[parts["part"] == "train"]
    labeled = films.loc[train, [f"label:{c}" for c in found["classes"]]].notna().all(axis=1)
    training = found["runs"][0]["training"]
    assert training["films"] == len(train)
    assert training["labeled_films"] == labeled.sum()
    assert training["labeled_patients"] == parts.loc[train[labeled], "patient_key"].nunique()
    judged = json.loads((journey / "run" / "evaluation" / "metrics.json").read_text())
    shown = judged["image"]["macro"]["auroc"]
    assert found["runs"][0]["macro"]["auroc"]["value"]["value"] == pytest.approx(shown["value"], abs=1e-6)
    difference = found["runs"][1]["macro"]["ece"]["difference"]  # every draw has one, though films are few
    assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)
    assert "every draw" in difference["note"]


def test_a_head_that_a_run_lacks(tmp_path: Path) -> None:
    both = write_run(tmp_path / "both")
    found = compare([both, write_run(tmp_path / "classifies", heads=(True, False), seed=1)])
    assert "dice" not in found["runs"][1]["macro"]
    found = compare([both, write_run(tmp_path / "segments", heads=(False, True), seed=1)])
    assert list(found["runs"][1]["macro"]) == ["dice"]
    assert found["runs"][1]["macro"]["dice"]["difference"]["value"] is not None
    assert r"segments & random weights & 40 (10) & -- & -- & -- & 0." in latex(found)
    summary(found)


def test_films_of_unknown_label_do_not_count(tmp_path: Path) -> None:
    y = np.full((N, 2), np.nan)
    y[:40] = np.eye(2)[np.arange(40) % 2]
    runs = [write_run(tmp_path / name, labels=y, seed=seed) for seed, name in enumerate("ab")]
    figures = compare(runs)["runs"][1]["macro"]["auroc"]
    assert (figures["value"]["n"], figures["difference"]["n"]) == (40, 40)


def test_runs_on_other_films_are_refused_and_all_named(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "first"),
        write_run(tmp_path / "same", seed=1),
        write_run(tmp_path / "films", keys=np.arange(110, 110 + N)),
        write_run(tmp_path / "data", data_hash="b" * 64),
        write_run(tmp_path / "labels", labels=np.eye(2)[np.random.default_rng(98).integers(2, size=N)]),
    ]
    with pytest.raises(ComparisonError) as caught:
        compare(runs)
    text = str(caught.value)
    assert "From first differ" in text
    assert f"films: other test films: it lacks 10 of the {N}, and has 10 others" in text
    assert "data: other data: checksum bbbbbbbbbbbb, not aaaaaaaaaaaa" in text
    assert re.search(r"labels: other labels or patients of \d+ test films", text)
    assert "same:" not in text
    assert compare(runs[:2])


def test_the_order_of_films_changes_nothing(two: list[Run]) -> None:
    before = compare(two)
    predictions(two[1]).sample(frac=1, random_state=0).to_csv(two[1].folder / "evaluation" / "predictions.csv")
    assert compare(two) == before


def test_what_is_not_evaluated_is_told_how(two: list[Run], tmp_path: Path) -> None:
    (two[0].folder / "evaluation" / "metrics.json").unlink()
    (two[1].folder / "evaluation" / "metrics.json").write_text('{"n":')
    with pytest.raises(ComparisonError) as caught:
        compare(two)
    assert f"there is no evaluation yet; `cxr-tf evaluate {two[0].folder}` writes it" in str(caught.value)
    assert "is damaged" in str(caught.value)
    (two[0].folder / "operating.json").unlink()
    with pytest.raises(CxrError, match="not finished"):
        compare(two)
    with pytest.raises(ComparisonError, match="two or more runs"):
        compare(two[:1])
    with pytest.raises(ComparisonError, match="each once"):
        compare([two[0], two[0]])


def test_tables(two: list[Run], tmp_path: Path) -> None:
    found = compare(two)
    write_comparison(found, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.csv",
        "comparison.json",
        "comparison.tex",
    ]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (4 + 2 * 2)
    row = next(row for row in rows if (row["run"], row["class"], row["figure"]) == ("mo_co", "", "auroc"))
    told = found["runs"][1]["macro"]["auroc"]
    assert float(row["value"]) == pytest.approx(told["value"]["value"])
    assert float(row["difference_low"]) == pytest.approx(told["difference"]["low"])
    assert (row["started_from"], row["training_films"], row["training_labeled_films"]) == ("siim-moco_50%", "40", "")
    assert row["images"] == str(N)


def test_latex_is_escaped_and_even(two: list[Run]) -> None:
    text = latex(compare(two))
    assert r"mo\_co & siim-moco\_50\% & 40 (10) & 0." in text
    assert r"A\&B\_1" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    for table in text.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(l+)\}", table)[1])
        body = table[table.index(r"\toprule") : table.index(r"\bottomrule")]
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert all(len(re.findall(r"(?<!\\)&", line)) == columns - 1 for line in lines)
        assert len(lines) >= 4
    bare = re.sub(r"\\[&%$#_{}]|\\\\", "", text.split("\n", 1)[1])
    assert not re.search(r"[%#_]|(?<!\$)-\d", bare)


def test_summary_names_each_run(two: list[Run]) -> None:
    text = summary(compare(two))
    assert "160 films of 80 patients" in text
    assert "mo_co: from siim-moco_50%, 40 films of 10 patients" in text
    assert re.search(r"AUROC +0\.\d{3} \(.*\) +difference \+0\.\d{3} \(", text)
