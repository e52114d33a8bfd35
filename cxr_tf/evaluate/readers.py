"""Agreement with human readers: kappa between them, of the model with each, and where the model lies among them.

The readers' labels are a CSV, a row for each film (or study) that a reader has read:

    film,reader,label          or    study,reader,label
    17,A,typical                     9,A,Effusion;Edema
    17,B,indeterminate               9,B,

`film` and `study` are the whole numbers of `predictions.csv` (`film` and `study_key`). `label` is a class; where films
can have several, it may name several, joined by ";", and a blank cell says that the film shows none of them. A film
that a reader has not read has no row. The names of `reader` stand in the report: give letters or numbers.

    {"unit": "film" | "study", "task", "weights": "none" | "quadratic", "level", "replicates", "seed",
     "n": {"items", "patients", "left_out"},
     "readers":  {reader: how many films (or studies) were read},
     "between":  [{"readers": [a, b], "kappa": Estimate, "classes": {class: Estimate}}],
     "model":    [{"reader", "kappa": Estimate, "classes": {class: Estimate}}],
     "position": {"model": Estimate, "readers": [{"reader", "kappa": Estimate, "difference": Estimate}], "text"},
     "model_minus_readers": Estimate}

Kappa is Cohen's: agreement beyond that of chance, 1 is full agreement, 0 chance (Cohen, "A coefficient of agreement for
nominal scales", 1960). Ordered classes weigh a disagreement by the square of its distance (Cohen 1968). Where films can
have several classes there is a kappa of each class's yes and no ("classes"), and "kappa" is their mean over the classes
that every pair has one of. A pair is over what both have read.

"position" has the model's mean kappa with all readers beside each reader's mean kappa with the other readers. The
"difference" is the model's mean with those same others less the reader's, so that both are held against the same
people; "model_minus_readers" is the mean of the differences. "left_out" counts what was read and is not judged here.
Patients are drawn for all intervals.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from cxr_tf.data.manifest import ManifestError, read_csv
from cxr_tf.errors import nearest
from cxr_tf.evaluate import calibration, metrics
from cxr_tf.evaluate.bootstrap import Estimate, bootstrap
from cxr_tf.evaluate.calibration import Task

_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
MODEL = ""  # stands where a reader's name would: a name is never blank

Pair = tuple[str, str]


class ReadersError(ManifestError):
    """A CSV of readers' labels that cannot be used; the text lists what is wrong with it."""


def read_readers(
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    task: Task,
    films: Collection[int],
    studies: Collection[int],
) -> pd.DataFrame:
    """Reads a CSV of readers' labels.

    Args:
        path: the file (see the module's text).
        classes: the model's classes, in order.
        task: "multiclass": one class a cell; "multilabel": any number of them.
        films: the numbers of all films that there are, judged here or not.
        studies: of all studies.

    Returns:
        A table with the columns "film" or "study" (int), "reader" (str) and one of bool for each class, which is named
        by its number: 0, 1, ...

    Raises:
        ReadersError: all problems in one: a column that is missing, a number that is none of ours, a blank reader, a
            label that is no class, a film that a reader has twice. Cells are not quoted: what stands in the wrong
            place may be a name.

    Example:
        >>> table = read_readers("readers.csv", classes=["a", "b"], task="multiclass", films={17},
        ...     studies={9})  # doctest: +SKIP
    """
    calibration.check_task(task)
    try:
        table = read_csv(path)
    except ManifestError as error:
        raise ReadersError(error.problems, str(path)) from error
    unit = _unit(table, str(path))
    known = set(films if unit == "film" else studies)
    index = {name: number for number, name in enumerate(classes)}
    problems: list[str] = []
    items: list[int] = []
    said = np.zeros((len(table), len(classes)), bool)
    first: dict[tuple[int, str], int] = {}
    for row, (item, reader, label) in enumerate(zip(table[unit], table["reader"], table["label"], strict=True)):
        line = row + 2  # as editors count
        number = int(item) if _NUMBER.fullmatch(item) else -1
        items.append(number)
        if number not in known:
            problems.append(f"line {line}: {unit} must be one of the numbers in predictions.csv")
        if not reader:
            problems.append(f"line {line}: reader is blank")
        elif number in known and (before := first.setdefault((number, reader), line)) != line:
            problems.append(f"lines {before} and {line}: one reader has the same {unit} twice")
        names = [name.strip() for name in label.split(";")] if task == "multilabel" else [label]
        for name in filter(None, names):
            if name in index:
                said[row, index[name]] = True
            else:
                problems.append(f"line {line}: label is no class.{nearest(name, classes)}")
        if task == "multiclass" and not label:
            problems.append(f"line {line}: label is blank; a {unit} that was not read has no row")
    if any("label is no class" in problem for problem in problems):
        several = ', or several joined by ";"' if task == "multilabel" else ""
        problems.append(f"the classes are: {', '.join(classes)}. A label is one of them{several}")
    if not len(table):
        problems.append("there are no labels in it")
    if problems:
        raise ReadersError(problems, str(path))
    columns: dict[Any, Any] = {unit: items, "reader": list(table["reader"])}
    return pd.DataFrame(columns | {c: said[:, c] for c in range(len(classes))})


def _unit(table: pd.DataFrame, about: str) -> str:
    """Which of the two columns the table has."""
    columns = list(table.columns)
    units = [name for name in ("film", "study") if name in columns]
    problems = [f"column {name!r} is missing." for name in ("reader", "label") if name not in columns]
    if len(units) != 1:
        problems.append(
            f'one of the columns "film" and "study" must be there. Received: {" and ".join(units) or "none"}'
        )
    if problems:
        raise ReadersError(problems, about)
    return units[0]


def agreement(
    table: pd.DataFrame,
    *,
    films: np.ndarray,
    studies: np.ndarray,
    patients: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    task: Task,
    thresholds: Sequence[float] | np.ndarray,
    ordered: bool = False,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Kappa between readers and of the model with each of them.

    The model decides as it is used: the most probable class (multi-class), or every class at or above its threshold
    (multi-label); of a study, by the mean of its films' probabilities.

    Args:
        table: from `read_readers`.
        films: whole numbers `[n]`: the films that are judged.
        studies: whole numbers `[n]`: of which study each is.
        patients: whole numbers `[n]`: whose it is. Patients are drawn for the intervals.
        probabilities: `[n, classes]`, calibrated, 0-1.
        classes: their names, in order.
        task: "multiclass" or "multilabel".
        thresholds: `[classes]`, chosen on validation films; used where films can have several classes.
        ordered: the classes are grades, from the first to the last: kappa is quadratic. Multi-label kappas are of yes
            and no, and the same either way.
        replicates: draws of patients.
        seed: of the draws.
        level: of the intervals.

    Returns:
        The dict that the module's text describes; `json.dumps` takes it.

    Raises:
        MetricError: for shapes or values that do not fit.
        ReadersError: when none of the films that are judged was read.
        BootstrapError: for replicates, seed or level out of range.
    """
    unit = "film" if "film" in table.columns else "study"
    quadratic = ordered and task == "multiclass"
    keys, whose, model = _decisions(
        films if unit == "film" else studies, np.asarray(patients), probabilities, classes, task, thresholds
    )
    judged = table[table[unit].isin(keys)]
    if not len(judged):
        raise ReadersError(
            f"The readers have read none of the {len(keys)} {_UNITS[unit]} that are judged here. Give labels of test "
            f"{_UNITS[unit]}."
        )
    readers = sorted(judged["reader"].unique())
    read = {MODEL: np.isin(keys, judged[unit])}
    said = {MODEL: model}
    for reader in readers:
        rows = judged[judged["reader"] == reader]
        place = np.searchsorted(keys, rows[unit])
        read[reader], said[reader] = np.zeros(len(keys), bool), np.zeros(model.shape, bool)
        read[reader][place] = True
        said[reader][place] = rows[list(range(len(classes)))].to_numpy(bool)
    anyone = read[MODEL]  # the rest cannot say anything
    whose = whose[anyone]
    read, said = ({name: values[anyone] for name, values in each.items()} for each in (read, said))

    everyone = np.ones(len(whose), bool)

    pairs: list[Pair] = [*combinations(readers, 2), *((MODEL, reader) for reader in readers)]
    both = {pair: read[pair[0]] & read[pair[1]] for pair in pairs}
    cells = {pair: _cells(said[pair[0]], said[pair[1]], both[pair], task) for pair in pairs}

    def kappas(pair: Pair, weights: np.ndarray) -> np.ndarray:
        """`[draws, tables]`: one table of all classes, or one of yes and no for each class."""
        tables = np.einsum("dn,ntc->dtc", weights, cells[pair], optimize=True)
        size = len(classes) if task == "multiclass" else 2
        return metrics.cohen_kappa(tables.reshape(*tables.shape[:2], size, size), quadratic=quadratic)

    # Kappa is undefined where two have nothing in common, or both say the same of all: such pairs are left out of
    # means, and such classes for every pair, so that all means are over the same ones.
    defined = {pair: ~np.isnan(kappas(pair, np.ones((1, len(whose))))[0]) for pair in pairs}
    counted = np.all([d for d in defined.values() if d.any()] or [np.zeros(1, bool)], axis=0)
    others = {r: [s for s in readers if s != r and defined[_pair(r, s)].any()] for r in readers}
    with_model = [r for r in readers if defined[MODEL, r].any()]

    def shared(reader: str) -> list[str]:
        """The other readers that both this one and the model can be held against."""
        return [other for other in others[reader] if other in with_model]

    def nothing(weights: np.ndarray) -> np.ndarray:
        return np.full(len(weights), np.nan)

    def statistic(weights: np.ndarray) -> dict[tuple[Any, ...], np.ndarray]:
        found: dict[tuple[Any, ...], np.ndarray] = {}
        for pair in pairs:
            each = kappas(pair, weights)
            if task == "multilabel":
                found |= {("pair", pair, c): each[:, c] for c in range(len(classes))}
            found["pair", pair] = each[:, counted].mean(1) if defined[pair].any() else nothing(weights)

        def mean(one: str, with_whom: Sequence[str]) -> np.ndarray:
            values = [found["pair", _pair(one, other)] for other in with_whom]
            return np.mean(values or [nothing(weights)], axis=0)

        found["mean", MODEL] = mean(MODEL, with_model)
        for reader in readers:
            found["mean", reader] = mean(reader, others[reader])
            found["difference", reader] = mean(MODEL, shared(reader)) - mean(reader, shared(reader))
        apart = [reader for reader in readers if shared(reader)]
        found["apart",] = np.mean([found["difference", reader] for reader in apart] or [nothing(weights)], axis=0)
        return found

    used: dict[tuple[Any, ...], np.ndarray] = {("mean", MODEL): everyone}
    for pair in pairs:
        used |= {("pair", pair, c): both[pair] for c in range(len(classes))} | {("pair", pair): both[pair]}
    for reader in readers:
        used["mean", reader] = np.any([both[_pair(reader, other)] for other in others[reader]] or [~everyone], axis=0)
        used["difference", reader] = used["mean", reader]
    estimates = bootstrap(statistic, whose, replicates=replicates, seed=seed, level=level, used=used)
    if task == "multilabel" and (left_out := [name for name, c in zip(classes, counted, strict=True) if not c]):
        note = f"without {', '.join(left_out)}: said, or not said, of all"
        for key, e in estimates.items():
            if key[0] != "pair" or len(key) == 2:
                estimates[key] = replace(e, note="; ".join(filter(None, [e.note, note])))

    def pair_json(pair: Pair) -> dict[str, Any]:
        by_class = {classes[c]: e for c in range(len(classes)) if (e := estimates.get(("pair", pair, c))) is not None}
        return {
            "kappa": estimates["pair", pair].to_json(),
            "classes": {name: estimate.to_json() for name, estimate in by_class.items()},
        }

    return {
        "unit": unit,
        "task": task,
        "weights": "quadratic" if quadratic else "none",
        "level": level,
        "replicates": replicates,
        "seed": seed,
        "n": {
            "items": int(anyone.sum()),
            "patients": len(np.unique(whose)),
            "left_out": int(table[unit].nunique() - anyone.sum()),
        },
        "readers": {reader: int(read[reader].sum()) for reader in readers},
        "between": [{"readers": list(pair), **pair_json(pair)} for pair in pairs if MODEL not in pair],
        "model": [{"reader": reader, **pair_json((MODEL, reader))} for reader in readers],
        "position": {
            "model": estimates["mean", MODEL].to_json(),
            "readers": [
                {
                    "reader": reader,
                    "kappa": estimates["mean", reader].to_json(),
                    "difference": estimates["difference", reader].to_json(),
                }
                for reader in readers
            ],
            "text": _in_words(estimates, readers),
        },
        "model_minus_readers": estimates["apart",].to_json(),
    }


_UNITS = {"film": "films", "study": "studies"}


def _pair(one: str, other: str) -> Pair:
    """The order in which a pair is kept: the model first, readers by name."""
    return (one, other) if one < other else (other, one)


def _decisions(
    items: np.ndarray,
    patients: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    task: Task,
    thresholds: Sequence[float] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct items in rising order `[m]`, whose they are, and the model's decision bool `[m, classes]`."""
    calibration.check_task(task)
    p, _ = metrics.check_predictions(probabilities, np.zeros(np.shape(probabilities)), classes)
    items = np.asarray(items)
    if items.shape != (len(p),) or patients.shape != (len(p),):
        raise metrics.MetricError(
            f"Films, studies and patients must be [{len(p)}]. Received: {items.shape} and {patients.shape}."
        )
    keys, first, codes = np.unique(items, return_index=True, return_inverse=True)
    mean = np.stack([np.bincount(codes, weights=column) for column in p.T], 1) / np.bincount(codes)[:, None]
    if task == "multiclass":
        return keys, patients[first], np.eye(len(classes), dtype=bool)[mean.argmax(1)]
    cuts = np.asarray(thresholds, np.float64)
    if cuts.shape != (len(classes),):
        raise metrics.MetricError(
            f"There must be one threshold a class ({len(classes)}). Received: shape {cuts.shape}."
        )
    return keys, patients[first], mean >= cuts


def _cells(one: np.ndarray, other: np.ndarray, both: np.ndarray, task: Task) -> np.ndarray:
    """What each item adds to the tables of agreement: float64 `[n, tables, cells]`, nothing unless both read it."""
    if task == "multiclass":
        size = one.shape[1]
        cell = (one.argmax(1) * size + other.argmax(1))[:, None]
    else:
        size = 2
        cell = one.astype(int) * 2 + other
    return np.eye(size * size)[cell] * both[:, None, None]


def _in_words(estimates: dict[tuple[Any, ...], Estimate], readers: Sequence[str]) -> str:
    """Where the model lies among the readers."""
    model = estimates["mean", MODEL]
    means = [e.value for reader in readers if (e := estimates["mean", reader]).value is not None]
    if model.value is None:
        return "The model's agreement with the readers is not measurable."
    text = f"The model's mean kappa with {_count(len(readers), 'reader')} is {model}."
    if not means:
        return f"{text} Readers cannot be compared with each other, so where it lies among them cannot be said."
    text += f" The readers' with each other {_span(means)}; the model's lies above {_of(model.value, means)}."
    differences = [estimates["difference", reader] for reader in readers]
    less = sum(e.high is not None and e.high < 0 for e in differences)
    more = sum(e.low is not None and e.low > 0 for e in differences)
    unsure = len(readers) - less - more
    return (
        f"{text} Held against the same others, it is clearly below {less} of the readers and clearly above {more}; for "
        f"{unsure} the interval does not tell."
    )


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _span(means: Sequence[float]) -> str:
    low, high = min(means), max(means)
    return f"is {low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"lie between {low:.3f} and {high:.3f}"


def _of(value: float, means: Sequence[float]) -> str:
    return f"{sum(value > mean for mean in means)} of {len(means)}"
