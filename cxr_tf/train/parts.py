"""Which films train, which choose, which are reported."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cxr_tf.config import DataSection, UnlabeledSection, load_experiment
from cxr_tf.data.manifest import class_names, labels, rows_where
from cxr_tf.data.split import SplitError, assign_folds, carve, check_classes, split_by_column


def choose_parts(
    manifest: pd.DataFrame, data: DataSection, classes: list[str], seed: int, heads: tuple[bool, bool] = (True, True)
) -> pd.DataFrame:
    """Filters films and divides them by patient.

    Args:
        manifest: of shards; its index is the film's key there.
        data: the experiment's `[data]`: filters, split, label fraction.
        classes: what is learned. With one class a film, films of other classes are left out.
        seed: draws the label fraction; folds and validation part have the split's own seed, so that runs with several
            seeds are judged on the same films.
        heads: whether the model classifies, and whether it segments. Without classification, labels do not matter and
            films without annotation are left out.

    Returns:
        A table indexed by film key, with the columns "part" ("train", "validation", "test"), "patient_key" and
        "study_key" (whole numbers in the order of the manifest, no identifiers).

    Raises:
        SplitError, ManifestError: a column or value that is not there, a patient on two sides, a part without films
            of both kinds for some class.
    """
    films = manifest[rows_where(manifest, data.where)]
    classifies, _ = heads
    if not classifies:
        films = films[films["mask_known"].astype(bool)]
    if classifies and data.task == "multiclass":
        films = one_class_a_film(films, classes)
    split = data.split
    if split.column is not None:
        films = split_by_column(films, split.column, {"train": split.train, "test": split.test})
    else:
        rest = [fold for fold in range(split.folds) if fold != split.fold]
        films = split_by_column(
            assign_folds(films, split.folds, split.seed), "fold", {"train": rest, "test": [split.fold]}
        )
    films = carve(films[films["split"].notna()], split.validation, split.seed)
    if data.label_fraction < 1:
        films = carve(films, 1 - data.label_fraction, seed, name="unused")
    if classifies:
        check_classes(films, "train", classes)
    for part in ("train", "validation", "test"):
        _check_part(films[films["split"] == part], part, classes, heads)
    return _as_parts(films[films["split"] != "unused"])


def one_class_a_film(films: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """The films that have one of the classes, or whose labels are unknown; films of other classes are left out.

    Raises:
        SplitError: a film has several of them.
    """
    values = labels(films, classes)
    known = ~np.isnan(values).any(axis=1)
    if (values[known].sum(axis=1) > 1).any():
        raise SplitError(
            'some films have several of the classes: task = "multilabel" learns those; "multiclass" is one a film.'
        )
    return films[~known | (values.sum(axis=1) == 1)]


def choose_unlabeled(manifest: pd.DataFrame, data: UnlabeledSection) -> pd.DataFrame:
    """Filters films and divides them by patient, for pre-training.

    Args:
        manifest: of shards; its index is the film's key there.
        data: a pre-training's `[data]`.

    Returns:
        A table as `choose_parts` gives it. "test" are the films that `data.holdout` names or the experiment
        `data.test_of` tests on, and all other films of their patients: nothing of them is pre-trained on.

    Raises:
        SplitError, ManifestError: a column or value that is not there, or nothing left to train on.
        ConfigError: for an experiment file that cannot be used.
    """
    films = manifest[rows_where(manifest, data.where)]
    held = films["patient_key"][rows_where(films, data.holdout)] if data.holdout else films["patient_key"][:0]
    if data.test_of is not None:
        tuning = load_experiment(data.test_of)
        classes, model = tuning.data.classes or class_names(manifest), tuning.model
        heads = model.classification, model.segmentation
        parts = choose_parts(manifest, tuning.data, classes, tuning.seed, heads)
        held = pd.concat([held, parts["patient_key"][parts["part"] == "test"]])
    films = films.assign(split=np.where(films["patient_key"].isin(held), "test", "train"))
    if not (films["split"] == "train").any():
        raise SplitError("no film is left to pre-train on: `data.where`, `data.holdout` and `data.test_of` leave none.")
    return _as_parts(carve(films, data.validation, data.seed, stratify=False))


def _as_parts(films: pd.DataFrame) -> pd.DataFrame:
    """Without the manifest's own columns first, of which one may be called "part"."""
    return films[["split", "patient_key", "study_key"]].rename(columns={"split": "part"})


def _check_part(films: pd.DataFrame, part: str, classes: list[str], heads: tuple[bool, bool]) -> None:
    classifies, segments = heads
    values = labels(films, classes)
    if classifies and not ((values == 1).any(axis=0) & (values == 0).any(axis=0)).any():
        raise SplitError(
            f"the {part} part ({len(films)} films) has films of one class only, so nothing can be judged on it. "
            "Change [data.split], or give more data."
        )
    annotated = films["mask_known"].astype(bool) & (films["mask"].notna() | (films["boxes"].map(len) > 0))
    if segments and not classifies and not annotated.any():
        raise SplitError(f"the {part} part ({len(films)} films) has no film with a mask or box. Change [data.split].")
