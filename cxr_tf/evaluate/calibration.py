"""The operating point: temperature and thresholds, chosen on validation films; and how well probabilities hold.

Nothing here may see the films that are reported: what is chosen goes into `operating.json` and is applied as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logsumexp, softmax

from cxr_tf.evaluate.metrics import MetricError, Ranked, check_predictions, one_hot_rows, ratio

Task = Literal["multiclass", "multilabel"]

_LEAST_FILMS = 20
_LOWEST, _HIGHEST = 0.05, 20.0  # temperatures


class CalibrationWarning(UserWarning):
    """Something could not be chosen from the films given, and a neutral value stands in."""


def check_task(task: str) -> None:
    """Refuses what is no task.

    Raises:
        MetricError: for anything but "multiclass" and "multilabel".
    """
    if task not in ("multiclass", "multilabel"):
        raise MetricError(f'The task must be "multiclass" or "multilabel". Received: {task!r}.')


def probabilities_of(logits: np.ndarray, task: Task, temperature: float = 1.0) -> np.ndarray:
    """Probabilities of logits: softmax (multi-class) or sigmoid (multi-label) of logits / temperature.

    Args:
        logits: `[n, classes]`.
        task: "multiclass" or "multilabel".
        temperature: above 0.

    Returns:
        float64 `[n, classes]`, 0-1.

    Raises:
        MetricError: for another task, or a temperature that is not above 0.
    """
    check_task(task)
    if not temperature > 0:
        raise MetricError(f"A temperature must be above 0. Received: {temperature}.")
    z = np.asarray(logits, np.float64) / temperature
    return softmax(z, axis=1) if task == "multiclass" else expit(z)


def fit_temperature(logits: np.ndarray, labels: np.ndarray, task: Task) -> float:
    """The temperature that makes validation labels most likely (Guo et al., "On calibration of modern neural
    networks", ICML 2017).

    One number for the whole model: dividing all logits by it changes no ranking within a class (multi-label) and no
    predicted class (multi-class).

    Args:
        logits: `[n, classes]`, of validation films.
        labels: `[n, classes]`; 1, 0, or NaN = unknown, left out.
        task: "multiclass" (softmax) or "multilabel" (sigmoid).

    Returns:
        The temperature, 0.05-20. 1.0, with a `CalibrationWarning`, where the films cannot tell: fewer than 20, or all
        of them classified so well that ever sharper probabilities would fit ever better.

    Raises:
        MetricError: for shapes or values that do not fit, or logits that are not finite.
    """
    check_task(task)
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    if z.ndim != 2 or z.shape != y.shape:
        raise MetricError(f"Logits and labels must be [n, classes], one shape. Received: {z.shape} and {y.shape}.")
    if not np.isfinite(z).all():
        raise MetricError("Logits must be finite. Received: NaN or infinity.")
    if not y.size:
        return _neutral("there is no labeled film to fit a temperature on")
    check_predictions(np.zeros_like(y), y)  # the labels' values
    known = one_hot_rows(y) >= 0 if task == "multiclass" else ~np.isnan(y)
    films = int(known.reshape(len(y), -1).any(1).sum())
    if films < _LEAST_FILMS:
        return _neutral(f"{films} labeled films are too few to fit a temperature ({_LEAST_FILMS} are needed)")
    z, y = z[known], y[known]

    def loss(log_temperature: float) -> float:
        scaled = z / np.exp(log_temperature)
        if task == "multiclass":
            return float((logsumexp(scaled, axis=1) - (scaled * y).sum(1)).mean())
        return float((np.logaddexp(0, scaled) - scaled * y).mean())

    bounds = (np.log(_LOWEST), np.log(_HIGHEST))
    best = float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))
    if best < _LOWEST * 1.01:
        return _neutral("the validation films are classified without error, so no temperature can be fitted")
    if best > _HIGHEST / 1.01:
        message = f"the logits tell nothing about the validation labels: the temperature is at its bound, {_HIGHEST:g}"
        warnings.warn(message, CalibrationWarning, stacklevel=2)
        return _HIGHEST
    return best


def _neutral(reason: str) -> float:
    warnings.warn(f"{reason}; 1.0 stands in.", CalibrationWarning, stacklevel=3)
    return 1.0


def choose_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each class the threshold with the highest F1 on validation films; positive is at or above it.

    Args:
        probabilities: `[n, classes]`, calibrated, of validation films.
        labels: the same shape; 1, 0, or NaN = unknown.

    Returns:
        float64 `[classes]`, half-way between the last film called positive and the next; 0.5, with a
        `CalibrationWarning`, for a class without both outcomes. The highest of several that do equally well.

    Raises:
        MetricError: for shapes or values that do not fit.
    """
    # F1 is 2 TP / (2 TP + FN + FP).
    return _thresholds(probabilities, labels, lambda true, false: int((2 * true / (true[-1] + true + false)).argmax()))


def threshold_at_specificity(probabilities: np.ndarray, labels: np.ndarray, specificity: float = 0.9) -> np.ndarray:
    """For each class the lowest threshold with at least this specificity on validation films.

    Args:
        probabilities: `[n, classes]`, calibrated, of validation films.
        labels: the same shape; 1, 0, or NaN = unknown.
        specificity: 0-1.

    Returns:
        float64 `[classes]`; as `choose_thresholds`. Above 1 where even the highest score has too many negatives.

    Raises:
        MetricError: for shapes or values that do not fit.
    """
    if not 0 <= specificity <= 1:
        raise MetricError(f"A specificity lies in 0-1. Received: {specificity}.")
    return _thresholds(
        probabilities,
        labels,
        lambda true, false: int((false <= (1 - specificity) * false[-1] * (1 + 1e-12) + 1e-9).sum()) - 1,
    )


def _thresholds(
    probabilities: np.ndarray, labels: np.ndarray, best: Callable[[np.ndarray, np.ndarray], int]
) -> np.ndarray:
    """Per class, the threshold after the step that `best(true, false)` names (-1: before the first)."""
    p, y = check_predictions(probabilities, labels)
    chosen = np.full(p.shape[1], 0.5)
    for c in range(p.shape[1]):
        ranked = Ranked(p[:, c], y[:, c])
        true, false = (counts[0] for counts in ranked.counts(np.ones((1, len(p)))))
        if not len(true) or not true[-1] or not false[-1]:
            message = f"class {c} has one outcome only among the validation films: its threshold stays at 0.5."
            warnings.warn(message, CalibrationWarning, stacklevel=3)
            continue
        edges = np.concatenate([[np.nextafter(1, 2)], (ranked.scores[:-1] + ranked.scores[1:]) / 2, [0.0]])
        # Neighbours may be so close that half-way rounds to the lower one, which must not be called positive.
        edges[1:-1] = np.where(edges[1:-1] > ranked.scores[1:], edges[1:-1], ranked.scores[:-1])
        chosen[c] = edges[best(true, false) + 1]
    return chosen


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions of similar confidence: `n` of them in (low, high], what they said and what came true."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def confidences(probabilities: np.ndarray, labels: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What was said, what came true, and of which film.

    Multi-class: the probability of the predicted class and whether it is right (top-label). Multi-label: every
    probability and its label.

    Args:
        probabilities: `[n, classes]`, 0-1.
        labels: the same shape; 1, 0, or NaN = unknown, left out.
        task: "multiclass" or "multilabel".

    Returns:
        confidence float64 `[m]`, outcome float64 `[m]` (1, 0), row int `[m]`.

    Raises:
        MetricError: for shapes or values that do not fit.
    """
    check_task(task)
    p, y = check_predictions(probabilities, labels)
    if task == "multiclass":
        truth = one_hot_rows(y)
        rows = np.flatnonzero(truth >= 0)
        called = p[rows].argmax(1)
        return p[rows, called], (called == truth[rows]).astype(np.float64), rows
    rows, columns = np.nonzero(~np.isnan(y))
    return p[rows, columns], y[rows, columns], rows


def bin_edges(confidence: np.ndarray, bins: int = 15, mass: bool = False) -> np.ndarray:
    """Edges of bins of equal width over 0-1, or of equal mass (equal confidences stay in one bin)."""
    if bins < 1:
        raise MetricError(f"There must be at least one bin. Received: {bins}.")
    if not mass:
        return np.linspace(0, 1, bins + 1)
    if not len(confidence):
        return np.array([0.0, 1.0])
    last = -(-np.arange(1, bins) * len(confidence) // bins) - 1  # of each bin; whole numbers, so that none is lost
    inner = np.sort(confidence)[last]
    return np.unique(np.concatenate([[0.0], inner[(inner > 0) & (inner < 1)], [1.0]]))


def assign_bins(confidence: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Bin of each confidence, int `[m]`: bins are (low, high], and 0 is in the first."""
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, len(edges) - 2)


def reliability_table(
    probabilities: np.ndarray, labels: np.ndarray, task: Task, *, bins: int = 15, mass: bool = False
) -> list[ReliabilityBin]:
    """The reliability diagram as a table: a row for every bin that is not empty. Arguments as `calibration_error`."""
    said, came, _ = confidences(probabilities, labels, task)
    edges = bin_edges(said, bins, mass)
    where = assign_bins(said, edges)
    table = []
    for i in np.unique(where):
        a, b = said[where == i], came[where == i]
        table.append(ReliabilityBin(float(edges[i]), float(edges[i + 1]), len(a), float(a.mean()), float(b.mean())))
    return table


def calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, task: Task, *, bins: int = 15, mass: bool = False
) -> float:
    """Expected calibration error: mean gap between what was said and what came true, bins weighted by size.

    Args:
        probabilities: `[n, classes]`, 0-1.
        labels: the same shape; 1, 0, or NaN = unknown, left out.
        task: "multiclass": top-label; "multilabel": over all known labels.
        bins: how many.
        mass: bins of equal mass, not of equal width.

    Returns:
        0 (best) to 1; NaN when no label is known. It is never 0 on few films, however well calibrated the model.

    Raises:
        MetricError: for shapes or values that do not fit.
    """
    table = reliability_table(probabilities, labels, task, bins=bins, mass=mass)
    total = sum(row.n for row in table)
    return sum(row.n * abs(row.confidence - row.accuracy) for row in table) / total if total else float("nan")


def calibration_error_of(
    probabilities: np.ndarray, labels: np.ndarray, task: Task, *, mass: bool = False
) -> Callable[[np.ndarray], np.ndarray]:
    """`calibration_error` in 15 bins for many weightings of the same films.

    Args:
        probabilities, labels, task, mass: as `calibration_error`. Bins of equal mass are those of all films at once.

    Returns:
        A function of weights, float64 `[draws, n]`, that gives `[draws]`, NaN for a draw without a known label.
    """
    said, came, rows = confidences(probabilities, labels, task)
    edges = bin_edges(said, mass=mass)
    gaps = np.zeros((len(probabilities), len(edges) - 1))
    np.add.at(gaps, (rows, assign_bins(said, edges)), said - came)
    count = np.bincount(rows, minlength=len(probabilities)).astype(np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        total = weights @ count
        return np.where(total > 0, ratio(np.abs(weights @ gaps).sum(1), total), np.nan)

    return statistic


def error_if_calibrated(
    probabilities: np.ndarray, labels: np.ndarray, task: Task, *, draws: int = 200, seed: int = 0
) -> float:
    """What `calibration_error` would be on average, were every probability right: its bias on so many films.

    Outcomes are drawn from the probabilities themselves, film by film, and held against them in the same bins (of equal
    width). An error that is not above this is no evidence of any.

    Args:
        probabilities, labels, task: as `calibration_error`.
        draws: how many sets of outcomes.
        seed: of the draws.

    Returns:
        0 to 1; NaN when no label is known.
    """
    said, _, _ = confidences(probabilities, labels, task)
    if not len(said):
        return float("nan")
    bins = assign_bins(said, bin_edges(said))
    came = np.random.default_rng(seed).random((draws, len(said))) < said
    gaps = [np.abs((said - came)[:, bins == i].sum(axis=1)) for i in np.unique(bins)]
    return float(np.sum(gaps, axis=0).mean() / len(said))


def table_json(table: list[ReliabilityBin]) -> list[dict[str, Any]]:
    """A reliability table as JSON."""
    return [asdict(row) for row in table]
