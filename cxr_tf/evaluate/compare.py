"""Several runs on the same test films: figures, and what each differs in from the first, as tables for a paper.

    {"task", "classes", "level", "replicates", "seed", "data_hash", "n": {"images", "patients"}, "first",
     "runs": [{"name", "started_from",
               "training": {"films", "patients", "labeled_films", "labeled_patients"},
               "macro":    {figure: {"value": Estimate, "difference": Estimate | null}},
               "classes":  {class: {figure: {"value": Estimate, "difference": Estimate | null}}}}]}

Figures are `auroc` and `average_precision`, also of each class, `ece` (as in `cxr_tf.evaluate.judge`), and `dice` where
a run segments; what a run does not have, it lacks here. A difference is the run less the first one, on the same draws
of patients, so that what makes a film hard for all runs cancels out; Dice is compared on films that both have it for.
The first run has none.

What a run started from (`model.weights`) and how many training films and patients had labels stand beside it: with runs
that differ in one of the two, this is the table of initialization or of label efficiency. Each run is one training: the
intervals are about other patients, not about other seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cxr_tf.config import Experiment
from cxr_tf.data.manifest import LABEL, labels
from cxr_tf.errors import CxrError
from cxr_tf.evaluate import metrics
from cxr_tf.evaluate.bootstrap import Estimate, bootstrap
from cxr_tf.evaluate.calibration import calibration_error_of
from cxr_tf.evaluate.metrics import Ranked
from cxr_tf.evaluate.subgroups import Statistic
from cxr_tf.files import replacing
from cxr_tf.run import Run, write_json, write_text

_PROBABILITY = "probability:"
_NAMES = {"auroc": "AUROC", "average_precision": "AP", "ece": "ECE", "dice": "Dice"}
_MACRO = -1  # stands where a class number would

Key = tuple[int, int, str]  # run, class or _MACRO, figure


class ComparisonError(CxrError):
    """Runs that cannot be compared film by film; the text says which differ, and in what."""


def compare(runs: Sequence[Run[Experiment]], *, level: float = 0.95) -> dict[str, Any]:
    """Compares evaluated runs on the test films that they share.

    Replicates and seed of the bootstrap are those of the first run's experiment.

    Args:
        runs: two or more, evaluated; the others are compared with the first.
        level: of the intervals, of each by itself.

    Returns:
        The dict that the module's text describes; `json.dumps` takes it.

    Raises:
        ComparisonError: for fewer than two runs, one that is given twice or is not evaluated, or runs whose test films,
            data, classes or labels differ; all that do are named.
        RunError: for a run that is not finished or is damaged.

    Example:
        >>> found = compare([open_run(Path(f"runs/{name}")) for name in ("random", "moco")])  # doctest: +SKIP
        >>> found["runs"][1]["macro"]["auroc"]["difference"]["low"]  # doctest: +SKIP
        0.012
    """
    folders = [run.folder.resolve() for run in runs]
    if len(runs) < 2 or len(set(folders)) < len(runs):
        raise ComparisonError(
            "Give two or more runs, each once. Received: "
            + (", ".join(str(run.folder) for run in runs) or "none")
            + "."
        )
    evaluated = _evaluated(runs)
    _check_same(evaluated)
    first = evaluated[0]
    classes, task = first.metrics["classes"], first.metrics["task"]
    patients = first.films["patient_key"].to_numpy()
    y = first.films[[LABEL + name for name in classes]].to_numpy(np.float64)
    if task == "multiclass":
        y = np.where((metrics.one_hot_rows(y) < 0)[:, None], np.nan, y)
    judged = [int(c) for c in np.flatnonzero(metrics.both_outcomes(y))]
    statistics, used = _statistics(evaluated, y, judged, classes, task)
    dices: dict[int, tuple[Statistic, Statistic]] = {}  # of a run and the first, of the films that both have it for
    for run, each in enumerate(evaluated[1:], start=1):
        if each.dice is not None and first.dice is not None:
            both = ~np.isnan(each.dice) & ~np.isnan(first.dice)
            dices[run] = _mean_of(each.dice, both), _mean_of(first.dice, both)
            used["difference", (run, _MACRO, "dice")] = both

    def statistic(weights: np.ndarray) -> dict[tuple[str, Key], np.ndarray]:
        values: dict[Key, np.ndarray] = {key: figure(weights) for key, figure in statistics.items()}
        for run in range(len(evaluated)):
            for figure in ("auroc", "average_precision"):
                if judged and (run, judged[0], figure) in values:
                    values[run, _MACRO, figure] = np.mean([values[run, c, figure] for c in judged], axis=0)
        found = {("value", key): value for key, value in values.items()}
        for (run, c, figure), value in values.items():
            if run and figure != "dice" and (0, c, figure) in values:
                found["difference", (run, c, figure)] = value - values[0, c, figure]
        for run, (one, other) in dices.items():
            found["difference", (run, _MACRO, "dice")] = one(weights) - other(weights)
        return found

    evaluation = first.run.experiment.evaluate
    draws: dict[str, Any] = {"replicates": evaluation.replicates, "seed": first.run.experiment.seed, "level": level}
    estimates = bootstrap(statistic, patients, used=used, **draws)
    left_out = [name for c, name in enumerate(classes) if c not in judged]

    def entry(key: Key) -> dict[str, Any]:
        made: dict[str, Any] = {"value": None, "difference": None}
        for what in made:
            if (estimate := estimates.get((what, key))) is not None:
                made[what] = _noted(estimate, left_out if key[1:] in _MEANS else []).to_json()
        return made

    return {
        "task": task,
        "classes": classes,
        **draws,
        "data_hash": first.run.data_hash(),
        "n": {"images": len(y), "patients": len(np.unique(patients))},
        "first": first.name,
        "runs": [
            {
                "name": each.name,
                "started_from": _started_from(each.run),
                "training": _training(each.run, classes),
                "macro": {f: entry((i, _MACRO, f)) for f in _NAMES if ("value", (i, _MACRO, f)) in estimates},
                "classes": {
                    classes[c]: {f: entry((i, c, f)) for f in _NAMES if ("value", (i, c, f)) in estimates}
                    for c in judged
                },
            }
            for i, each in enumerate(evaluated)
        ],
    }


_MEANS = ((_MACRO, "auroc"), (_MACRO, "average_precision"))  # figures that are means over classes


class _Evaluated(NamedTuple):
    """A run and what `cxr-tf evaluate` wrote of it, films in rising order of their key."""

    run: Run[Experiment]
    name: str
    films: pd.DataFrame
    metrics: dict[str, Any]

    @property
    def probabilities(self) -> np.ndarray | None:
        """`[n, classes]`; None for a run that only segments."""
        columns = [_PROBABILITY + name for name in self.metrics["classes"]]
        return self.films[columns].to_numpy(np.float64) if set(columns) <= set(self.films.columns) else None

    @property
    def dice(self) -> np.ndarray | None:
        """`[n]`; None for a run that only classifies."""
        return self.films["dice"].to_numpy(np.float64) if "dice" in self.films.columns else None


def _evaluated(runs: Sequence[Run[Experiment]]) -> list[_Evaluated]:
    """Reads what `evaluate` wrote of each run; all that is missing is said at once."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    found, problems = [], []
    for run, name in zip(runs, names, strict=True):
        run.operating()  # is it finished?
        folder = run.folder / "evaluation"
        again = f"`cxr-tf evaluate {run.folder}` writes it"
        if not (folder / "metrics.json").is_file() or not (folder / "predictions.csv").is_file():
            problems.append(f"{run.folder}: there is no evaluation yet; {again}.")
            continue
        try:
            judged = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            films = pd.read_csv(folder / "predictions.csv", index_col="film").sort_index()
            whole = (
                {"patient_key", *(LABEL + c for c in judged["classes"])} <= set(films.columns)
                and films.index.is_unique
                and judged["n"]["images"] == len(films)
                and judged["task"] in ("multiclass", "multilabel")
            )
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            found.append(_Evaluated(run, name, films, judged))
        else:
            problems.append(f"{folder}: is damaged, or of another version; {again} again.")
    if problems:
        raise ComparisonError("\n  ".join(["These runs cannot be compared as they are:", *problems]))
    return found


def _check_same(evaluated: Sequence[_Evaluated]) -> None:
    """The same films of the same data, with the same labels, as in the first run."""
    first = evaluated[0]
    problems = []
    for each in evaluated[1:]:
        hashes = [one.run.data_hash() or "unknown" for one in (each, first)]
        lacking, further = (
            first.films.index.difference(each.films.index),
            each.films.index.difference(first.films.index),
        )
        if hashes[0] != hashes[1]:
            problems.append(f"{each.name}: other data: checksum {hashes[0][:12]}, not {hashes[1][:12]}")
        elif each.metrics["classes"] != first.metrics["classes"] or each.metrics["task"] != first.metrics["task"]:
            told = [f"{one.metrics['task']} of {', '.join(one.metrics['classes'])}" for one in (each, first)]
            problems.append(f"{each.name}: other classes: {told[0]}; not {told[1]}")
        elif len(lacking) or len(further):
            problems.append(
                f"{each.name}: other test films: it lacks {len(lacking):,} of the {len(first.films):,}, and has "
                f"{len(further):,} others"
            )
        else:
            columns = ["patient_key", *(LABEL + name for name in first.metrics["classes"])]
            one, other = (run.films[columns].to_numpy(np.float64) for run in (each, first))
            different = int((~((one == other) | (np.isnan(one) & np.isnan(other))).all(1)).sum())
            if different:
                problems.append(f"{each.name}: other labels or patients of {different:,} test films")
    if problems:
        raise ComparisonError(
            f"Runs are compared on the same test films. From {first.name} differ:\n  "
            + "\n  ".join(problems)
            + "\nGive runs of the same shards with the same [data] classes, filters and split, and evaluate them again."
        )


def _statistics(
    evaluated: Sequence[_Evaluated], y: np.ndarray, judged: Sequence[int], classes: Sequence[str], task: Any
) -> tuple[dict[Key, Statistic], dict[tuple[str, Key], np.ndarray]]:
    """Figures of each run as functions of weights, and the films that each is over."""
    known = ~np.isnan(y)
    labeled = known.all(1) if task == "multiclass" else known.any(1)
    statistics: dict[Key, Statistic] = {}
    used: dict[tuple[str, Key], np.ndarray] = {}
    for run, each in enumerate(evaluated):
        if (p := each.probabilities) is not None:
            p, _ = metrics.check_predictions(p, y, classes)
            for c in judged:
                ranked = Ranked(p[:, c], y[:, c])
                statistics[run, c, "auroc"] = _ranking(ranked, metrics.auroc_of)
                statistics[run, c, "average_precision"] = _ranking(ranked, metrics.average_precision_of)
            statistics[run, _MACRO, "ece"] = calibration_error_of(p, y, task)
        if (dice := each.dice) is not None:
            statistics[run, _MACRO, "dice"] = _mean_of(dice, ~np.isnan(dice))
        for what in ("value", "difference"):
            for figure in ("auroc", "average_precision"):
                used |= {(what, (run, c, figure)): known[:, c] for c in judged}
                used[what, (run, _MACRO, figure)] = known[:, judged].any(1)
            used[what, (run, _MACRO, "ece")] = labeled
        if dice is not None:
            used["value", (run, _MACRO, "dice")] = ~np.isnan(dice)
    return statistics, used


def _ranking(ranked: Ranked, figure: Any) -> Statistic:
    return lambda weights: figure(*ranked.counts(weights))


def _mean_of(values: np.ndarray, films: np.ndarray) -> Statistic:
    filled, counted = np.where(films, values, 0), films.astype(np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        total = weights @ counted
        return np.where(total > 0, metrics.ratio(weights @ filled, total), np.nan)

    return statistic


def _noted(estimate: Estimate, left_out: Sequence[str]) -> Estimate:
    note = f"without {', '.join(left_out)}: one outcome only" if left_out else ""
    return replace(estimate, note="; ".join(filter(None, [estimate.note, note])))


def _started_from(run: Run[Experiment]) -> str:
    """What the encoder's weights were before training, in a few words and without a path."""
    weights = run.experiment.model.weights
    if weights is None:
        words = "random weights"
    elif weights == "imagenet":
        words = "ImageNet"
    else:
        words = Path(weights).parent.name or Path(weights).stem  # runs/siim-moco/encoder.keras: the run that made it
    return f"{words}, frozen" if run.experiment.train.freeze_encoder else words


def _training(run: Run[Experiment], classes: Sequence[str]) -> dict[str, int | None]:
    """How many films and patients trained; of how many the label was known where the shards are there to tell."""
    parts = run.parts()
    parts = parts[parts["part"] == "train"]
    made: dict[str, int | None] = {"films": len(parts), "patients": int(parts["patient_key"].nunique())}
    made |= {"labeled_films": None, "labeled_patients": None}
    with suppress(CxrError, KeyError):  # shards that have moved, or are other data by now
        films = run.shards().manifest.loc[parts.index]
        if run.experiment.model.classification:
            known = ~np.isnan(labels(films, classes))
            labeled = known.all(1) if run.experiment.data.task == "multiclass" else known.any(1)
        else:
            labeled = films["mask_known"].to_numpy(bool)
        made["labeled_films"] = int(labeled.sum())
        made["labeled_patients"] = int(parts["patient_key"][labeled].nunique())
    return made


# --- tables -----------------------------------------------------------------------------------------------------------


def write_comparison(found: dict[str, Any], out: Path) -> None:
    """Writes `comparison.json`, `comparison.csv` (a row a figure) and `comparison.tex` (needs booktabs).

    Args:
        found: from `compare`.
        out: folder; made if it is not there.

    Raises:
        WriteError: when it cannot be written.
    """
    write_json(out / "comparison.json", found)
    with replacing(out / "comparison.csv") as temporary:
        pd.DataFrame(_rows(found)).to_csv(temporary, index=False)
    write_text(out / "comparison.tex", latex(found))


def _rows(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for run in found["runs"]:
        about = {"run": run["name"], "started_from": run["started_from"]}
        about |= {f"training_{name}": count for name, count in run["training"].items()}
        for name, figures in (("", run["macro"]), *run["classes"].items()):
            for figure, pair in figures.items():
                value, difference = pair["value"], pair["difference"] or {}
                yield {
                    **about,
                    "class": name,  # blank: over all
                    "figure": figure,
                    **{end: value[end] for end in ("value", "low", "high")},
                    "difference": difference.get("value"),
                    "difference_low": difference.get("low"),
                    "difference_high": difference.get("high"),
                    "images": value["n"],
                    "patients": value["patients"],
                    "note": value["note"],
                }


def summary(found: dict[str, Any]) -> str:
    """A few lines for the terminal: each run's macro figures and its differences from the first."""
    lines = [
        f"{found['n']['images']:,} films of {found['n']['patients']:,} patients; {100 * found['level']:g} % intervals "
        f"over patients; differences from {found['first']}, each a training of one seed"
    ]
    for run in found["runs"]:
        films, patients = _trained_on(run, _knows_labels(run))
        of = f"{films:,} {'labeled ' if _knows_labels(run) else ''}films of {patients:,} patients"
        lines.append(f"{run['name']}: from {run['started_from']}, {of}")
        for figure, pair in run["macro"].items():
            against = f"   difference {_figure(pair['difference'], sign='+')}" if pair["difference"] else ""
            lines.append(f"  {_NAMES[figure]:6} {_figure(pair['value'])}{against}")
    return "\n".join(lines)


def latex(found: dict[str, Any]) -> str:
    """Two tables for a paper: macro figures with differences, and figures of each class."""
    figures = [f for f in _NAMES if any(f in run["macro"] for run in found["runs"])]
    labeled = all(_knows_labels(run) for run in found["runs"])
    rows = []
    for run in found["runs"]:
        values = [_cell(run["macro"].get(f, {}).get("value")) for f in figures]
        films, patients = _trained_on(run, labeled)
        rows.append([_escaped(run["name"]), _escaped(run["started_from"]), f"{films:,} ({patients:,})", *values])
        if run["name"] != found["first"]:
            differences = [_cell(run["macro"].get(f, {}).get("difference"), sign="+") for f in figures]
            rows.append([r"\quad difference", "", "", *differences])
    about = (
        f"the same {found['n']['images']:,} test films of {found['n']['patients']:,} patients; "
        rf"{100 * found['level']:g}\,\% intervals (bootstrap over patients, {found['replicates']:,} draws)"
    )
    first = _escaped(found["first"])
    tables = [
        _table(
            rf"Runs on {about}. Differences are from {first}, on the same draws, each with its own interval; each run "
            "is a training of one seed.",
            [
                "Run",
                "Started from",
                f"{'Labeled' if labeled else 'Training'} films (patients)",
                *(_NAMES[f] for f in figures),
            ],
            rows,
        )
    ]
    by_class = [
        [_NAMES[figure] if i == 0 else "", _escaped(name), *(_cell(_value(run, name, figure)) for run in found["runs"])]
        for figure in ("auroc", "average_precision")
        for i, name in enumerate(found["runs"][0]["classes"])
        if any(_value(run, name, figure) for run in found["runs"])
    ]
    if by_class:
        heads = ["", "Class", *(_escaped(run["name"]) for run in found["runs"])]
        tables.append(_table(rf"Figures of each class on {about}.", heads, by_class))
    return "% Made by cxr-tf compare. Needs \\usepackage{booktabs}.\n" + "\n".join(tables)


def _value(run: dict[str, Any], name: str, figure: str) -> dict[str, Any] | None:
    return run["classes"].get(name, {}).get(figure, {}).get("value")


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{'l' * len(heads)}}}"]
    lines += [r"\toprule", " & ".join(heads) + r" \\", r"\midrule"]
    lines += [" & ".join(row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _knows_labels(run: dict[str, Any]) -> bool:
    return run["training"]["labeled_films"] is not None


def _trained_on(run: dict[str, Any], labeled: bool) -> tuple[int, int]:
    """How many films and patients trained, or those with labels alone."""
    kind = "labeled_" if labeled else ""
    return run["training"][f"{kind}films"], run["training"][f"{kind}patients"]


def _figure(estimate: dict[str, Any] | None, sign: str = "") -> str:
    if estimate is None or estimate["value"] is None:
        return "not measurable"
    if estimate["low"] is None:
        return f"{estimate['value']:{sign}.3f} (interval not measurable)"
    return f"{estimate['value']:{sign}.3f} ({estimate['low']:{sign}.3f} to {estimate['high']:{sign}.3f})"


def _cell(estimate: dict[str, Any] | None, sign: str = "") -> str:
    if estimate is None or estimate["value"] is None:
        return "--"
    told = f"{estimate['value']:{sign}.3f}" if estimate["low"] is None else _figure(estimate, sign)
    return told.replace("-", "$-$")


_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_SPECIAL |= {character: "\\" + character for character in "&%$#_{}"}


def _escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_SPECIAL.get(character, character) for character in text)
