"""A report with every part that there is, from figures made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cxr_tf.evaluate import charts, figures
from cxr_tf.evaluate.judge import curves, judge
from cxr_tf.evaluate.metrics import mask_scores
from cxr_tf.evaluate.readiness import load_criteria, readiness, readiness_json
from cxr_tf.evaluate.report import write_report

CLASSES = ["No finding", "<script>alert(1)</script>", "A|B & 'C'"]


class Reported(NamedTuple):
    metrics: dict[str, Any]
    verdict: dict[str, Any]
    path: Path


def estimate(value: float | None, half: float = 0.05, note: str = "") -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - half, value + half)
    return {"value": value, "low": low, "high": high, "level": 0.95, "n": 90, "patients": 45, "note": note}


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=90)
    y = np.eye(3)[truth]
    z = rng.normal(size=(90, 3)) + y
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    drawn = np.zeros((90, 24, 24))
    drawn[truth > 0, 6:12, 6:12] = 1
    masks = mask_scores(np.roll(drawn, 2, 1) > 0, drawn)
    patients = np.arange(90) // 2
    metrics = judge(
        labels=y, probabilities=p, classes=CLASSES, patients=patients, studies=np.arange(90), task="multiclass",
        thresholds=[0.4] * 3, specific_thresholds=[0.6] * 3, ordered=True, masks=masks, challenge="siim", replicates=30,
    )  # fmt: skip
    metrics |= _by_hand(metrics)
    verdict = readiness_json(readiness(metrics, load_criteria()))
    _draw(folder, metrics, curves(p, y, CLASSES, patients, replicates=30), masks.dice)
    for kind in ("best", "worst"):
        film = rng.integers(256, size=(64, 48)).astype(np.uint8)
        ramp = np.linspace(0, 1, film.size, dtype=np.float32).reshape(film.shape)
        shown = {"film": film, "mask": ramp, "saliency": ramp, "truth": ramp > 0.8}
        figures.film_picture(shown, folder / "films" / f"{kind}-1.jpg")
    write_report(metrics, verdict, folder, folder / "report.html", name="run <1>", facts=["A model."])
    return Reported(metrics, verdict, folder / "report.html")


def _by_hand(metrics: dict[str, Any]) -> dict[str, Any]:
    """All parts of `metrics.json` that need a model, as their modules describe them."""
    one, none = estimate(0.7), estimate(None, note="not measurable: no lung masks were given")
    maps = {"pointing_game": one, "iou_at_area": one, "share_in_lungs": none}
    blanked = {"auroc": one, "auroc_blanked": one, "kept": one}
    change = {"auroc": [one] * 5, "kept": [one] * 5, "mean_kept": one}
    group = {
        "films": 40, "patients": 20, "text": "Sex M: no difference is shown.", "figures": {"auroc": one, "dice": none},
        "differences": {"auroc": estimate(-0.1)},
    }  # fmt: skip
    picture = {"film": 7, "truth": CLASSES[1], "says": f"says {CLASSES[2]}: 0.90"}
    return {
        "calibration": {
            "temperature": 2.5,
            "before": {
                "ece": estimate(0.31, 0.02),
                "ece_equal_mass": one,
                "reliability": metrics["image"]["reliability"],
            },
        },
        "explanation": {
            "overall": {
                "grad_cam": maps | {"pointing_game_above_chance": one},
                "segmentation": maps,
                "randomized": maps | {"absolute_rank_correlation": one},
                "chance": maps,
            }
        },
        "shortcuts": {
            "blanking": {"lungs": "annotated", **dict.fromkeys(("lungs_blanked", "borders_blanked"), blanked)},
            "thumbnails": {"side": 8, "auroc": one, "difference": one},
            "source_classifier": {"auroc": none},
            "by_source": {"tested": {"here": one}, "unseen_source": {"auroc": one, "difference": one}},
        },
        "subgroups": {
            "text": "2 differences were looked at.",
            "largest_gap": one,
            "groups": {"sex": {"M": group, "F": group}},
        },
        "robustness": {
            "kept": one,
            "corruptions": {
                name: {"title": name, "unit": "of the range", "values": [1, 2, 3, 4, 5], "classification": change}
                for name in ("Noise", "Blur")
            },
        },
        "uncertainty": {
            "selective": {"error": one, "error_at_80": one, "auroc": one},
            "agreement": {"mean": one},
            "out_of_distribution": {"auroc": one, "note": "The other images are made."},
        },
        "readers": {
            "between": [{"readers": ["A", "B"], "kappa": one}],
            "model": [{"reader": "A", "kappa": one}],
            "position": {"text": "The model lies between the readers."},
            "model_minus_readers": one,
        },
        "exports": [_form("keras", None, True), _form("savedmodel", 1e-6, True), _form("litert-int8", 0.1, True)],
        "gallery": {
            kind: [picture | {"picture": f"films/{kind}-1.jpg", "text": f"Film 7: {kind}. It marks 25 % of the film."}]
            for kind in ("best", "worst")
        },
    }


def _form(name: str, error: float | None, passed: bool) -> dict[str, Any]:
    """A row of `export.parity.parity_rows`."""
    figures = {"auroc": 0.8, "average_precision": 0.7, "ece": 0.05, "dice": None}
    return {
        "form": name, "films": 90, "megabytes": 3.1, "logits_max": error, "logits_mean": error, "mask_max": None,
        "mask_mean": None, **figures, **{f"{figure}_change": error for figure in figures}, "import": 0.1, "load": 0.2,
        "first": 0.3, "latency": 4.5, "throughput": 1234.5, "passed": passed,
    }  # fmt: skip


def _draw(folder: Path, metrics: dict[str, Any], lines: dict[str, Any], dice: np.ndarray) -> None:
    image = metrics["image"]
    figures.roc(lines, folder / "roc.png", level=image)
    figures.precision_recall(lines, folder / "precision_recall.png", level=image)
    for name in ("reliability", "reliability_before"):
        figures.reliability(image["reliability"], folder / f"{name}.png", ece=image["macro"]["ece"])
    figures.forest(metrics["study"], folder / "forest.png")
    figures.confusion(image["confusion"], CLASSES, folder / "confusion.png")
    figures.dice_histogram(dice, folder / "dice.png", mean=metrics["segmentation"]["dice"])
    kept = {name: found["classification"]["kept"] for name, found in metrics["robustness"]["corruptions"].items()}
    charts.skill_kept(kept, folder / "robustness.png")
    charts.risk_coverage({"certainty": [(0.5, 0.1), (1, 0.3)]}, folder / "uncertainty.png")
    charts.intervals([("sex: M", estimate(-0.1))], folder / "subgroups.png", title="Differences", axis="", reference=0)
