"""Figures of merit: ranking, decisions and masks.

Two layers. The functions on arrays (`auroc`, `average_precision`, `f1`, ...) are what a reader calls; they stand on
scikit-learn where it has the figure. Beneath them, `Ranked` and the `*_of` functions give the same figures for many
weightings of the same films at once, which is what a bootstrap needs: the films are sorted once, and each replicate is
a row of weights. Tests hold the two layers together, ties included.

Everywhere: predictions come first, labels second. A label is 1, 0, or NaN for unknown, and what is unknown is left out.
A figure that the films cannot give (a class of which they show one outcome only) is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy import ndimage
from sklearn import metrics as sk

from cxr_tf.errors import CxrError


class MetricError(CxrError):
    """Predictions or labels that no figure can be computed from."""


class OneOutcomeError(MetricError):
    """Labels of one outcome only, so that nothing can be told apart."""


def check_predictions(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Checks predictions against labels, and gives both as float64 `[n, classes]`.

    Args:
        probabilities: `[n, classes]` or `[n]`, 0-1.
        labels: the same shape; 1, 0, or NaN = unknown.
        classes: class names, where there are any: one a column.

    Raises:
        MetricError: when shapes differ, nothing is there, a probability is not in 0-1 or a label is not 1, 0 or NaN.
    """
    p, y = _columns(probabilities), _columns(labels)
    if p.shape != y.shape:
        raise MetricError(f"Predictions and labels must have one shape. Received: {p.shape} and {y.shape}.")
    if classes is not None and p.shape[1] != len(classes):
        raise MetricError(f"There must be one column a class ({len(classes)}). Received: {p.shape[1]} columns.")
    if p.size == 0:
        raise MetricError(f"There is nothing to judge. Received: arrays of shape {p.shape}.")
    if bad := _first(~((p >= 0) & (p <= 1))):
        raise MetricError(f"Probabilities must lie in 0-1 (logits?). Received: {p[bad]} in row {bad[0]}.")
    if bad := _first(~(np.isnan(y) | (y == 0) | (y == 1))):
        raise MetricError(f"Labels must be 1, 0 or NaN (unknown). Received: {y[bad]} in row {bad[0]}.")
    return p, y


def _columns(values: np.ndarray) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim not in (1, 2):
        raise MetricError(f"Arrays must be [n] or [n, classes]. Received: shape {array.shape}.")
    return array[:, None] if array.ndim == 1 else array


def _first(wrong: np.ndarray) -> tuple[int, ...] | None:
    """Index of the first True."""
    return tuple(int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape)) if wrong.any() else None


def both_outcomes(labels: np.ndarray) -> np.ndarray:
    """Which classes have a positive and a negative film: bool `[classes]`, from labels `[n, classes]`."""
    return (labels == 1).any(0) & (labels == 0).any(0)


def one_hot_rows(labels: np.ndarray) -> np.ndarray:
    """The class of every film of a multi-class set: int `[n]`, -1 = unknown.

    Args:
        labels: `[n, classes]`; a row is one-hot, or unknown where any of it is NaN.

    Raises:
        MetricError: when a row without NaN does not have exactly one class.
    """
    known = ~np.isnan(labels).any(1)
    if bad := _first(known & (np.nansum(labels, 1) != 1)):
        raise MetricError(
            "A film of a multi-class set must have exactly one class; if films can have several or none, the task is "
            f"multilabel. Received: {int(np.nansum(labels[bad[0]]))} classes in row {bad[0]}."
        )
    return np.where(known, np.nan_to_num(labels).argmax(1), -1)


def macro(values: np.ndarray) -> float:
    """Mean over the classes that have the figure; NaN if none has."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class: float64 `[classes]`, NaN without both outcomes.

    Args:
        probabilities: `[n, classes]` or `[n]`, 0-1.
        labels: the same shape; 1, 0, or NaN = unknown.

    Raises:
        MetricError: for shapes or values that do not fit.

    Example:
        >>> auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
        array([0.75])
    """
    return _per_class(sk.roc_auc_score, probabilities, labels)


def average_precision(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision of each class, the step-wise sum without interpolation: float64 `[classes]`.

    Arguments, errors and NaN as `auroc`. The interpolated figure of the SIIM challenge is
    `cxr_tf.evaluate.voc.voc_average_precision`.
    """
    return _per_class(sk.average_precision_score, probabilities, labels)


def _per_class(score: Callable[..., float], probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    p, y = check_predictions(probabilities, labels)
    result = np.full(p.shape[1], np.nan)
    for c in np.flatnonzero(both_outcomes(y)):
        known = ~np.isnan(y[:, c])
        result[c] = score(y[known, c], p[known, c])
    return result


def sensitivity_at_specificity(probabilities: np.ndarray, labels: np.ndarray, specificity: float = 0.9) -> np.ndarray:
    """The highest sensitivity at a specificity of at least `specificity`: float64 `[classes]`.

    A point of the ROC curve of these very films, without interpolation: it describes the ranking. What a threshold that
    was fixed beforehand gives is another figure. Arguments, errors and NaN as `auroc`.
    """
    p, y = check_predictions(probabilities, labels)
    weights = np.ones((1, len(p)))
    points = [sensitivity_at_of(*Ranked(p[:, c], y[:, c]).counts(weights), specificity) for c in range(p.shape[1])]
    return np.concatenate(points)


def f1(probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray | float = 0.5) -> np.ndarray:
    """F1 of each class at its threshold (a film is called positive at or above it): float64 `[classes]`.

    NaN for a class without positive films. Arguments and errors as `auroc`.
    """
    p, y = check_predictions(probabilities, labels)
    called = p >= thresholds
    result = np.full(p.shape[1], np.nan)
    for c in np.flatnonzero((y == 1).any(0)):
        known = ~np.isnan(y[:, c])
        result[c] = sk.f1_score(y[known, c], called[known, c], zero_division=0)
    return result


def brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Brier score of each class, the mean squared error of its probability: float64 `[classes]`, 0 is best."""
    p, y = check_predictions(probabilities, labels)
    known = ~np.isnan(y)
    count = known.sum(0)
    total = np.where(known, (p - np.nan_to_num(y)) ** 2, 0).sum(0)
    return np.divide(total, count, out=np.full(p.shape[1], np.nan), where=count > 0)


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts of films by true class (rows) and predicted class (columns): int `[classes, classes]`.

    Args:
        truth: int `[n]`, class of each film; -1 = unknown, left out.
        predicted: int `[n]`.
        classes: how many there are.

    Raises:
        MetricError: when shapes differ or a class number is out of range.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise MetricError(f"True and predicted classes must be [n]. Received: {truth.shape} and {predicted.shape}.")
    known = truth >= 0
    cells = np.stack([truth[known], predicted[known]])
    if cells.size and (cells.min() < 0 or cells.max() >= classes):
        raise MetricError(f"Class numbers must lie in 0-{classes - 1}. Received: {cells.min()} to {cells.max()}.")
    return np.bincount(cells[0] * classes + cells[1], minlength=classes * classes).reshape(classes, classes)


def cohen_kappa(confusion: np.ndarray, *, quadratic: bool = False) -> np.ndarray:
    """Cohen's kappa of confusion matrices: agreement beyond chance, 1 is best, 0 is chance.

    Args:
        confusion: `[..., classes, classes]`, counts or weights, rows are the truth.
        quadratic: disagreements weigh by the squared distance of the classes; for ordered classes alone.

    Returns:
        float64 `[...]`; NaN where chance alone agrees fully (one class only) or nothing is counted.
    """
    table = np.asarray(confusion, np.float64)
    size = table.shape[-1]
    distance = np.subtract.outer(np.arange(size), np.arange(size)).astype(np.float64)
    cost = distance**2 if quadratic else (distance != 0).astype(np.float64)
    total = table.sum((-2, -1))
    by_chance = (table.sum(-1)[..., :, None] * table.sum(-2)[..., None, :] * cost).sum((-2, -1))
    disagree = (table * cost).sum((-2, -1)) * total
    return 1 - np.divide(disagree, by_chance, out=np.full_like(total, np.nan), where=by_chance > 0)


# --- the same figures for many weightings of the same films ---------------------------------------------------------


class Ranked:
    """One class's films in falling order of score, ready for weights.

    Args:
        scores: `[n]`, higher = more likely positive.
        labels: `[n]`; 1, 0, or NaN = unknown, left out.

    Attributes:
        scores: the distinct scores, falling: `[steps]`. Films of equal score are one step, whatever their order.

    Example:
        >>> ranked = Ranked(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
        >>> auroc_of(*ranked.counts(np.array([[1, 1, 1, 1], [1, 0, 1, 1]])))
        array([0.75, 1.  ])
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        known = np.flatnonzero(~np.isnan(labels))
        self._order = known[np.argsort(-scores[known], kind="stable")]
        falling = scores[self._order]
        self._last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True)[: len(falling)])
        self._positive = (labels[self._order] == 1).astype(np.float64)
        self.scores = falling[self._last]

    def counts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives when the films down to each step are called positive.

        Args:
            weights: `[replicates, n]`, not negative; how often each film counts.

        Returns:
            Two float64 arrays `[replicates, steps]`; the last step calls every film positive.
        """
        w = weights[:, self._order].astype(np.float64, copy=False)
        called = np.cumsum(w, axis=1)
        true = np.cumsum(w * self._positive, axis=1)
        if len(self._last) < w.shape[1]:
            called, true = called[:, self._last], true[:, self._last]
        return true, called - true


def where_defined(values: np.ndarray, true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """NaN for the replicates that lack positives or negatives."""
    if true.shape[1] == 0:
        return np.full(len(true), np.nan)
    return np.where((true[:, -1] > 0) & (false[:, -1] > 0), values, np.nan)


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, 0 where there is nothing to divide by."""
    return np.divide(top, bottom, out=np.zeros(np.broadcast_shapes(top.shape, bottom.shape)), where=bottom > 0)


def auroc_of(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """AUROC from `Ranked.counts`: `[replicates]`, NaN for one without both outcomes."""
    before = np.pad(true, ((0, 0), (1, 0)))[:, :-1]
    steps = np.diff(false, axis=1, prepend=0)
    area = np.einsum("rk,rk->r", steps, (true + before) / 2)
    return where_defined(ratio(area, true[:, -1:].sum(1) * false[:, -1:].sum(1)), true, false)


def average_precision_of(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """Average precision from `Ranked.counts`: `[replicates]`, NaN for one without both outcomes."""
    area = np.einsum("rk,rk->r", np.diff(true, axis=1, prepend=0), ratio(true, true + false))
    return where_defined(ratio(area, true[:, -1:].sum(1)), true, false)


def sensitivity_at_of(true: np.ndarray, false: np.ndarray, specificity: float) -> np.ndarray:
    """Sensitivity at a specificity from `Ranked.counts`: `[replicates]`, NaN for one without both outcomes."""
    allowed = (1 - specificity) * false[:, -1:] * (1 + 1e-12) + 1e-9  # 0.1 * 10 films is one film, not 0.999…
    reached = np.where(false <= allowed, true, 0).max(1, initial=0)
    return where_defined(ratio(reached, true[:, -1:].sum(1)), true, false)


def roc_at_of(true: np.ndarray, false: np.ndarray, false_positive_rates: np.ndarray) -> np.ndarray:
    """The ROC curve, linear between its points, at given false-positive rates: `[replicates, rates]`."""
    result = np.full((len(true), len(false_positive_rates)), np.nan)
    for row in np.flatnonzero(~np.isnan(where_defined(np.zeros(len(true)), true, false))):
        x = np.append(0, false[row]) / false[row, -1]
        y = np.append(0, true[row]) / true[row, -1]
        # Where the curve rises straight up, its upper end is the value, whichever np.interp takes.
        upper = y[np.searchsorted(x, false_positive_rates, "right") - 1]
        result[row] = np.maximum(np.interp(false_positive_rates, x, y), upper)
    return result


def precision_at_of(true: np.ndarray, false: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Precision where the curve first reaches each recall (steps, no interpolation): `[replicates, recalls]`."""
    result = np.full((len(true), len(recalls)), np.nan)
    for row in np.flatnonzero(~np.isnan(where_defined(np.zeros(len(true)), true, false))):
        recall = true[row] / true[row, -1]
        precision = ratio(true[row], true[row] + false[row])
        # At recall 0 too the first step that finds something counts: before it there is no precision. The margin is
        # for recalls like 0.07, which 7 / 100 need not equal to the last bit.
        wanted = np.maximum(recalls - 1e-12, np.finfo(float).tiny)
        result[row] = precision[np.searchsorted(recall, wanted, "left")]
    return result


# --- masks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskScores:
    """How well predicted masks fit, film by film; every field is `[n]`.

    Attributes:
        dice: float64, 2 |A and B| / (|A| + |B|); NaN unless the mask is known and not empty.
        iou: float64, |A and B| / |A or B|; NaN likewise.
        false_positive_area: float64, predicted share of the film, 0-1; NaN unless the mask is known and empty.
        known: bool, somebody said where the finding is, or that there is none.
        empty: bool, known, and there is none.
        lesions: float64, how many separate areas the true mask has; NaN where it is unknown.
        lesions_found: float64, of how many of them at least a tenth was predicted; NaN likewise.
        false_lesions: float64, how many separate predicted areas lie less than a tenth on the true mask; NaN likewise.
    """

    dice: np.ndarray
    iou: np.ndarray
    false_positive_area: np.ndarray
    known: np.ndarray
    empty: np.ndarray
    lesions: np.ndarray
    lesions_found: np.ndarray
    false_lesions: np.ndarray

    def __len__(self) -> int:
        return len(self.dice)

    @classmethod
    def join(cls, parts: Sequence[MaskScores]) -> MaskScores:
        """Puts the scores of several batches behind one another."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def mask_scores(predicted: np.ndarray, truth: np.ndarray, content: np.ndarray | None = None) -> MaskScores:
    """Compares predicted masks with true ones, film by film.

    Args:
        predicted: bool `[n, h, w]` (or `[n, h, w, 1]`), where the model sees the finding.
        truth: 1 and 0 in the same shape; a film that is NaN all over has no annotation.
        content: bool, same shape: where the film lies in a padded square. What is predicted outside does not count.

    Raises:
        MetricError: when shapes differ, `predicted` is not boolean, or a film is partly NaN.

    Separate areas are 8-connected. Boxes drawn as truth may merge where they overlap, and then count as one.

    Example:
        >>> scores = mask_scores(np.array([[[True, True]]]), np.array([[[1.0, 0.0]]]))
        >>> float(scores.iou[0])
        0.5
    """
    pixels, true = np.asarray(predicted), np.asarray(truth)
    inside = np.ones(pixels.shape, bool) if content is None else np.asarray(content, bool)
    if pixels.shape != true.shape or pixels.shape != inside.shape or pixels.ndim < 3:
        raise MetricError(f"Masks must have one shape, [n, h, w]. Received: {pixels.shape}, {true.shape}.")
    if pixels.dtype != bool:
        raise MetricError(f"Predicted masks must be boolean (`probabilities >= 0.5`). Received: {pixels.dtype}.")
    n = len(pixels)
    counts = _lesions((pixels & inside).reshape(pixels.shape[:3]), np.where(inside, true, 0).reshape(pixels.shape[:3]))
    pixels, true, inside = pixels.reshape(n, -1), true.reshape(n, -1), inside.reshape(n, -1)
    unknown = np.isnan(true)
    known = ~unknown.any(1)
    if (unknown.any(1) & ~unknown.all(1)).any():
        raise MetricError("A mask is either known or NaN all over. Received: a film with NaN in places.")
    a, b = pixels & inside, (true == 1) & inside
    both, either = (a & b).sum(1), (a | b).sum(1)
    total = a.sum(1) + b.sum(1)
    empty = known & ~b.any(1)
    judged = known & ~empty
    nan = np.full(n, np.nan)
    return MaskScores(
        dice=np.divide(2 * both, total, out=nan.copy(), where=judged),
        iou=np.divide(both, either, out=nan.copy(), where=judged),
        false_positive_area=np.divide(a.sum(1), inside.sum(1), out=nan.copy(), where=empty & inside.any(1)),
        known=known,
        empty=empty,
        **{name: np.where(known, count, np.nan) for name, count in counts.items()},
    )


_TOUCHED = 0.1  # part of an area that must lie on the other mask
_TOUCHING = np.ones((3, 3), bool)  # pixels that meet at a corner are one area


def _lesions(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Counts of separate areas, film by film; masks `[n, h, w]`."""
    counts = np.zeros((3, len(predicted)))
    for i, (a, b) in enumerate(zip(predicted, truth == 1, strict=True)):
        if b.any():
            counts[:2, i] = _areas(b, a)
        if a.any():
            areas, touched = _areas(a, b)
            counts[2, i] = areas - touched
    return dict(zip(("lesions", "lesions_found", "false_lesions"), counts, strict=True))


def _areas(mask: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """How many separate areas a mask has, and how many of them lie on the other mask by a tenth or more."""
    areas, count = ndimage.label(mask, _TOUCHING)
    size = np.bincount(areas.ravel(), minlength=count + 1)[1:]
    shared = np.bincount(areas[other], minlength=count + 1)[1:]
    return count, int((shared >= _TOUCHED * size).sum())


def dice(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Dice of one pair of masks `[h, w]`, true = not zero; NaN when both are empty."""
    return _overlap(predicted, truth)[0]


def iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of one pair of masks `[h, w]`, true = not zero; NaN when both are empty."""
    return _overlap(predicted, truth)[1]


def _overlap(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    a, b = np.asarray(predicted) != 0, np.asarray(truth) != 0
    if a.shape != b.shape:
        raise MetricError(f"Masks must have one shape. Received: {a.shape} and {b.shape}.")
    both, total = int((a & b).sum()), int(a.sum() + b.sum())
    return (2 * both / total, both / (total - both)) if total else (float("nan"), float("nan"))
