"""The commands one after another, on generated films, as a user gives them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cxr_tf.data.radiograph import read_radiograph
from cxr_tf.train.loop import read_metrics


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
    for name in ("roc.png", "precision_recall.png", "confusion.png", "reliability.png", "forest.png", "films.png"):
        with Image.open(out / "figures" / name) as picture:
            assert min(picture.size) > 200, name
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics["n"]["images"]
    total = sum(float(rows[0][f"probability:{name}"]) for name in metrics["classes"])
    assert total == pytest.approx(1.0, abs=1e-4)


def test_no_identifier_leaves_the_reader(journey):
    import pydicom

    planted = set()
    for film in _films(journey)[:20]:
        header = pydicom.dcmread(film, stop_before_pixels=True)
        planted |= {str(header.PatientID), str(header.PatientName), header.StudyInstanceUID, header.SOPInstanceUID}
    planted = {word.encode() for word in planted if len(word) > 3}
    assert len(planted) > 20
    local = {"manifest.csv", "rejected.csv"}
    for folder in ("shards", "run"):
        for path in (journey / folder).rglob("*"):
            if path.is_file() and path.name not in local:
                content = path.read_bytes()
                assert not [word for word in planted if word in content], path


def test_prediction_of_a_run_and_of_its_export_agree(journey, run_cli, tmp_path):
    film = _films(journey)[0]
    done = run_cli("export", journey / "run", "--out", tmp_path / "export")
    assert done.returncode == 0, done.stderr
    rows = []
    for model, out in ((journey / "run", "a"), (tmp_path / "export" / "savedmodel" / "1", "b")):
        done = run_cli("predict", model, film, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
        with (tmp_path / out / "predictions.csv").open() as file:
            (row,) = csv.DictReader(file)
        rows.append(row)
    assert rows[0].keys() == rows[1].keys()
    for key, value in rows[0].items():
        if key == "film":
            assert value == rows[1][key]
        else:
            assert float(value) == pytest.approx(float(rows[1][key]), abs=1e-5)
    pixels = read_radiograph(film)
    for name in (f"{film.stem}.mask.png", f"{film.stem}.png"):
        with Image.open(tmp_path / "a" / name) as picture:
            assert picture.size == pixels.shape[::-1]
    again = run_cli("export", journey / "run", "--out", tmp_path / "export")
    assert again.returncode == 1
    assert "exists already" in again.stderr


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


def test_training_says_what_is_wrong(journey, run_cli, tmp_path):
    for override, words in (
        ("data.shards=none", "none"),
        ('data.classes=["Typcal Appearance"]', 'Did you mean "Typical Appearance"?'),
        ('data.where={view=["XX"]}', "view"),
        ("model.encoder=densnet121", 'Did you mean "densenet121"?'),
        ("model.weights=none.keras", "none.keras"),
        ('data.where={"label:Atypical Appearance"=[0]}', "Atypical Appearance"),
    ):
        done = run_cli("train", journey / "experiment.toml", "--out", tmp_path / "run", "--set", override)
        assert done.returncode == 1, override
        assert words in done.stderr, (override, done.stderr)
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists(), override


def test_a_folder_that_is_no_run_is_refused(tmp_path, journey, run_cli):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.txt").write_text("mine")
    done = run_cli("train", journey / "experiment.toml", "--out", tmp_path / "full")
    assert done.returncode == 1
    assert "no run of ours" in done.stderr
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["photo.txt"]


def test_an_unfinished_run_is_not_evaluated(tmp_path, journey, run_cli):
    (tmp_path / "run").mkdir()
    shutil.copy(journey / "run" / "config.toml", tmp_path / "run")
    for command in ("evaluate", "export"):
        done = run_cli(command, tmp_path / "run")
        assert done.returncode == 1
        assert "not finished" in done.stderr


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
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    from cxr_tf.models.outputs import load_model

    expected, found = (load_model(run / "model.keras").get_weights() for run in (journey / "run", tmp_path / "run"))
    for before, after in zip(expected, found, strict=True):
        np.testing.assert_array_equal(before, after)
