"""Subgroups: does the model do as well for women as for men, for the old, on bedside films, in every hospital?

    {"level", "replicates", "seed", "least_patients", "least_positives", "comparisons", "beyond_zero", "text",
     "largest_gap": Estimate,
     "unknown":     {"view" | "sex" | "age" | "source": films of which it is not known},
     "groups":      {"view" | "sex" | "age" | "source": {group: {"films", "patients",
                                                                 "figures":     {figure: Estimate},
                                                                 "differences": {figure: Estimate},
                                                                 "text"}}}}

Figures are `auroc`, `sensitivity` and `specificity` (macro means over classes; the last two at the run's thresholds),
`ece` (top-label for multi-class, 15 bins of equal width) and `dice` where films are annotated. A difference is the
group less the rest: all other films of which the attribute is known. Patients are drawn, group and rest from the same
draws, so that a patient with films on both sides counts on both at once.

Groups differ in more than their name: a difference between views may be one between hospitals. It says that the model
does worse there, not why. What `text` says is in plain words, and how large a difference could have gone unseen is half
the width of the interval. `largest_gap` is how far AUROC drops in one group below the rest: of all groups, the drop
whose interval reaches highest, so that what a small group may hide counts too. Its note names the group, and those that
are too small to say.

A class counts in a group that has at least 10 patients with a positive film of it and 10 with a negative one; the
calibration error and Dice need 20 patients. Below that there is "too few to say", and no figure. A macro difference is
over the classes that count on both sides. Ages are banded as 0-17 (children: another chest, other diseases), 18-39,
40-64 and 65 and over (the geriatric patients of ICH E7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cxr_tf.evaluate import calibration, metrics
from cxr_tf.evaluate.bootstrap import Estimate, bootstrap
from cxr_tf.evaluate.calibration import Task
from cxr_tf.evaluate.metrics import MaskScores, MetricError, Ranked

LEAST_PATIENTS = 20
LEAST_POSITIVES = 10  # patients with a positive film of a class, and as many with a negative one
AGE_BANDS = {"0-17": 0, "18-39": 18, "40-64": 40, "65+": 65}  # name -> first year
ATTRIBUTES = ("view", "sex", "age", "source")
_NAMES = {
    "auroc": "AUROC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ece": "calibration error",
    "dice": "Dice",
}
_MACRO = ("auroc", "sensitivity", "specificity")

Statistic = Callable[[np.ndarray], np.ndarray]  # weights [draws, n] -> [draws]


def subgroups(
    films: pd.DataFrame,
    *,
    labels: np.ndarray,
    probabilities: np.ndarray | None,
    classes: Sequence[str],
    patients: np.ndarray,
    task: Task,
    thresholds: Sequence[float] | np.ndarray,
    masks: MaskScores | None = None,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Figures of each subgroup of the films, and how they differ from those of all others.

    Args:
        films: a row a film, with the manifest's columns `view`, `sex`, `age` and `source`; None or NaN = unknown.
        labels: `[n, classes]`; 1, 0, or NaN = unknown.
        probabilities: `[n, classes]`, calibrated, 0-1; None for a model that only segments.
        classes: their names, in order.
        patients: whole numbers `[n]`: whose film it is. Patients are drawn for the intervals.
        task: "multiclass" or "multilabel".
        thresholds: `[classes]`, chosen on validation films; positive is at or above.
        masks: how the predicted masks fit, one entry a film.
        replicates: draws of patients.
        seed: of the draws.
        level: of the intervals, of each by itself.

    Returns:
        The dict that the module's text describes; `json.dumps` takes it.

    Raises:
        MetricError: for shapes or values that do not fit.
        BootstrapError: for replicates, seed or level out of range.

    Example:
        >>> found = subgroups(shards.manifest.loc[keys], labels=y, probabilities=p, **case)  # doctest: +SKIP
        >>> found["groups"]["sex"]["F"]["differences"]["auroc"]["value"]  # doctest: +SKIP
        -0.021
    """
    calibration.check_task(task)
    patients = np.asarray(patients)
    n = len(films)
    lengths = {"labels": len(labels), "patients": len(patients)} | ({} if masks is None else {"masks": len(masks)})
    if any(length != n for length in lengths.values()):
        raise MetricError(f"There must be one entry a film ({n}). Received: {lengths}.")
    p = y = None
    if probabilities is not None:
        p, y = metrics.check_predictions(probabilities, labels, classes)
        if task == "multiclass":
            y = np.where((metrics.one_hot_rows(y) < 0)[:, None], np.nan, y)
    dice = None if masks is None or np.isnan(masks.dice).all() else masks.dice
    cuts = np.asarray(thresholds, np.float64)
    if p is not None and cuts.shape != (len(classes),):
        raise MetricError(f"There must be one threshold a class ({len(classes)}). Received: {thresholds!r}.")

    sides: dict[bytes, _Side] = {}  # two groups are each other's rest: each side is measured once

    def side(inside: np.ndarray) -> _Side:
        key = inside.tobytes()
        if key not in sides:
            sides[key] = _side(np.flatnonzero(inside), p, y, cuts, patients, task, dice)
        return sides[key]

    kinds = _kinds(films)
    pairs: dict[tuple[str, str], _Pair] = {}
    for attribute, kind in kinds.items():
        for group in _in_order(attribute, kind):
            inside = kind == group
            pairs[attribute, group] = _Pair(side(inside), side((kind != "") & ~inside))

    def statistic(weights: np.ndarray) -> dict[tuple[str, str, str, str], np.ndarray]:
        measured = {id(one): one.measure(weights[:, one.rows]) for one in sides.values()}
        found = {}
        for (attribute, group), (here, rest) in pairs.items():
            one, other = measured[id(here)], measured[id(rest)]
            for figure in here.figures:
                found[attribute, group, "figures", figure] = _mean(one, figure, here.classes)
            shared = here.shared(rest)
            for figure in here.figures:
                if figure in rest.figures and (shared or figure not in _MACRO):
                    difference = _mean(one, figure, shared) - _mean(other, figure, shared)
                    found[attribute, group, "differences", figure] = difference
        return found

    used = {}
    for (attribute, group), (here, rest) in pairs.items():
        for figure in _NAMES:
            counted = np.zeros(n, bool)
            counted[here.over(figure)] = True
            used[attribute, group, "figures", figure] = counted.copy()
            counted[rest.over(figure)] = True
            used[attribute, group, "differences", figure] = counted
    estimates = bootstrap(statistic, patients, replicates=replicates, seed=seed, level=level, used=used)

    listed = [name for name in _NAMES if (p is not None if name != "dice" else dice is not None)]
    result: dict[str, Any] = {"level": level, "replicates": replicates, "seed": seed}
    result |= {"least_patients": LEAST_PATIENTS, "least_positives": LEAST_POSITIVES}
    result["unknown"] = {attribute: int((kind == "").sum()) for attribute, kind in kinds.items()}
    groups: dict[str, dict[str, Any]] = {attribute: {} for attribute in kinds}
    drops: dict[str, Estimate] = {}
    compared: dict[tuple[frozenset[int], str], bool] = {}  # whether the interval lies beyond 0
    for (attribute, group), pair in pairs.items():
        made: dict[str, dict[str, Estimate]] = {"figures": {}, "differences": {}}
        for figure in listed:
            for what in made:
                key = (attribute, group, what, figure)
                if what == "differences" and not len(pair.rest.rows):
                    continue
                estimate = estimates.get(key) or _too_few(level, used[key], patients)
                made[what][figure] = _noted(estimate, figure, what, pair, classes)
        for figure, estimate in made["differences"].items():
            if estimate.low is not None and estimate.high is not None:
                compared[frozenset(map(id, pair)), figure] = _beyond_zero(estimate)
        if "auroc" in made["differences"]:
            drops[f"{attribute} {group}"] = made["differences"]["auroc"]
        groups[attribute][group] = {
            "films": len(pair.here.rows),
            "patients": len(np.unique(patients[pair.here.rows])),
            **{what: {name: e.to_json() for name, e in each.items()} for what, each in made.items()},
            "text": f"{attribute.capitalize()} {group}: {_in_words(made['differences'], bool(len(pair.rest.rows)))}",
        }
    beyond = sum(compared.values())
    return result | {
        "comparisons": len(compared),
        "beyond_zero": beyond,
        "text": _comparisons(len(compared), beyond, level),
        "largest_gap": _largest_gap(drops, level, patients).to_json(),
        "groups": groups,
    }


def age_bands(ages: np.ndarray) -> np.ndarray:
    """The band of each age in years, text `[n]`; "" where the age is unknown (NaN).

    Example:
        >>> age_bands(np.array([17.9, 18, 70, np.nan])).tolist()
        ['0-17', '18-39', '65+', '']
    """
    ages = np.asarray(ages, np.float64)
    names = np.array([*AGE_BANDS, ""], dtype=object)
    band = np.searchsorted(list(AGE_BANDS.values()), np.nan_to_num(ages), side="right") - 1
    return names[np.where(np.isnan(ages), len(AGE_BANDS), band)]


class _Side(NamedTuple):
    """The films on one side of a comparison: which they are, and what can be measured on them."""

    rows: np.ndarray  # [m] of the films
    classes: tuple[int, ...]  # that count here
    figures: tuple[str, ...]
    measure: Callable[[np.ndarray], dict[Any, np.ndarray]]  # weights [draws, m] -> by figure, or by (figure, class)
    labeled: np.ndarray  # rows with a known label
    annotated: np.ndarray  # rows with Dice
    by_chance: float  # calibration error of a perfectly calibrated model

    def shared(self, other: _Side) -> tuple[int, ...]:
        """Classes that count on both sides."""
        return tuple(c for c in self.classes if c in other.classes)

    def over(self, figure: str) -> np.ndarray:
        """The rows that a figure is over."""
        return self.annotated if figure == "dice" else self.labeled


class _Pair(NamedTuple):
    here: _Side
    rest: _Side


def _side(
    rows: np.ndarray,
    p: np.ndarray | None,
    y: np.ndarray | None,
    cuts: np.ndarray,
    patients: np.ndarray,
    task: Task,
    dice: np.ndarray | None,
) -> _Side:
    """Prepares what is measured on the films of one side."""
    whose = patients[rows]
    statistics: dict[Any, Statistic] = {}
    ranked: dict[int, Ranked] = {}
    adds = np.zeros((len(rows), 0))
    labeled = annotated = rows[:0]
    by_chance = float("nan")

    def enough(of: np.ndarray, least: int) -> bool:
        return len(np.unique(whose[of])) >= least

    if p is not None and y is not None and len(rows):
        p, y = p[rows], y[rows]
        labeled = rows[~np.isnan(y).all(1)]
        for c in range(y.shape[1]):
            if enough(y[:, c] == 1, LEAST_POSITIVES) and enough(y[:, c] == 0, LEAST_POSITIVES):
                ranked[c] = Ranked(p[:, c], y[:, c])
        called = p >= cuts
        columns = [
            part
            for c in ranked
            for part in (y[:, c] == 1, (y[:, c] == 1) & called[:, c], y[:, c] == 0, (y[:, c] == 0) & ~called[:, c])
        ]
        adds = np.stack(columns, 1).astype(np.float64) if columns else adds
        if enough(~np.isnan(y).all(1), LEAST_PATIENTS):
            statistics["ece"] = calibration.calibration_error_of(p, y, task)
            by_chance = calibration.error_if_calibrated(p, y, task)
    if dice is not None:
        overlap = dice[rows]
        known = ~np.isnan(overlap)
        annotated = rows[known]
        if enough(known, LEAST_PATIENTS):
            statistics["dice"] = _mean_of(np.nan_to_num(overlap), known.astype(np.float64))

    def measure(weights: np.ndarray) -> dict[Any, np.ndarray]:
        found = {figure: statistic(weights) for figure, statistic in statistics.items()}
        counts = weights @ adds
        for i, (c, films) in enumerate(ranked.items()):
            positive, hit, negative, cleared = counts[:, 4 * i : 4 * i + 4].T
            both = (positive > 0) & (negative > 0)
            found["auroc", c] = metrics.auroc_of(*films.counts(weights))
            found["sensitivity", c] = np.where(both, metrics.ratio(hit, positive), np.nan)
            found["specificity", c] = np.where(both, metrics.ratio(cleared, negative), np.nan)
        return found

    figures = (*(_MACRO if ranked else ()), *statistics)
    return _Side(rows, tuple(ranked), figures, measure, labeled, annotated, by_chance)


def _mean_of(values: np.ndarray, known: np.ndarray) -> Statistic:
    def statistic(weights: np.ndarray) -> np.ndarray:
        total = weights @ known
        return np.where(total > 0, metrics.ratio(weights @ values, total), np.nan)

    return statistic


def _mean(measured: Mapping[Any, np.ndarray], figure: str, classes: Sequence[int]) -> np.ndarray:
    """A figure of one side; its mean over classes where there is one a class."""
    if figure not in _MACRO:
        return measured[figure]
    return np.mean([measured[figure, c] for c in classes], axis=0)


def _kinds(films: pd.DataFrame) -> dict[str, np.ndarray]:
    """Attribute -> each film's group as text `[n]`, "" where it is unknown."""
    missing = [name for name in ATTRIBUTES if name not in films.columns]
    if missing:
        raise MetricError(f"The films need the columns {', '.join(ATTRIBUTES)}. Missing: {', '.join(missing)}.")
    kinds = {
        name: films[name].map(lambda value: value if isinstance(value, str) else "").to_numpy(object)
        for name in ("view", "sex", "source")
    }
    kinds["age"] = age_bands(films["age"].to_numpy(np.float64, na_value=np.nan))
    return {name: kinds[name] for name in ATTRIBUTES}


def _in_order(attribute: str, kind: np.ndarray) -> list[str]:
    """The groups: ages from young to old, others by their number of films."""
    names, films = np.unique(kind[kind != ""].astype(str), return_counts=True)
    if attribute == "age":
        return [band for band in AGE_BANDS if band in names]
    return [str(names[i]) for i in np.argsort(-films, kind="stable")]


# --- in words ---------------------------------------------------------------------------------------------------------


def _too_few(level: float, counted: np.ndarray, patients: np.ndarray) -> Estimate:
    n, whose = int(counted.sum()), len(np.unique(patients[counted]))
    return Estimate(None, None, None, level, 0, 0, n, whose, "not measurable: too few to say")


def _noted(estimate: Estimate, figure: str, what: str, pair: _Pair, classes: Sequence[str]) -> Estimate:
    """Adds which classes a macro figure is without, and what chance alone does to a calibration error."""
    notes = [estimate.note]
    if figure in _MACRO and estimate.value is not None:
        counted = pair.here.classes if what == "figures" else pair.here.shared(pair.rest)
        left_out = [name for c, name in enumerate(classes) if c not in counted]
        notes.append(f"without {', '.join(left_out)}: too few to say" if left_out else "")
    if figure == "ece" and estimate.value is not None:
        here, rest = pair.here.by_chance, pair.rest.by_chance
        notes.append(
            f"about {here:.3f} of it by chance alone: the fewer films, the more"
            if what == "figures"
            else f"about {here - rest:+.3f} of it by chance alone: the side with fewer films shows more"
        )
    return replace(estimate, note="; ".join(filter(None, notes)))


def _largest_gap(drops: Mapping[str, Estimate], level: float, patients: np.ndarray) -> Estimate:
    """The drop below the rest, of all groups, whose interval reaches highest."""
    said = {name: e for name, e in drops.items() if e.value is not None and e.low is not None and e.high is not None}
    silent = [name for name in drops if name not in said]
    note = f"too few to say: {', '.join(silent)}" if silent else ""
    if not said:
        told = note or "there are no groups to compare"
        return Estimate(
            None, None, None, level, 0, 0, len(patients), len(np.unique(patients)), f"not measurable: {told}"
        )
    worst = min(said, key=lambda name: said[name].low or 0.0)
    e = said[worst]
    low, value, high = (None if end is None else -end for end in (e.high, e.value, e.low))
    return replace(e, value=value, low=low, high=high, note="; ".join(filter(None, [f"of {worst}", e.note, note])))


def _beyond_zero(estimate: Estimate) -> bool:
    return estimate.low is not None and estimate.high is not None and (estimate.low > 0 or estimate.high < 0)


def _in_words(differences: Mapping[str, Estimate], compared: bool) -> str:
    """What the differences of a group can bear."""
    if not compared:
        return "All films of which this is known are of this group: there is nothing to compare with."
    sentences, unseen, few = [], [], []
    for figure, e in differences.items():
        name = _NAMES[figure]
        if e.low is None or e.high is None or e.value is None:
            few.append(name)
        elif _beyond_zero(e):
            ends = sorted((abs(e.low), abs(e.high)))
            way = "lower" if e.value < 0 else "higher"
            told = f"{abs(e.value):.3f} {way} than on the others ({ends[0]:.3f} to {ends[1]:.3f})."
            sentences.append(f"{name[:1].upper()}{name[1:]} is {told}")
        else:
            unseen.append(f"{name} (up to about {(e.high - e.low) / 2:.2f})")
    if unseen:
        sentences.append(f"No difference is shown, but one could have gone unseen, in {_listed(unseen)}.")
    if few:
        sentences.append(
            f"Too few to say for {_listed(few)}: on either side {LEAST_PATIENTS} patients are needed, and of a class "
            f"{LEAST_POSITIVES} with it and {LEAST_POSITIVES} without."
        )
    return " ".join(sentences)


def _comparisons(compared: int, beyond: int, level: float) -> str:
    if not compared:
        return "No group is large enough to be compared with the others."
    chance = (1 - level) * compared
    return (
        f"{compared} differences were looked at, each with its own {100 * level:g} % interval. If there were none at "
        f"all, about {chance:.0f} of these intervals would leave out 0 by chance; {beyond} do."
    )


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
