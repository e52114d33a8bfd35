"""Intervals: a bootstrap that draws patients, not films.

Films of one patient are alike, so that drawing films one by one makes intervals too narrow. Here patients are drawn
with replacement, each with all their films (Field & Welsh, "Bootstrapping clustered data", JRSS B 2007). The middle
95 % of a figure over the draws would be too narrow still, and would lie too high for a good AUROC. So an interval is
bounded by two other quantiles of the draws, corrected for bias and skewness (BCa: Efron, "Better bootstrap confidence
intervals", JASA 1987) and set as far apart as a t distribution is wider than a normal one (Hesterberg, "What teachers
should know about the bootstrap", The American Statistician 2015). The degrees of freedom are not those of all patients:
an AUROC with ten ill patients among a hundred hangs on the ten. They are Satterthwaite's (1946), from how much the
figure moves when each patient is left out. `experiments/coverage.py` measures how often such intervals hold the truth.

A draw is a row of whole-number weights, one per film, so a statistic that takes weights is computed for many draws at
once and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from cxr_tf.errors import CxrError

Key = TypeVar("Key", bound=Hashable)

MOST_DROPPED = 0.05  # of the replicates; beyond, an interval would describe the lucky draws
FEW_PATIENTS = 10
_GROUPS = 200  # of patients, left out in turn; one patient each where there are no more
_CHUNK = 1_000_000  # weights held at once: 8 MB, and a few times that while a statistic runs


class BootstrapError(CxrError):
    """Settings or clusters that no interval can be computed from."""


@dataclass(frozen=True)
class Estimate:
    """A figure and how far it can be trusted.

    Attributes:
        value: the figure on the data as it is; None if the data cannot give it.
        low: lower end of the interval; None where the figure is not measurable.
        high: upper end; low <= value <= high.
        level: how often such intervals are meant to hold the truth.
        replicates: how many were drawn.
        dropped: on how many of them the figure was undefined.
        n: films (or studies) that the figure is over.
        patients: whose they are.
        note: why there is no interval, or what to beware of; "" if nothing.
    """

    value: float | None
    low: float | None
    high: float | None
    level: float
    replicates: int
    dropped: int
    n: int
    patients: int
    note: str = ""

    @property
    def measurable(self) -> bool:
        """Whether there is an interval."""
        return self.low is not None

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict without NaN."""
        return asdict(self)

    def __str__(self) -> str:
        if self.value is None:
            return "not measurable"
        if self.low is None:
            return f"{self.value:.3f} (interval not measurable)"
        return f"{self.value:.3f} ({self.low:.3f}–{self.high:.3f})"


def bootstrap(
    statistic: Callable[[np.ndarray], Mapping[Key, np.ndarray]],
    clusters: np.ndarray,
    *,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    used: Mapping[Key, np.ndarray] | None = None,
) -> dict[Key, Estimate]:
    """Computes figures and their intervals by drawing clusters with replacement.

    Args:
        statistic: takes weights, float64 `[draws, n]` (how often each film counts), and returns an array `[draws]` for
            every figure, NaN where it is undefined. It is called with many draws at once, and once with a single row of
            ones, which gives the value. Further rows leave out one patient each (one of 200 groups of patients, where
            there are more).
        clusters: `[n]`, whose each film is: patients, as any whole numbers.
        replicates: number of draws.
        seed: draw i is a function of (seed, i) and the set of patients, whatever the order of the films.
        level: how often the interval is meant to hold the truth.
        used: for a figure, bool `[n]`: the films that it is over; all by default. Sets the counts of the `Estimate`.

    Returns:
        An `Estimate` for every figure of `statistic`. A figure undefined on more than 5 % of the draws (a draw may lack
        one of the classes) is not measurable: it keeps its value and has no interval, and its note says why.

    Raises:
        BootstrapError: when settings are out of range, nothing is there, or shapes do not fit.

    Example:
        >>> values = np.array([1.0, 2.0, 3.0, 4.0])
        >>> mean = lambda weights: {"mean": weights @ values / weights.sum(1)}
        >>> bootstrap(mean, np.array([0, 0, 1, 2]))["mean"].value
        2.5
    """
    clusters = np.asarray(clusters)
    if clusters.ndim != 1 or not len(clusters):
        raise BootstrapError(f"Clusters must be [n], at least one. Received: shape {clusters.shape}.")
    if replicates < 1 or not 0 < level < 1 or seed < 0:
        raise BootstrapError(
            "The bootstrap takes replicates >= 1, 0 < level < 1 and seed >= 0. "
            f"Received: replicates={replicates}, level={level}, seed={seed}."
        )
    _, codes = np.unique(clusters, return_inverse=True)
    patients, n = int(codes.max()) + 1, len(codes)
    values = {key: float(value[0]) for key, value in statistic(np.ones((1, n))).items()}
    draws = _measured(statistic, lambda i: _draw(seed, i, patients), replicates, codes)
    group = np.random.default_rng(seed).permutation(patients) % _GROUPS
    without: dict[Key, np.ndarray] = {}
    if patients > 1:  # leaving out the only one would leave nothing
        without = _measured(statistic, lambda g: (group != g).astype(np.float64), min(patients, _GROUPS), codes)
    estimates = {}
    for key, value in values.items():
        counted = np.ones(n, bool) if used is None or key not in used else np.asarray(used[key], bool)
        if counted.shape != (n,):
            raise BootstrapError(f"`used` must be bool [{n}] for {key!r}. Received: shape {counted.shape}.")
        whose = len(np.unique(codes[counted]))
        estimates[key] = _estimate(value, draws[key], without.get(key, np.empty(0)), level, int(counted.sum()), whose)
    return estimates


def _measured(
    statistic: Callable[[np.ndarray], Mapping[Key, np.ndarray]],
    weighting: Callable[[int], np.ndarray],
    count: int,
    codes: np.ndarray,
) -> dict[Key, np.ndarray]:
    """A statistic under many weightings of the patients, each `[patients]`: float64 `[count]` for every figure."""
    parts: dict[Key, list[np.ndarray]] = {}
    step = max(1, _CHUNK // len(codes))
    for start in range(0, count, step):
        weights = np.stack([weighting(i)[codes] for i in range(start, min(start + step, count))])
        for key, values in statistic(weights).items():
            parts.setdefault(key, []).append(np.asarray(values, np.float64))
    return {key: np.concatenate(each) for key, each in parts.items()}


def _draw(seed: int, replicate: int, patients: int) -> np.ndarray:
    """How often each patient is drawn: float64 `[patients]`, in sum `patients`."""
    rng = np.random.default_rng([seed, replicate])
    return np.bincount(rng.integers(patients, size=patients), minlength=patients).astype(np.float64)


def _estimate(value: float, draws: np.ndarray, without: np.ndarray, level: float, n: int, patients: int) -> Estimate:
    good = draws[~np.isnan(draws)]
    replicates, dropped = len(draws), len(draws) - len(good)

    def made(low: float | None, high: float | None, note: str) -> Estimate:
        known = None if math.isnan(value) else value
        return Estimate(known, low, high, level, replicates, dropped, n, patients, note)

    if math.isnan(value):
        return made(None, None, "not measurable: these films cannot give the figure (one outcome only, or none)")
    if patients < 2:
        return made(None, None, "not measurable: the films are of one patient")
    if dropped > MOST_DROPPED * replicates:
        return made(
            None,
            None,
            f"not measurable: undefined on {dropped:,} of {replicates:,} draws of patients (more than "
            f"{MOST_DROPPED:.0%}); too few patients show one of the outcomes",
        )
    low, high = _interval(value, good, without, level, patients)
    if good.min() == good.max():
        return made(low, high, "every draw gave the same value: the interval cannot show what more films would")
    if patients < FEW_PATIENTS:
        return made(low, high, f"{patients} patients: intervals from so few are too narrow")
    return made(low, high, "")


def _interval(value: float, draws: np.ndarray, without: np.ndarray, level: float, patients: int) -> tuple[float, float]:
    """Two quantiles of the draws: BCa, its normal quantile widened to a t quantile.

    Args:
        value: of all films.
        draws: the figure on the draws where it is defined.
        without: the figure without each group of patients; NaN where it is undefined.
        level: of the interval.
        patients: how many the figure is over.
    """
    acceleration, freedom = _influence(without, patients)
    reach = float(stdtrit(freedom, (1 + level) / 2)) * math.sqrt((freedom + 1) / freedom)
    reach = min(reach, 40.0)  # no draw lies further out, and a product with infinity may be NaN
    tied = 1e-9 * np.ptp(draws)  # equal but for rounding, which must not depend on the order of the films
    below = ((draws < value - tied).sum() + (draws <= value + tied).sum()) / 2
    bias = float(ndtri((below + 0.5) / (len(draws) + 1)))  # half a draw more on either side keeps it finite

    def share(z: float) -> float:
        z += bias
        bend = 1 - acceleration * z
        return float(ndtr(bias + z / bend if bend > 0 else math.copysign(math.inf, z)))

    low, high = (float(q) for q in np.quantile(draws, [share(-reach), share(reach)]))
    # A figure that is biased upwards (a calibration error is) may lie below nearly all of its draws.
    return min(low, value), max(high, value)


def _influence(without: np.ndarray, patients: int) -> tuple[float, float]:
    """How unevenly a figure hangs on its patients, from its values without each group of them.

    Returns:
        BCa's acceleration, and the degrees of freedom of the figure's variance: `patients` - 1, or fewer where it
        hangs on some. A variance that is a sum of squares `u**2` of kurtosis k varies as if it had 2 len(u) / (k - 1).
    """
    known = without[~np.isnan(without)]
    pull = known.mean() - known if len(known) else known
    size = float(np.linalg.norm(pull))
    if size == 0:
        return 0.0, patients - 1.0
    pull = pull / size
    excess = float((pull**4).sum()) - 1 / len(pull)
    return float((pull**3).sum()) / 6, min(patients - 1.0, 2 / max(excess, 1e-12))
