"""The judgement: its figures are those of the metrics, its counts are right, and it refuses what it cannot judge."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from cxr_tf.errors import CxrError
from cxr_tf.evaluate import metrics as m
from cxr_tf.evaluate.calibration import calibration_error
from cxr_tf.evaluate.judge import curves, judge
from cxr_tf.evaluate.metrics import MaskScores, OneOutcomeError
from cxr_tf.evaluate.voc import voc_average_precision

CLASSES = ["negative", "typical", "indeterminate", "atypical"]


def made_up(n: int = 240, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    studies = np.sort(rng.integers(n * 3 // 4, size=n))
    truth = rng.choice(4, p=[0.3, 0.4, 0.2, 0.1], size=n)[studies]
    y = np.eye(4)[truth]
    z = rng.normal(size=(n, 4)) + 1.5 * y
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return {
        "labels": y,
        "probabilities": p,
        "classes": CLASSES,
        "patients": studies // 2,
        "studies": studies,
        "task": "multiclass",
        "thresholds": np.array([0.3, 0.4, 0.25, 0.2]),
        "replicates": 50,
    }


def test_image_figures_are_those_of_the_metrics() -> None:
    case = made_up()
    got = json.loads(json.dumps(judge(**case), allow_nan=False))
    p, y, cuts = case["probabilities"], case["labels"], case["thresholds"]
    expected = {
        "auroc": m.auroc(p, y),
        "average_precision": m.average_precision(p, y),
        "f1": m.f1(p, y, cuts),
        "brier": m.brier(p, y),
        "sensitivity_at_90_specificity": m.sensitivity_at_specificity(p, y, 0.9),
        "sensitivity": [(p[y[:, c] == 1, c] >= cuts[c]).mean() for c in range(4)],
        "specificity": [(p[y[:, c] == 0, c] < cuts[c]).mean() for c in range(4)],
    }
    for figure, values in expected.items():
        for name, value in zip(CLASSES, values, strict=True):
            assert got["image"]["classes"][name][figure]["value"] == pytest.approx(value), figure
        macro = got["image"]["macro"][figure]
        assert macro["value"] == pytest.approx(np.mean(values)), figure
        assert macro["low"] < macro["value"] < macro["high"]
    truth, called = y.argmax(1), p.argmax(1)
    macro = got["image"]["macro"]
    assert macro["accuracy"]["value"] == pytest.approx((truth == called).mean())
    assert macro["kappa"]["value"] == pytest.approx(sk.cohen_kappa_score(truth, called))
    assert macro["ece"]["value"] == pytest.approx(calibration_error(p, y, "multiclass"))
    assert got["image"]["confusion"] == sk.confusion_matrix(truth, called).tolist()
    assert sum(row["n"] for row in got["image"]["reliability"]) == len(p)
    assert got["decision"]["thresholds"] == dict(zip(CLASSES, cuts, strict=True))
    assert "segmentation" not in got
    assert "voc_average_precision" not in got["study"]["macro"]


def test_study_figures_are_of_the_mean_over_films() -> None:
    case = made_up()
    got = judge(**case, challenge="siim")
    whose = np.unique(case["studies"])
    p = np.array([case["probabilities"][case["studies"] == s].mean(0) for s in whose])
    y = np.array([case["labels"][case["studies"] == s][0] for s in whose])
    for c, name in enumerate(CLASSES):
        figures = got["study"]["classes"][name]
        assert figures["auroc"]["value"] == pytest.approx(m.auroc(p, y)[c])
        assert figures["voc_average_precision"]["value"] == pytest.approx(voc_average_precision(p, y)[c])
        assert figures["auroc"]["n"] == len(whose)
    assert got["study"]["macro"]["voc_average_precision"]["value"] == pytest.approx(voc_average_precision(p, y).mean())
    assert "voc_average_precision" not in got["image"]["macro"]
    n = got["n"]
    assert (n["images"], n["studies"], n["patients"]) == (240, len(whose), len(np.unique(case["patients"])))
    assert n["classes"]["typical"]["images"]["positive"] == case["labels"][:, 1].sum()
    assert n["classes"]["typical"]["studies"]["positive"] == y[:, 1].sum()


def test_the_order_of_films_changes_nothing() -> None:
    case = made_up()
    first = judge(**case)["study"]["macro"]["auroc"]
    order = np.random.default_rng(1).permutation(240)
    for name in ("labels", "probabilities", "patients", "studies"):
        case[name] = case[name][order]
    again = judge(**case)["study"]["macro"]["auroc"]
    assert [again[k] for k in ("value", "low", "high")] == pytest.approx([first[k] for k in ("value", "low", "high")])


def test_multi_label_with_unknown_labels() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random((200, 2)) < 0.4).astype(float)
    y[:50, 0] = np.nan
    p = np.clip(0.3 * y + 0.7 * rng.random((200, 2)), 0, 1)
    p[:50, 0] = rng.random(50)
    case = {"classes": ["a", "b"], "patients": np.arange(200), "task": "multilabel", "thresholds": [0.5, 0.6]}
    got = judge(labels=y, probabilities=p, studies=np.arange(200), replicates=50, **case)
    a, b = got["image"]["classes"]["a"], got["image"]["classes"]["b"]
    assert a["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y[50:, 0], p[50:, 0]))
    assert (a["auroc"]["n"], b["auroc"]["n"]) == (150, 200)
    assert b["kappa"]["value"] == pytest.approx(sk.cohen_kappa_score(y[:, 1], p[:, 1] >= 0.6))
    assert "confusion" not in got["image"]
    assert "accuracy" not in got["image"]["macro"]
    assert got["image"]["macro"]["ece"]["value"] == pytest.approx(calibration_error(p, y, "multilabel"))
    assert got["n"]["classes"]["a"]["images"]["unknown"] == 50


def test_studies_of_several_films() -> None:
    """Multi-label: positive on any film; multi-class: films that disagree make the study unknown."""
    p = np.array([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8], [0.9, 0.1], [0.4, 0.6]])
    y = np.array([[1, 0], [0, 1], [0, 1], [np.nan, np.nan], [1, 0], [0, 1]])
    case = {
        "labels": y, "probabilities": p, "classes": ["a", "b"], "thresholds": [0.5, 0.5], "replicates": 10,
        "studies": np.array([0, 0, 1, 1, 2, 3]), "patients": np.arange(6) // 2,
    }  # fmt: skip
    case["patients"] = np.array([0, 0, 1, 1, 2, 3])
    single = judge(**case, task="multiclass")
    assert single["n"]["studies_contradictory"] == 1
    assert single["n"]["classes"]["a"]["studies"] == {"positive": 1, "negative": 2, "unknown": 1}
    several = judge(**case, task="multilabel")
    assert several["n"]["studies_contradictory"] == 0
    assert several["n"]["classes"]["b"]["studies"] == {"positive": 3, "negative": 1, "unknown": 0}


def test_a_class_that_is_not_there_is_not_measurable_and_named() -> None:
    case = made_up()
    keep = case["labels"][:, 3] == 0
    for name in ("labels", "probabilities", "patients", "studies"):
        case[name] = case[name][keep]
    got = judge(**case, challenge="siim")
    for level in ("image", "study"):
        gone = got[level]["classes"]["atypical"]
        assert gone.keys() == got[level]["classes"]["typical"].keys()
        assert gone["auroc"]["value"] is None
        assert "one outcome only" in gone["auroc"]["note"]
        macro = got[level]["macro"]
        shown = [got[level]["classes"][name]["auroc"]["value"] for name in CLASSES[:3]]
        assert macro["auroc"]["value"] == pytest.approx(np.mean(shown))
        assert "without atypical" in macro["auroc"]["note"]
        assert "without" not in macro["accuracy"]["note"]
    json.dumps(got, allow_nan=False)


def test_a_rare_class_has_no_interval() -> None:
    case = made_up()
    rare = np.flatnonzero(case["labels"][:, 3] == 1)
    drop = np.isin(np.arange(240), rare[case["studies"][rare] != case["studies"][rare[0]]])
    for name in ("labels", "probabilities", "patients", "studies"):
        case[name] = case[name][~drop]
    got = judge(**(case | {"replicates": 200}))["image"]
    atypical = got["classes"]["atypical"]["auroc"]
    assert atypical["value"] is not None
    assert atypical["low"] is None
    assert atypical["dropped"] > 10
    assert "not measurable" in atypical["note"]
    assert got["macro"]["auroc"]["low"] is None  # a mean over a class that cannot be measured cannot be either
    assert got["classes"]["typical"]["auroc"]["low"] is not None


def test_segmentation_is_over_films_that_can_tell() -> None:
    case = made_up(60)
    nan = np.full(60, np.nan)
    dice, area = nan.copy(), nan.copy()
    dice[:30] = np.linspace(0.2, 0.8, 30)
    area[30:50] = 0.1
    known, found = np.arange(60) < 50, np.where(np.arange(60) < 30, np.arange(60) % 3, np.nan)
    lesions = np.where(np.arange(60) < 50, 2.0 * (np.arange(60) < 30), np.nan)  # two on each film that has any
    masks = MaskScores(dice, dice / (2 - dice), area, known, known & (np.arange(60) >= 30), lesions, found, lesions / 4)
    got = judge(**case, masks=masks)["segmentation"]
    assert got["dice"]["value"] == pytest.approx(0.5)
    assert got["dice"]["n"] == 30
    assert got["dice"]["low"] < 0.5 < got["dice"]["high"]
    assert got["iou"]["value"] == pytest.approx((dice[:30] / (2 - dice[:30])).mean())
    assert (got["false_positive_area"]["value"], got["false_positive_area"]["n"]) == (pytest.approx(0.1), 20)
    assert (got["lesion_sensitivity"]["value"], got["lesion_sensitivity"]["n"]) == (pytest.approx(30 / 60), 30)
    assert (got["false_lesions"]["value"], got["false_lesions"]["n"]) == (pytest.approx(15 / 50), 50)
    alone = judge(**(case | {"probabilities": None}), masks=masks)
    assert alone["segmentation"] == got
    assert "image" not in alone
    nothing = MaskScores(nan, nan, nan, np.zeros(60, bool), np.zeros(60, bool), nan, nan, nan)
    none = judge(**case, masks=nothing)["segmentation"]["dice"]
    assert (none["value"], none["n"]) == (None, 0)
    json.dumps(none, allow_nan=False)


def test_thresholds_that_promised_a_specificity_are_held_to_it() -> None:
    case = made_up()
    cuts = np.array([0.3, 0.4, 0.5, 0.2])
    macro = judge(**case, specific_thresholds=cuts)["image"]["macro"]
    known = ~np.isnan(case["labels"]).any(1)
    y, called = case["labels"][known], (case["probabilities"] >= cuts)[known]
    assert macro["validated_sensitivity"]["value"] == pytest.approx(
        np.mean([called[y[:, c] == 1, c].mean() for c in range(4)])
    )
    assert macro["validated_specificity"]["value"] == pytest.approx(
        np.mean([1 - called[y[:, c] == 0, c].mean() for c in range(4)])
    )
    assert macro["validated_specificity"]["low"] < macro["validated_specificity"]["high"]
    assert "validated_specificity" not in judge(**case)["image"]["macro"]


def test_ordered_classes_have_a_quadratic_kappa() -> None:
    from sklearn.metrics import cohen_kappa_score

    case = made_up()
    got = judge(**case, ordered=True)["image"]["macro"]["quadratic_kappa"]["value"]
    known = ~np.isnan(case["labels"]).any(1)
    y, p = case["labels"][known].argmax(1), case["probabilities"][known].argmax(1)
    assert got == pytest.approx(cohen_kappa_score(y, p, weights="quadratic"))
    assert "quadratic_kappa" not in judge(**case)["image"]["macro"]


def test_the_fewest_films_of_an_outcome() -> None:
    counts = judge(**made_up())["n"]
    seen = [n for images in counts["classes"].values() for n in list(images["images"].values())[:2]]
    assert counts["fewest"] == min(seen)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": np.eye(4)[np.zeros(240, int)]}, "No class has both .* negative: 240 positive, typical: 0 positive"),
        ({"labels": np.full((240, 4), np.nan)}, "No class has both"),
        ({"probabilities": np.full((240, 4), 3.0)}, "Probabilities must lie in 0-1"),
        ({"probabilities": np.ones((240, 3))}, "one shape"),
        ({"labels": np.ones((240, 4))}, "exactly one class"),
        ({"classes": ["a", "b"]}, "one column a class"),
        ({"patients": np.zeros(3)}, "Patients and studies must be \\[240\\]"),
        ({"studies": np.zeros(240, int)}, "A study must belong to one patient"),
        ({"task": "binary"}, "The task must be"),
        ({"thresholds": [0.5]}, "one threshold a class"),
        ({"challenge": "rsna"}, "Received: 'rsna'"),
        ({"specificity": 90}, "Received: 90"),
        ({"replicates": 0}, "replicates"),
        ({"probabilities": None}, "nothing to judge"),
        ({"masks": MaskScores(*(np.zeros(3) for _ in range(8)))}, "mask scores for each of 240 films"),
    ],
)
def test_what_cannot_be_judged_is_named(change: dict, text: str) -> None:
    with pytest.raises(CxrError, match=text):
        judge(**(made_up() | change))


def test_one_outcome_has_its_own_error() -> None:
    with pytest.raises(OneOutcomeError):
        judge(**(made_up() | {"labels": np.eye(4)[np.zeros(240, int)]}))


def test_curves_pass_through_the_figures() -> None:
    case = made_up()
    arguments = (case["probabilities"], case["labels"], CLASSES, case["patients"])
    got = json.loads(json.dumps(curves(*arguments, replicates=30), allow_nan=False))
    assert list(got) == CLASSES
    for c, curve in enumerate(got.values()):
        y = np.array(curve["roc"]["y"])
        assert np.trapezoid(y, curve["x"]) == pytest.approx(m.auroc(*arguments[:2])[c], abs=0.01)
        assert (np.diff(y) >= 0).all()
        assert (np.array(curve["roc"]["low"]) <= np.array(curve["roc"]["high"])).all()
        assert curve["precision_recall"]["y"][-1] >= curve["prevalence"] - 1e-9
        assert curve["prevalence"] == pytest.approx(case["labels"][:, c].mean())
