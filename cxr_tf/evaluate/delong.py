"""DeLong's variance of AUROC, and his test of two models on the same films; for one film a patient alone.

DeLong, DeLong & Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating characteristic
curves: a nonparametric approach", Biometrics 44 (1988); computed from ranks, in O(n log n), as in Sun & Xu, "Fast
implementation of DeLong's algorithm", IEEE Signal Processing Letters 21 (2014).

It takes films for independent of each other. Films of one patient are not, so a patient with several of them is
refused: `bootstrap` draws patients, and `paired.paired_auroc` compares models on its draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

from cxr_tf.errors import CxrError
from cxr_tf.evaluate.bootstrap import Estimate


class DeLongError(CxrError):
    """Films that DeLong's method does not hold for, or arrays that do not fit."""


@dataclass(frozen=True)
class DeLongTest:
    """Two models on the same films.

    Attributes:
        first: AUROC of the first model; the intervals are those of a normal distribution, so `replicates` is 0.
        second: of the second.
        difference: first minus second.
        z: the difference in standard errors; None where there is no variance to divide by.
        p: how often chance alone gives a difference as large as this to either side; None likewise.
    """

    first: Estimate
    second: Estimate
    difference: Estimate
    z: float | None
    p: float | None

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict without NaN."""
        estimates = {name: getattr(self, name).to_json() for name in ("first", "second", "difference")}
        return {**estimates, "z": self.z, "p": self.p}


def delong(scores: np.ndarray, labels: np.ndarray, patients: np.ndarray, *, level: float = 0.95) -> Estimate:
    """AUROC with DeLong's interval.

    Args:
        scores: `[n]`, finite, higher = more likely positive.
        labels: `[n]`; 1, 0, or NaN = unknown, left out.
        patients: `[n]`, whose each film is; nobody twice.
        level: of the interval.

    Returns:
        An `Estimate` without replicates, its interval within 0-1. Not measurable without two films of either outcome.

    Raises:
        DeLongError: when a patient has several films, or for arrays that do not fit.

    Example:
        >>> delong(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]), np.arange(4)).value
        0.75
    """
    areas, covariance, n = _areas(np.asarray(scores, np.float64)[None], labels, patients, level)
    return _estimate(areas[0], covariance[0, 0], level, n, 0.0, 1.0)


def delong_test(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, patients: np.ndarray, *, level: float = 0.95
) -> DeLongTest:
    """DeLong's test: do two models rank the same films equally well?

    Args:
        first: `[n]`, scores of the first model.
        second: `[n]`, of the second.
        labels, patients, level: as for `delong`.

    Returns:
        Both AUROCs and their difference, with intervals, and the test.

    Raises:
        DeLongError: as `delong`.

    Example:
        >>> labels = np.array([0, 0, 0, 1, 1, 1])
        >>> test = delong_test(np.arange(6.0), np.array([0, 3, 1, 2, 5, 4]), labels, np.arange(6))
        >>> round(test.difference.value, 3)
        0.111
    """
    shapes = [np.shape(first), np.shape(second)]
    if shapes[0] != shapes[1]:
        raise DeLongError(f"The scores of both models must have one shape, [n]. Received: {shapes[0]} and {shapes[1]}.")
    areas, covariance, n = _areas(np.stack([first, second]).astype(np.float64), labels, patients, level)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    difference = _estimate(areas[0] - areas[1], variance, level, n, -1.0, 1.0)
    z = p = None
    if difference.low is not None and variance > _NOTHING:
        z = float((areas[0] - areas[1]) / math.sqrt(variance))
        p = float(2 * norm.sf(abs(z)))
    each = [_estimate(areas[i], covariance[i, i], level, n, 0.0, 1.0) for i in (0, 1)]
    return DeLongTest(each[0], each[1], difference, z, p)


_NOTHING = 1e-15  # a variance that is 0 but for rounding


def _areas(
    scores: np.ndarray, labels: np.ndarray, patients: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """AUROC of models with scores `[models, n]`, its covariance `[models, models]`, and how many films it is over."""
    y, whose = np.asarray(labels, np.float64), np.asarray(patients)
    if scores.ndim != 2 or y.shape != scores.shape[1:] or whose.shape != y.shape:
        raise DeLongError(
            "Scores, labels and patients must be [n], one a film. "
            f"Received: {scores.shape[1:]}, {y.shape} and {whose.shape}."
        )
    if not np.isfinite(scores).all():
        raise DeLongError("Scores must be finite. Received: NaN or infinity.")
    if not (np.isnan(y) | (y == 0) | (y == 1)).all():
        raise DeLongError("Labels must be 1, 0 or NaN (unknown). Received: another value.")
    if not 0 < level < 1:
        raise DeLongError(f"A level lies between 0 and 1. Received: {level}.")
    known = ~np.isnan(y)
    films = np.unique(whose[known], return_counts=True)[1]
    if (several := int((films > 1).sum())) > 0:
        raise DeLongError(
            "DeLong's method takes one film a patient: films of one patient are alike, and it would be too sure of "
            "itself. Use the bootstrap over patients. "
            f"Received: {several} of {len(films)} patients with several films."
        )
    positive, negative = scores[:, y == 1], scores[:, y == 0]
    m, n = positive.shape[1], negative.shape[1]
    models = len(scores)
    if not m or not n:
        return np.full(models, np.nan), np.full((models, models), np.nan), m + n
    # A film's rank among all, less that among its own kind, counts the other kind below it, and half of its ties.
    ranks = rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    of_positive = (ranks[:, :m] - rankdata(positive, axis=1)) / n
    of_negative = 1 - (ranks[:, m:] - rankdata(negative, axis=1)) / m
    areas = of_positive.mean(axis=1)
    if m < 2 or n < 2:
        return areas, np.full((models, models), np.nan), m + n
    covariance = np.cov(of_positive).reshape(models, models) / m + np.cov(of_negative).reshape(models, models) / n
    return areas, covariance, m + n


def _estimate(value: float, variance: float, level: float, n: int, least: float, most: float) -> Estimate:
    def made(known: float | None, low: float | None, high: float | None, note: str = "") -> Estimate:
        return Estimate(known, low, high, level, 0, 0, n, n, note)

    if math.isnan(value):
        return made(None, None, None, "not measurable: one outcome only, or none")
    if math.isnan(variance):
        return made(float(value), None, None, "not measurable: fewer than two films of one of the outcomes")
    half = float(norm.ppf((1 + level) / 2)) * math.sqrt(max(variance, 0.0))
    note = "" if variance > _NOTHING else "no variance: the interval cannot show what more films would"
    return made(float(value), max(float(value) - half, least), min(float(value) + half, most), note)
