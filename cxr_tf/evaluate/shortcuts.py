"""Shortcuts: does a model's skill come from the lungs, or from what happens to go with the disease?

A letter in a corner, the source of a film, its brightness and its framing can tell a class without any disease being
seen (Zech et al., PLOS Medicine 2018; DeGrave et al., Nature Machine Intelligence 2021). Four looks at that, each a
JSON-ready dict in which Estimate is what `cxr_tf.evaluate.bootstrap.Estimate.to_json` gives:

    blanking            {"fill", "lungs", "lungs_blanked": {"auroc", "auroc_blanked", "kept"},
                         "all_but_lungs_blanked": the same, "borders_blanked": the same}
    thumbnail_baseline  {"side", "fitted_on", "auroc", "model", "difference"}
    source_classifier   {"auroc", "sources": {source: {"films", "patients", "auroc"}}, "left_out": [source]}
    by_source           {"trained_on": [source], "tested": {source: Estimate},
                         "unseen_source": {"auroc", "difference", "sources": {source: {"auroc", "difference"}},
                                           "left_out": [source]}}

"auroc" and its kin are Estimates of the macro AUROC over films, classes with one outcome left out (the note names
them). `kept` is the part of the skill that is left when something is blanked, (AUROC blanked - .5) / (AUROC - .5): 1 if
the model never looked there, 0 if it looked nowhere else, and below 0 if what is left misleads it. What cannot be told
is null, and its note says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr_tf.data.manifest import labels, rows_where
from cxr_tf.data.pipeline import batches, read_batches
from cxr_tf.data.shards import ShardFolder
from cxr_tf.evaluate.bootstrap import Estimate, bootstrap
from cxr_tf.evaluate.calibration import Task, probabilities_of
from cxr_tf.evaluate.inference import Change, Films, predict_changed
from cxr_tf.evaluate.lungs import Lungs, dilated
from cxr_tf.evaluate.metrics import Ranked, auroc_of, both_outcomes
from cxr_tf.evaluate.paired import paired_auroc
from cxr_tf.models.multitask import MultiTask
from cxr_tf.pretrain.features import features, reader, thumbnails
from cxr_tf.progress import Update, silent

BORDER = 1 / 6  # of a film's height and width, on each of its four sides
SIDE = 8  # of a thumbnail
FOLDS = 5
LEAST = 5  # patients with an outcome: with fewer, many draws of patients have none

BLANKED = ("lungs_blanked", "all_but_lungs_blanked", "borders_blanked")


# --- blanking -------------------------------------------------------------------------------------------------------


def mean_intensity(shards: ShardFolder, keys: np.ndarray, *, size: int, batch_size: int) -> float:
    """The mean intensity of films, padding aside, 0-255: what is blanked is filled with that of the training films.

    Args:
        shards: where the films are.
        keys: integer `[n]`, which films.
        size: side of the model's input; the mean hardly depends on it, the time does.
        batch_size: films at a time.
    """
    total, pixels = 0.0, 0
    dataset = batches(shards, keys, size=size, batch_size=batch_size, shuffle=False, content_boxes=True)
    for images, truth in read_batches(dataset):
        total += float(images.numpy().sum(dtype=np.float64))  # padding is 0
        pixels += int(truth["content_box"].numpy()[:, 2:].prod(axis=1).sum())
    return total / pixels


def blanks(fill: float, lungs: Lungs | None = None) -> dict[str, Change]:
    """The changes that blank a part of a film: for `predict_changed`, and for showing what the model was shown.

    Args:
        fill: the intensity that takes the place of what was there, 0-255.
        lungs: of the same films in the same order; without it there are no changes that need lungs.

    Returns:
        - "lungs_blanked": the lung mask, grown by 5 % of the side, is filled;
        - "all_but_lungs_blanked": everything else is, the padding too, whose shape is that of the film;
        - "borders_blanked": a sixth of the film on each side and the padding are filled, but for the grown lung mask
          where it is known: lungs that reach into the border are no shortcut. That covers what is written into corners,
          and the frame of the film.

        A film whose lungs are not known stays as it is under the first, and becomes blank under the second.
    """
    if lungs is None:
        return {"borders_blanked": lambda films: np.where(_middle(films.content), films.images, np.float32(fill))}
    grown = dilated(lungs.masks)[..., None]

    def borders(films: Films) -> np.ndarray:
        return np.where(_middle(films.content) | grown[films.rows], films.images, np.float32(fill))

    return {
        "lungs_blanked": lambda films: np.where(grown[films.rows], np.float32(fill), films.images),
        "all_but_lungs_blanked": lambda films: np.where(grown[films.rows], films.images, np.float32(fill)),
        "borders_blanked": borders,
    }


def _middle(content: np.ndarray) -> np.ndarray:
    """Where films lie, bool `[n, size, size, 1]` -> what is left of them without their borders, the same shape."""

    def inner(line: np.ndarray) -> np.ndarray:
        place, length = np.cumsum(line, axis=1) - 1, line.sum(axis=1, keepdims=True)
        border = np.ceil(BORDER * length)
        return line & (place >= border) & (place < length - border)

    rows, columns = inner(np.any(content, axis=(2, 3))), inner(np.any(content, axis=(1, 3)))
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def blanking(
    model: MultiTask,
    shards: ShardFolder,
    keys: np.ndarray,
    probabilities: np.ndarray,
    operating: Mapping[str, Any],
    *,
    fill: float,
    lungs: Lungs | None = None,
    batch_size: int = 32,
    replicates: int = 1000,
    seed: int = 0,
    update: Update = silent,
) -> dict[str, Any]:
    """How much of its skill a model keeps when lungs, everything else, or borders and corners are blanked.

    Args:
        model: with the output "logits".
        shards: where the films are.
        keys: integer `[n]`, test films.
        probabilities: `[n, classes]`, what the model says of them as they are.
        operating: the run's `operating.json`: classes, task, size, temperature.
        fill: `mean_intensity` of the training films.
        lungs: of the films, from `lung_masks` at the model's size. What needs lungs is measured on the films where they
            are known, with and without blanking; not at all without this.
        batch_size: films at a time.
        replicates: draws of patients; the AUROC of before and after are over the same draws.
        seed: of the draws.
        update: shows progress.

    Returns:
        The dict that the module's text describes; "lungs" is the kind of the masks, or None. `kept` is not measurable
        where the interval of the AUROC reaches .5: there is no skill then that could be kept.

    Example:
        >>> found = blanking(model, shards, keys, said, operating, fill=118.2, lungs=lungs)  # doctest: +SKIP
        >>> found["lungs_blanked"]["kept"]["value"]  # doctest: +SKIP
        0.71
    """
    names, task, draws = operating["classes"], operating["task"], {"replicates": replicates, "seed": seed}
    changes = blanks(fill, lungs)
    said = predict_changed(
        model,
        shards,
        keys,
        changes,
        classes=names,
        size=operating["size"],
        batch_size=batch_size,
        update=update,
    )
    y, patients = _truth(shards, keys, names, task)
    result: dict[str, Any] = {"fill": fill, "lungs": None if lungs is None else lungs.kind}
    for name in BLANKED:
        if name not in said:
            result[name] = _all_missing(("auroc", "auroc_blanked", "kept"), "no lung masks were given")
            continue
        after = probabilities_of(said[name], task, operating["temperature"])
        films = np.ones(len(y), bool) if name == "borders_blanked" or lungs is None else lungs.known
        if not films.any():
            result[name] = _all_missing(
                ("auroc", "auroc_blanked", "kept"), "the lungs of none of these films are known"
            )
            continue
        result[name] = _kept(probabilities[films], after[films], y[films], patients[films], names, draws)
    return result


def _kept(
    before: np.ndarray,
    after: np.ndarray,
    y: np.ndarray,
    patients: np.ndarray,
    classes: Sequence[str],
    draws: Mapping[str, int],
) -> dict[str, Any]:
    """AUROC before and after, and the part of the skill that is kept, on the same draws of patients."""
    judged = both_outcomes(y)
    whole, blanked = _macro_auroc(before, y, judged), _macro_auroc(after, y, judged)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        a, b = whole(weights), blanked(weights)
        kept = np.divide(b - 0.5, a - 0.5, out=np.full(len(a), np.nan), where=a > 0.5)
        return {"auroc": a, "auroc_blanked": b, "kept": kept}

    used = _known(y, judged)
    found = bootstrap(statistic, patients, used=dict.fromkeys(("auroc", "auroc_blanked", "kept"), used), **draws)
    skill = found["auroc"].low
    if skill is None or skill <= 0.5:
        why = "has no interval" if skill is None else "has an interval that reaches .5, so there is no skill to keep"
        note = f"not measurable: the AUROC of the films as they are {why}"
        found["kept"] = replace(found["kept"], value=None, low=None, high=None, note=note)
    return {name: _noted(estimate, classes, judged).to_json() for name, estimate in found.items()}


# --- thumbnails -----------------------------------------------------------------------------------------------------


def thumbnail_probabilities(
    shards: ShardFolder, parts: pd.DataFrame, classes: Sequence[str], task: Task, side: int = SIDE
) -> np.ndarray:
    """What logistic regression on thumbnails says of test films: brightness and framing, and no more.

    Args:
        shards: where the films are.
        parts: a run's `parts()`. Training and validation films fit it, for there is nothing to choose.
        classes: which, in which order.
        task: "multiclass": one regression; "multilabel": one a class.
        side: of the thumbnails, in pixels.

    Returns:
        float64 `[test films, classes]`, 0-1, in the order of `parts`; .5 for what the films cannot teach.
    """
    keys, test = parts.index.to_numpy(), (parts["part"] == "test").to_numpy()
    x = thumbnails(shards, keys, size=side)
    y, _ = _truth(shards, keys, classes, task)
    return _regressed(x[~test], y[~test], x[test], task)


def thumbnail_baseline(
    shards: ShardFolder,
    parts: pd.DataFrame,
    probabilities: np.ndarray,
    operating: Mapping[str, Any],
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The macro AUROC of logistic regression on 8 x 8 thumbnails, and how far the model is above it.

    It decides nothing. A model that is not above it may still read lungs, and one that is may not; but where the
    thumbnails do well, the model's AUROC alone is no evidence that it reads films.

    Args:
        shards: where the films are.
        parts: the run's `parts()`.
        probabilities: `[test films, classes]`, what the model says of the test films, in the order of `parts`.
        operating: the run's `operating.json`: classes, task.
        replicates: draws of patients.
        seed: of the draws.

    Returns:
        The dict that the module's text describes: "auroc" of the thumbnails, that of the "model" on the same films, and
        the "difference" model - thumbnails, on the same draws of patients.
    """
    classes, task = operating["classes"], operating["task"]
    test = (parts["part"] == "test").to_numpy()
    y, patients = _truth(shards, parts.index.to_numpy()[test], classes, task)
    judged = both_outcomes(y)
    result: dict[str, Any] = {"side": SIDE, "fitted_on": int((~test).sum())}
    if not judged.any():
        return result | _all_missing(("auroc", "model", "difference"), "no class has both outcomes")
    said = thumbnail_probabilities(shards, parts, classes, task)
    known = _known(y, judged)
    aurocs, differences = paired_auroc(
        {name: p[known][:, judged][None] for name, p in {"thumbnails": said, "model": probabilities}.items()},
        y[known][:, judged],
        patients[known],
        against="thumbnails",
        replicates=replicates,
        seed=seed,
    )
    found = {"auroc": aurocs["thumbnails"], "model": aurocs["model"], "difference": differences["model"]}
    return result | {name: _noted(estimate, classes, judged).to_json() for name, estimate in found.items()}


# --- sources --------------------------------------------------------------------------------------------------------


def source_classifier(
    model: MultiTask,
    shards: ShardFolder,
    keys: np.ndarray,
    operating: Mapping[str, Any],
    *,
    batch_size: int = 32,
    replicates: int = 1000,
    seed: int = 0,
    update: Update = silent,
) -> dict[str, Any]:
    """How well the source of a film can be read from what the model's classes are read from.

    Logistic regression on the pooled features of the encoder, fitted and judged on films of different patients in five
    folds. At .5 the features do not know where a film is from. Above it they do, which is no fault by itself, but where
    sources differ in their share of disease, a model with such features need not look for the disease.

    Args:
        model: whose encoder is read.
        shards: where the films are.
        keys: integer `[n]`, films of several sources that the model was not trained on.
        operating: the run's `operating.json`: size.
        batch_size: films at a time.
        replicates: draws of patients.
        seed: of the draws.
        update: shows progress.

    Returns:
        The dict that the module's text describes: for each source the AUROC of its films against all others, and their
        mean. Sources of fewer than five patients are left out; with fewer than two others nothing is measurable.
    """
    films = shards.manifest.loc[keys]
    of_source = films.groupby("source")["patient_key"].nunique()
    sources = [str(name) for name in of_source.index[of_source >= LEAST]]
    result: dict[str, Any] = {
        "auroc": _missing("the films are of fewer than two sources with five patients or more").to_json(),
        "sources": {},
        "left_out": [str(name) for name in of_source.index[of_source < LEAST]],
    }
    if len(sources) < 2:
        return result
    kept = films["source"].isin(sources).to_numpy()
    films, keys = films[kept], np.asarray(keys)[kept]
    x = features(reader(model.encoder), shards, keys, size=operating["size"], batch_size=batch_size, update=update)
    y = (films["source"].to_numpy()[:, None] == np.array(sources, object)).astype(np.float64)
    patients = films["patient_key"].to_numpy()
    said = np.zeros(y.shape)
    folds = GroupKFold(min(FOLDS, len(np.unique(patients))))
    for rest, fold in folds.split(x, groups=patients):
        said[fold] = _regressed(x[rest], y[rest], x[fold], "multiclass")
    each = {name: _macro_auroc(said[:, [i]], y[:, [i]], np.ones(1, bool)) for i, name in enumerate(sources)}

    def statistic(weights: np.ndarray) -> dict[int, np.ndarray]:
        values = [one(weights) for one in each.values()]
        return {-1: np.mean(values, axis=0), **dict(enumerate(values))}

    found = bootstrap(statistic, patients, replicates=replicates, seed=seed)
    result["auroc"] = found[-1].to_json()
    for i, name in enumerate(sources):
        result["sources"][name] = {
            "films": int(y[:, i].sum()),
            "patients": int(of_source[name]),
            "auroc": found[i].to_json(),
        }
    return result


def by_source(
    model: MultiTask,
    shards: ShardFolder,
    parts: pd.DataFrame,
    probabilities: np.ndarray,
    operating: Mapping[str, Any],
    *,
    where: Mapping[str, Sequence[Any]] | None = None,
    batch_size: int = 32,
    replicates: int = 1000,
    seed: int = 0,
    update: Update = silent,
) -> dict[str, Any]:
    """The model on test films of each source, and on films from sources that it has not seen.

    Unseen are sources that no training or validation film is from: their test films, if there are any, and else all
    labeled films of the shards that the run did not take. A source counts if for some class five of its patients or
    more have it and five have not.

    Args:
        model: with the output "logits".
        shards: where the films are.
        parts: the run's `parts()`.
        probabilities: `[test films, classes]`, what the model says of the test films, in the order of `parts`.
        operating: the run's `operating.json`: classes, task, size, temperature.
        where: the run's `[data.where]`; films of unseen sources are held to all of it but the source.
        batch_size: films at a time.
        replicates: draws of patients.
        seed: of the draws.
        update: shows progress.

    Returns:
        The dict that the module's text describes. Under "unseen_source", "auroc" is the mean over the unseen sources,
        each judged by itself, so that telling sources apart earns nothing; "difference" is that minus the AUROC on the
        test films of the sources that were trained on, over the same classes. The two sets of films are of different
        patients, and each is drawn anew: the interval is not a paired one.
    """
    classes, task = operating["classes"], operating["task"]
    test = parts.index[parts["part"] == "test"].to_numpy()
    trained = shards.manifest.loc[parts.index[parts["part"] != "test"]]
    trained_on = sorted(map(str, trained["source"].unique()))
    others = _unseen_films(shards, parts, trained, classes, task, where or {})
    keys, said = np.concatenate([test, others]), np.asarray(probabilities, np.float64)
    if len(others):
        logits = predict_changed(
            model,
            shards,
            others,
            {"as they are": lambda films: films.images},
            classes=list(classes),
            size=operating["size"],
            batch_size=batch_size,
            update=update,
        )["as they are"]
        said = np.concatenate([said, probabilities_of(logits, task, operating["temperature"])])
    y, patients = _truth(shards, keys, classes, task)
    source = shards.manifest["source"].loc[keys].to_numpy().astype(str)
    draws = {"replicates": replicates, "seed": seed}
    return {
        "trained_on": trained_on,
        "tested": {
            name: _auroc(said[rows], y[rows], patients[rows], classes, draws)
            for name in sorted(set(source[: len(test)]))
            for rows in [np.flatnonzero(source[: len(test)] == name)]
        },
        "unseen_source": _unseen(said, y, patients, source, trained_on, draws),
    }


def _unseen_films(
    shards: ShardFolder,
    parts: pd.DataFrame,
    trained: pd.DataFrame,
    classes: Sequence[str],
    task: Task,
    where: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    """Keys of labeled films that the run did not take, of sources and patients that it was not trained on."""
    films = shards.manifest
    films = films[rows_where(films, {column: values for column, values in where.items() if column != "source"})]
    films = films[
        ~films["source"].isin(shards.manifest["source"].loc[parts.index])
        & ~films["patient_key"].isin(trained["patient_key"])
    ]
    y = labels(films, classes)
    labeled = y.sum(axis=1) == 1 if task == "multiclass" else ~np.isnan(y).all(axis=1)
    return films.index[labeled].to_numpy()


def _unseen(
    said: np.ndarray,
    y: np.ndarray,
    patients: np.ndarray,
    source: np.ndarray,
    trained_on: Sequence[str],
    draws: Mapping[str, int],
) -> dict[str, Any]:
    """AUROC on each unseen source and their mean, and the differences from that on the sources trained on."""
    seen = np.isin(source, trained_on)
    there = {name: source == name for name in sorted(set(source[~seen]))}
    judged = {name: _enough(y[own], patients[own]) for name, own in there.items()}
    names = [name for name in there if judged[name].any()]
    result: dict[str, Any] = {"sources": {}, "left_out": [name for name in there if name not in names]}
    if not names:
        enough = f"no other source has {LEAST} patients with a class and {LEAST} without"
        why = enough if there else "no labeled film is from another source"
        return _all_missing(("auroc", "difference"), why) | result

    def over(rows: np.ndarray, which: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return _macro_auroc(said, np.where(rows[:, None], y, np.nan), which)

    both = {name: judged[name] & both_outcomes(y[seen]) for name in names}  # what a difference can be over
    unseen = {name: over(there[name], judged[name]) for name in names}
    pairs = {name: (over(there[name], both[name]), over(seen, both[name])) for name in names}

    def statistic(weights: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        values = {("auroc", name): auroc(weights) for name, auroc in unseen.items()}
        values |= {("difference", name): one(weights) - other(weights) for name, (one, other) in pairs.items()}
        means = {(kind, ""): np.mean([values[kind, name] for name in names], axis=0) for kind in kinds}
        return values | means

    kinds = ("auroc", "difference")
    used = {("auroc", name): there[name] & _known(y, judged[name]) for name in names}
    used |= {("difference", name): (there[name] | seen) & _known(y, both[name]) for name in names}
    used |= {(kind, ""): np.any([used[kind, name] for name in names], axis=0) for kind in kinds}
    found = {key: estimate.to_json() for key, estimate in bootstrap(statistic, patients, used=used, **draws).items()}
    result["sources"] = {name: {kind: found[kind, name] for kind in kinds} for name in names}
    return {kind: found[kind, ""] for kind in kinds} | result


def _enough(y: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """The classes that enough patients have, and enough have not: bool `[classes]`."""
    return np.array([min(len(np.unique(patients[column == k])) for k in (0, 1)) >= LEAST for column in y.T], bool)


# --- what all of them need ------------------------------------------------------------------------------------------


def _truth(shards: ShardFolder, keys: np.ndarray, classes: Sequence[str], task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Labels, float64 `[n, classes]`, all NaN where a multi-class film's are not all known; and patients, `[n]`."""
    films = shards.manifest.loc[keys]
    y = labels(films, classes).astype(np.float64)
    if task == "multiclass":
        y[np.isnan(y).any(axis=1)] = np.nan
    return y, films["patient_key"].to_numpy()


def _known(y: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """The films with a known label of a judged class: bool `[n]`."""
    return ~np.isnan(y[:, judged]).all(axis=1)


def _macro_auroc(p: np.ndarray, y: np.ndarray, judged: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function of weights `[draws, n]`: the mean AUROC of the judged classes, `[draws]`; NaN without any."""
    ranked = [Ranked(p[:, c], y[:, c]) for c in np.flatnonzero(judged)]
    if not ranked:
        return lambda weights: np.full(len(weights), np.nan)
    return lambda weights: np.mean([auroc_of(*one.counts(weights)) for one in ranked], axis=0)


def _auroc(
    p: np.ndarray, y: np.ndarray, patients: np.ndarray, classes: Sequence[str], draws: Mapping[str, int]
) -> dict[str, Any]:
    judged = both_outcomes(y)
    auroc = _macro_auroc(p, y, judged)
    found = bootstrap(lambda weights: {"auroc": auroc(weights)}, patients, used={"auroc": _known(y, judged)}, **draws)
    return _noted(found["auroc"], classes, judged).to_json()


def _noted(estimate: Estimate, classes: Sequence[str], judged: np.ndarray) -> Estimate:
    """With the classes that were left out in its note."""
    left_out = [name for name, one in zip(classes, judged, strict=True) if not one]
    if not left_out or estimate.value is None:
        return estimate
    return replace(
        estimate, note="; ".join(filter(None, [estimate.note, f"without {', '.join(left_out)}: one outcome only"]))
    )


def _missing(why: str) -> Estimate:
    return Estimate(None, None, None, 0.95, 0, 0, 0, 0, f"not measurable: {why}")


def _all_missing(names: Sequence[str], why: str) -> dict[str, Any]:
    return {name: _missing(why).to_json() for name in names}


def _regressed(x: np.ndarray, y: np.ndarray, asked: np.ndarray, task: Task) -> np.ndarray:
    """Logistic regression on standardized values, fitted on what is known: `[asked, classes]`, 0-1.

    A class that no film has gets 0 (multi-class); where only one outcome is known there is nothing to learn, and .5 is
    said.
    """

    def fitted(rows: np.ndarray, truth: np.ndarray) -> np.ndarray | None:
        if len(np.unique(truth)) < 2:
            return None
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        return regression.fit(x[rows], truth).predict_proba(asked)

    said = np.full((len(asked), y.shape[1]), 0.5)
    if task == "multiclass":
        rows = ~np.isnan(y).any(axis=1)
        truth = y[rows].argmax(axis=1)
        if (found := fitted(rows, truth)) is not None:
            said[:] = 0
            said[:, np.unique(truth)] = found
        return said
    for c, column in enumerate(y.T):
        rows = ~np.isnan(column)
        if (found := fitted(rows, column[rows])) is not None:
            said[:, c] = found[:, 1]
    return said
