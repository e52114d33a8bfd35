"""The evaluation tells good models from bad ones: tiny models of generated films, trained and judged as runs are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_tf.config import parse_experiment
from cxr_tf.data.phantom import CLASSES, _burn, phantom
from cxr_tf.data.readers.table import read_table
from cxr_tf.data.shards import prepare
from cxr_tf.evaluate.evaluation import evaluate
from cxr_tf.train.finetune import finetune

FILMS = 480  # half of them negative


def judged(
    root: Path,
    finding: str,
    labels: np.ndarray,
    *,
    marker: bool = False,
) -> dict[str, dict[str, Any]]:
    """Trains a small network to tell negative films from those with a finding, and reads `readiness.json`.

    Args:
        labels: `[FILMS]`, 0 or 1: what is said of each film. Odd films have the finding.
        marker: a letter in the corner of each film goes with the finding.

    Returns:
        Criteria by the figure that they go by.
    """
    names, rows = (CLASSES[0], finding), []
    for i, label in enumerate(labels):
        film = phantom(names[i % 2], np.random.default_rng([0, i]), 96)
        if marker:
            _burn(film.pixels, names[i % 2], np.random.default_rng([0, i, 1]))
        Image.fromarray((film.pixels / 4095 * 255).round().astype(np.uint8)).save(root / f"{i}.png")
        Image.fromarray(film.lungs).save(root / f"lungs-{i}.png")
        half = "test" if i >= 320 else "train"
        rows.append(
            {"image": f"{i}.png", "patient_id": i, "label": names[label], "lungs": f"lungs-{i}.png", "half": half}
        )
    pd.DataFrame(rows).to_csv(root / "films.csv", index=False)
    table = read_table(root / "films.csv", label="label", classes=names, keep=["half"])
    prepare(table, root / "shards", workers=0)
    prepare(read_table(root / "films.csv", mask="lungs"), root / "lungs", workers=0)
    experiment = {
        "name": "tiny",
        "data": {
            "shards": str(root / "shards"),
            "classes": list(names),
            "split": {"column": "half", "train": ["train"], "test": ["test"], "validation": 0.25},
        },
        "model": {
            "encoder": "small_resnet", "size": 64, "segmentation": False, "hidden": 0, "dropout": 0.2,
        },
        "augment": {
            "flip": 0.0, "rotation": 0.0, "scale": [1.0, 1.0], "shift": 0.0, "brightness": 0.0, "contrast": 0.0,
            "gamma": 0.0, "noise": 0.0, "blur": 0.0,
        },
        "train": {
            "steps": 150, "batch_size": 16, "learning_rate": 2e-3, "weight_decay": 0.02, "validate_every": 50,
            "checkpoint_every": 150,
        },
        "evaluate": {"replicates": 200, "lungs": str(root / "lungs")},
    }  # fmt: skip
    run = finetune(parse_experiment(experiment, where="test"), root / "run")
    evaluate(run)
    verdict = json.loads((run.folder / "evaluation" / "readiness.json").read_text(encoding="utf-8"))
    return {criterion["figure"]: criterion for criterion in verdict["criteria"]}


TRUE = np.arange(FILMS) % 2

DISCRIMINATION = "study.macro.auroc"
LUNGS, BORDERS = (f"shortcuts.blanking.{name}_blanked.kept" for name in ("lungs", "borders"))
CALIBRATION = "image.macro.ece"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    """A model of true labels, trained on few films without any augmentation: it knows them by heart."""
    root = tmp_path_factory.mktemp("plain")
    return judged(root, CLASSES[1], TRUE), root / "run"


@pytest.mark.slow
def test_a_model_that_had_no_letter_to_read_passes(plain):
    found, _ = plain
    assert found[LUNGS]["outcome"] == found[BORDERS]["outcome"] == "pass"
    assert found[LUNGS]["estimate"]["high"] < 0.5


@pytest.mark.slow
def test_a_model_that_reads_the_planted_letter_fails(tmp_path):
    """Where the disease is hard to see, a letter in the corner is learned first."""
    found = judged(tmp_path, CLASSES[2], TRUE, marker=True)
    assert found[LUNGS]["outcome"] == found[BORDERS]["outcome"] == "fail"
    assert found[LUNGS]["estimate"]["low"] > 0.5
    assert found[DISCRIMINATION]["outcome"] == "pass"  # which is why shortcuts are looked for


@pytest.mark.slow
def test_a_model_of_shuffled_labels_tells_nothing_apart(tmp_path):
    found = judged(tmp_path, CLASSES[1], np.random.default_rng(0).permutation(TRUE))
    assert found[DISCRIMINATION]["outcome"] == "fail"
    assert found[DISCRIMINATION]["estimate"]["low"] < 0.5 < found[DISCRIMINATION]["estimate"]["high"]


@pytest.mark.slow
def test_an_overconfident_model_is_calibrated_by_its_temperature(plain):
    criteria, run = plain
    operating = json.loads((run / "operating.json").read_text(encoding="utf-8"))
    assert 1.5 < operating["temperature"] < 15
    found = criteria[CALIBRATION]
    before, after = found["before"]["estimate"], found["estimate"]
    assert (found["before"]["outcome"], found["outcome"]) == ("fail", "pass")
    assert before["low"] > 0.1 > after["value"]
    shown = (
        f"{after['value']:.3f} ({after['low']:.3f} to {after['high']:.3f}) before temperature scaling "
        f"{before['value']:.3f} ({before['low']:.3f} to {before['high']:.3f}): fail"
    )
    page = (run / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert shown.replace(" ", "") in re.sub(r"<[^>]*>|\s", "", page)
