"""The judgement of a model: every figure with its interval, of films and of studies, as one JSON-ready dict.

    {"task", "classes", "level", "replicates", "seed", "decision",
     "n":            {"images", "studies", "patients", "studies_contradictory",
                      "classes": {class: {"images": counts, "studies": counts}},
                      "fewest": films with, or without, the finding of which there are fewest},
     "image":        {"macro": {figure: Estimate}, "classes": {class: {figure: Estimate}}, "confusion", "reliability"},
     "study":        the same, of studies,
     "segmentation": {"dice", "iou", "false_positive_area", "lesion_sensitivity", "false_lesions"}}

An `Estimate` is {"value", "low", "high", "level", "replicates", "dropped", "n", "patients", "note"}; `value` is null
where the films cannot give the figure, `low` and `high` where there is no interval, and `note` says why.

Figures of a class (each class against the rest) and their macro means:

    auroc, average_precision       ranking
    sensitivity_at_90_specificity  a point of the ROC curve of these very films: ranking too
    f1, sensitivity, specificity   decisions at the class's threshold, which was chosen on validation films
    validated_sensitivity, validated_specificity    at the threshold that had a stated specificity on validation films
    brier                          mean squared error of the probability
    kappa                          multi-label only: of each class's decisions
    voc_average_precision          studies only, with challenge="siim" (cxr_tf.evaluate.voc); its macro mean is the mAP

`macro` is over the classes that show both outcomes here; the note of a macro figure names those left out. Multi-class
sets have `accuracy` and `kappa` in it too, of the most probable class; so is their `confusion`: counts, a row for each
true class and a column for each predicted one, in the order of `classes`. `ece` is the expected calibration error in 15
bins of equal width (top-label for multi-class), `ece_equal_mass` in 15 of equal mass; on few films both are above 0 for
the best of models: `ece_if_calibrated`, a number beside `macro`, is what `ece` would be on average if every
probability were right. `quadratic_kappa` is there if the classes are ordered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np

from cxr_tf.evaluate import calibration, metrics
from cxr_tf.evaluate.bootstrap import Estimate, bootstrap
from cxr_tf.evaluate.calibration import Task
from cxr_tf.evaluate.metrics import MaskScores, MetricError, OneOutcomeError, Ranked
from cxr_tf.evaluate.voc import voc_average_precision_of

MACRO = -1  # stands where a class number would
_CELLS = ((1, True), (1, False), (0, True), (0, False))  # TP, FN, FP, TN: the label, and whether it was called

Figures = dict[tuple[int, str], np.ndarray]  # by class number (or MACRO) and figure


def judge(
    *,
    labels: np.ndarray,
    probabilities: np.ndarray | None,
    classes: Sequence[str],
    patients: np.ndarray,
    studies: np.ndarray,
    task: Task,
    thresholds: Sequence[float] | np.ndarray,
    specific_thresholds: Sequence[float] | np.ndarray | None = None,
    ordered: bool = False,
    masks: MaskScores | None = None,
    challenge: Literal["siim"] | None = None,
    specificity: float = 0.9,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Judges predictions on films that nothing was chosen on.

    Args:
        labels: `[n, classes]`; 1, 0, or NaN = unknown, left out.
        probabilities: `[n, classes]`, calibrated, 0-1; None for a model that only segments: "image" and "study" are
            left out then.
        classes: their names, in order.
        patients: whole numbers `[n]`: whose film it is. Patients are drawn for the intervals.
        studies: whole numbers `[n]`: of which study; a study belongs to one patient. A study's score is the mean over
            its films.
        task: "multiclass" (softmax, exactly one class a film) or "multilabel".
        thresholds: `[classes]`, from `choose_thresholds` on validation films; positive is at or above.
        specific_thresholds: `[classes]`, from `threshold_at_specificity` on validation films: at these,
            `validated_sensitivity` and `validated_specificity` say what comes of that specificity on these films.
        ordered: the classes of a multi-class set are in order of severity: adds `quadratic_kappa`.
        masks: how the predicted masks fit, one entry a film (`metrics.mask_scores`); without it, "segmentation" is
            left out.
        challenge: "siim" adds the challenge's VOC-2010 average precision to the study level.
        specificity: at which sensitivity is read off the ROC curve.
        replicates: draws of patients.
        seed: of the draws.
        level: of the intervals.

    Returns:
        The dict that the module's text describes; `json.dumps` takes it.

    Raises:
        OneOutcomeError: when no class shows both outcomes, so that there is nothing to judge.
        MetricError: for shapes or values that do not fit, or a study of two patients.
        BootstrapError: for replicates, seed or level out of range.
    """
    calibration.check_task(task)
    patients, studies = np.asarray(patients), np.asarray(studies)
    n = len(labels)
    if patients.shape != (n,) or studies.shape != (n,):
        raise MetricError(
            f"Patients and studies must be [{n}], one a film. Received: {patients.shape} and {studies.shape}."
        )
    if masks is not None and len(masks) != n:
        raise MetricError(f"There must be mask scores for each of {n} films. Received: {len(masks)}.")
    if challenge not in (None, "siim"):
        raise MetricError(f'The challenge must be "siim" or None. Received: {challenge!r}.')
    if not 0 < specificity < 1:
        raise MetricError(f"The specificity must lie between 0 and 1. Received: {specificity}.")
    if probabilities is None and masks is None:
        raise MetricError("There is nothing to judge. Received: neither probabilities nor masks.")

    draws: dict[str, Any] = {"replicates": replicates, "seed": seed, "level": level}
    result: dict[str, Any] = {"task": task, "classes": list(classes), **draws}
    result["n"] = {"images": n, "studies": len(np.unique(studies)), "patients": len(np.unique(patients))}
    if probabilities is not None:
        films = _films(probabilities, labels, classes, patients, task)
        cuts = {"": _cuts(thresholds, classes)}
        if specific_thresholds is not None:
            cuts["validated_"] = _cuts(specific_thresholds, classes)
        grouped, contradictory = _studies(films, studies, task)
        result["n"] |= {
            "studies_contradictory": contradictory,
            "classes": {
                name: {"images": _counts(films.y[:, c]), "studies": _counts(grouped.y[:, c])}
                for c, name in enumerate(classes)
            },
        }
        seen = [counts["images"] for counts in result["n"]["classes"].values()]
        result["n"]["fewest"] = min(min(count["positive"], count["negative"]) for count in seen)
        result["decision"] = {
            "thresholds": {name: float(cut) for name, cut in zip(classes, cuts[""], strict=True)},
            "chosen_on": "validation films",
        }
        result["image"] = _level(films, classes, task, cuts, specificity, ordered, False, draws)
        result["study"] = _level(grouped, classes, task, cuts, specificity, ordered, challenge == "siim", draws)
    if masks is not None:
        result["segmentation"] = _segmentation(masks, patients, draws)
    return result


def _cuts(thresholds: Sequence[float] | np.ndarray, classes: Sequence[str]) -> np.ndarray:
    cuts = np.asarray(thresholds, np.float64)
    if cuts.shape != (len(classes),) or np.isnan(cuts).any():
        raise MetricError(f"There must be one threshold a class ({len(classes)}). Received: {thresholds!r}.")
    return cuts


class _Items(NamedTuple):
    """Films, or studies: probabilities `[n, classes]`, labels `[n, classes]` and patients `[n]`."""

    p: np.ndarray
    y: np.ndarray
    patients: np.ndarray


def _films(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], patients: np.ndarray, task: Task
) -> _Items:
    """The films, checked; a multi-class film of which any label is unknown is unknown."""
    p, y = metrics.check_predictions(probabilities, labels, classes)
    if task == "multiclass":
        y = np.where((metrics.one_hot_rows(y) < 0)[:, None], np.nan, y)
    if not metrics.both_outcomes(y).any():
        raise OneOutcomeError(
            f"No class has both positive and negative films among these {len(p)}, so nothing can be told apart. Judge "
            "on films of at least two classes. Received: "
            + ", ".join(f"{name}: {_counts(y[:, c])['positive']} positive" for c, name in enumerate(classes))
            + "."
        )
    return _Items(p, y, patients)


def _counts(label: np.ndarray) -> dict[str, int]:
    return {
        "positive": int((label == 1).sum()),
        "negative": int((label == 0).sum()),
        "unknown": int(np.isnan(label).sum()),
    }


def _studies(films: _Items, studies: np.ndarray, task: Task) -> tuple[_Items, int]:
    """The studies that films belong to, and how many of them contradict themselves.

    A label is known if any film of the study knows it. Multi-label: positive if it is so on any film. Multi-class:
    films that disagree contradict each other, and the study's label is unknown.
    """
    p, y, patients = films
    _, first, codes = np.unique(studies, return_index=True, return_inverse=True)
    if (patients[first][codes] != patients).any():
        raise MetricError("A study must belong to one patient. Received: a study with films of several patients.")
    size = np.bincount(codes)
    scores = np.stack([np.bincount(codes, weights=column) for column in p.T], 1) / size[:, None]
    label = np.full(scores.shape, -1.0)
    np.maximum.at(label, codes, np.where(np.isnan(y), -1.0, y))
    label[label < 0] = np.nan
    contradictory = np.zeros(len(label), bool)
    if task == "multiclass":
        contradictory = np.nansum(label, 1) > 1
        label[contradictory] = np.nan
    return _Items(np.clip(scores, 0, 1), label, patients[first]), int(contradictory.sum())


def _level(
    items: _Items,
    classes: Sequence[str],
    task: Task,
    cuts: Mapping[str, np.ndarray],
    specificity: float,
    ordered: bool,
    voc: bool,
    draws: Mapping[str, Any],
) -> dict[str, Any]:
    """All figures of films, or of studies."""
    p, y, patients = items
    known = ~np.isnan(y)
    judged = np.flatnonzero(metrics.both_outcomes(y))
    statistic, used = _class_figures(p, y, judged, task, cuts, specificity, voc)
    table, table_used = _table_figures(p, y, task, ordered)
    estimates = bootstrap(
        lambda weights: {**statistic(weights), **table(weights)}, patients, used={**used, **table_used}, **draws
    )
    left_out = [name for c, name in enumerate(classes) if c not in judged]
    note = f"without {', '.join(left_out)}: one outcome only" if left_out else ""
    result: dict[str, Any] = {"macro": {}, "classes": {name: {} for name in classes}}
    for (c, figure), estimate in estimates.items():
        if c == MACRO:
            if note and (MACRO, figure) in used:  # means over classes; accuracy, kappa and ECE are of all films
                estimate = replace(estimate, note="; ".join(filter(None, [estimate.note, note])))
            result["macro"][figure] = estimate.to_json()
        else:
            result["classes"][classes[c]][figure] = estimate.to_json()
    for name in left_out:
        column = known[:, list(classes).index(name)]
        n, whose = int(column.sum()), len(np.unique(patients[column]))
        missing = Estimate(None, None, None, draws["level"], 0, 0, n, whose, "not measurable: one outcome only")
        result["classes"][name] = {figure: missing.to_json() for (c, figure) in used if c == MACRO}
    if task == "multiclass":
        truth = metrics.one_hot_rows(y)
        result["confusion"] = metrics.confusion_matrix(truth, p.argmax(1), len(classes)).tolist()
    result["reliability"] = calibration.table_json(calibration.reliability_table(p, y, task))
    result["ece_if_calibrated"] = calibration.error_if_calibrated(p, y, task, seed=draws["seed"])
    return result


def _class_figures(
    p: np.ndarray,
    y: np.ndarray,
    judged: np.ndarray,
    task: Task,
    cuts: Mapping[str, np.ndarray],
    specificity: float,
    voc: bool,
) -> tuple[Callable[[np.ndarray], Figures], Figures]:
    """A statistic of weights that gives every class's figures and their macro means, and the films each is over."""
    known = ~np.isnan(y)
    ranked = {int(c): Ranked(p[:, c], y[:, c]) for c in judged}
    at = f"sensitivity_at_{100 * specificity:g}_specificity"
    names = ["auroc", "average_precision", at, "f1", "sensitivity", "specificity", "brier"]
    names += ["kappa"] if task == "multilabel" else []
    names += ["voc_average_precision"] if voc else []
    names += ["validated_sensitivity", "validated_specificity"] if "validated_" in cuts else []
    # What each film adds to TP, FN, FP, TN of each class: one matrix product a chunk of draws.
    adds: dict[tuple[str, int], np.ndarray] = {}
    for which, cut in cuts.items():
        called = p >= cut
        for c in ranked:
            outcomes = [(y[:, c] == label) & (called[:, c] == said) for label, said in _CELLS]
            adds[which, c] = np.stack(outcomes, 1).astype(np.float64)
    errors = {c: np.where(known[:, c], (p[:, c] - np.nan_to_num(y[:, c])) ** 2, 0) for c in ranked}

    def statistic(weights: np.ndarray) -> Figures:
        figures: Figures = {}
        for c, films in ranked.items():
            true, false = films.counts(weights)
            tp, fn, fp, tn = (weights @ adds["", c]).T
            both = (tp + fn > 0) & (fp + tn > 0)

            def share(top: np.ndarray, bottom: np.ndarray, both: np.ndarray = both) -> np.ndarray:
                return np.where(both, metrics.ratio(top, bottom), np.nan)

            values = {
                "auroc": metrics.auroc_of(true, false),
                "average_precision": metrics.average_precision_of(true, false),
                at: metrics.sensitivity_at_of(true, false, specificity),
                "f1": share(2 * tp, 2 * tp + fp + fn),
                "sensitivity": share(tp, tp + fn),
                "specificity": share(tn, fp + tn),
                "brier": share(weights @ errors[c], tp + fn + fp + tn),
                "kappa": metrics.cohen_kappa(np.stack([tn, fp, fn, tp], -1).reshape(-1, 2, 2)),
                "voc_average_precision": voc_average_precision_of(true, false) if voc else np.empty(0),
            }
            if "validated_" in cuts:
                tp, fn, fp, tn = (weights @ adds["validated_", c]).T
                values |= {
                    "validated_sensitivity": share(tp, tp + fn),
                    "validated_specificity": share(tn, fp + tn),
                }
            figures |= {(c, name): values[name] for name in names}
        if ranked:
            figures |= {(MACRO, name): np.mean([figures[c, name] for c in ranked], axis=0) for name in names}
        return figures

    used: Figures = {(c, name): known[:, c] for c in ranked for name in names}
    if ranked:
        used |= {(MACRO, name): known[:, judged].any(1) for name in names}
    return statistic, used


def _table_figures(
    p: np.ndarray, y: np.ndarray, task: Task, ordered: bool
) -> tuple[Callable[[np.ndarray], Figures], Figures]:
    """Accuracy and kappa of the most probable class (multi-class), and the calibration error in two kinds of bins."""
    size = p.shape[1]
    films = ~np.isnan(y).all(1)
    errors = {
        name: calibration.calibration_error_of(p, y, task, mass=mass)
        for name, mass in (("ece", False), ("ece_equal_mass", True))
    }
    used: Figures = {(MACRO, name): films for name in errors}
    cells = np.zeros((len(p), size * size))
    if task == "multiclass":
        used |= {(MACRO, name): films for name in ("accuracy", "kappa", *(["quadratic_kappa"] if ordered else []))}
        rows, truth = np.flatnonzero(films), metrics.one_hot_rows(y)
        cells[rows, truth[rows] * size + p[rows].argmax(1)] = 1

    def statistic(weights: np.ndarray) -> Figures:
        figures: Figures = {(MACRO, name): error(weights) for name, error in errors.items()}
        if task == "multiclass":
            table = (weights @ cells).reshape(-1, size, size)
            right, total = np.trace(table, axis1=1, axis2=2), table.sum((1, 2))
            figures[MACRO, "accuracy"] = np.where(total > 0, metrics.ratio(right, total), np.nan)
            figures[MACRO, "kappa"] = metrics.cohen_kappa(table)
            if ordered:
                figures[MACRO, "quadratic_kappa"] = metrics.cohen_kappa(table, quadratic=True)
        return figures

    return statistic, used


def _segmentation(masks: MaskScores, patients: np.ndarray, draws: Mapping[str, Any]) -> dict[str, Any]:
    """Mean Dice and IoU of films with a known mask that is not empty, false-positive area of known empty ones; lesions
    found of all there are, and false ones a film with a known mask.
    """
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # each figure is a sum by a sum
    for name in ("dice", "iou", "false_positive_area", "false_lesions"):
        column = getattr(masks, name)
        parts[name] = np.nan_to_num(column), (~np.isnan(column)).astype(np.float64)
    parts["lesion_sensitivity"] = np.nan_to_num(masks.lesions_found), np.nan_to_num(masks.lesions)
    used = {name: bottom > 0 for name, (_, bottom) in parts.items()}

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for name, (top, bottom) in parts.items():
            total = weights @ bottom
            found[name] = np.where(total > 0, metrics.ratio(weights @ top, total), np.nan)
        return found

    return {name: estimate.to_json() for name, estimate in bootstrap(statistic, patients, used=used, **draws).items()}


def curves(
    probabilities: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    patients: np.ndarray,
    *,
    points: int = 101,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, dict[str, Any]]:
    """ROC and precision-recall curves with interval bands, for `figures.roc` and `figures.precision_recall`.

    Args:
        probabilities: `[n, classes]`, 0-1.
        labels: `[n, classes]`; 1, 0, or NaN = unknown.
        classes: their names.
        patients: whole numbers `[n]`.
        points: levels of the x-axis, from 0 to 1.
        replicates: draws of patients.
        seed: of the draws.
        level: of the bands, at each x alone.

    Returns:
        For each class with both outcomes: {"x": [...], "roc": {...}, "precision_recall": {...}, "prevalence": float};
        a curve is {"y", "low", "high"}, lists of floats, with None where there is no interval.

    Raises:
        MetricError: for shapes or values that do not fit.
        BootstrapError: for settings out of range.
    """
    p, y = metrics.check_predictions(probabilities, labels, classes)
    x = np.linspace(0, 1, points)
    result: dict[str, dict[str, Any]] = {}
    for c in np.flatnonzero(metrics.both_outcomes(y)):
        ranked = Ranked(p[:, c], y[:, c])

        def statistic(weights: np.ndarray, ranked: Ranked = ranked) -> dict[tuple[str, int], np.ndarray]:
            counts = ranked.counts(weights)
            lines = {"roc": metrics.roc_at_of(*counts, x), "precision_recall": metrics.precision_at_of(*counts, x)}
            return {(name, i): line[:, i] for name, line in lines.items() for i in range(points)}

        made = bootstrap(statistic, np.asarray(patients), replicates=replicates, seed=seed, level=level)
        result[classes[int(c)]] = {
            "x": x.tolist(),
            "prevalence": float(np.nanmean(y[:, c])),
            **{
                name: {
                    "y": [made[name, i].value for i in range(points)],
                    "low": [made[name, i].low for i in range(points)],
                    "high": [made[name, i].high for i in range(points)],
                }
                for name in ("roc", "precision_recall")
            },
        }
    return result
