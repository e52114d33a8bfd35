"""Who trains and who judges: splits by patient, never by image.

The films of one person look alike, so a person on two sides makes a model look better than it is. Every function here
moves whole patients; `check_patients` proves it for splits that came from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_tf.data.manifest import ManifestError, class_names, labels, rows_where
from cxr_tf.errors import CxrError, nearest

_SHOWN = 10  # patients that an error lists


class SplitError(CxrError):
    """A split that is not possible, or that would not be fair."""


def split_by_patient(
    df: pd.DataFrame, fractions: Mapping[str, float], seed: int, *, stratify: bool = True
) -> pd.DataFrame:
    """Divides patients at random so that every part gets its share of the images, and of each class's images.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data", ECML PKDD
    2011) with patients for items: the class with the fewest images left is dealt out first, the patients with the most
    images of it before the others, each to the part that lacks most of it. scikit-learn's `StratifiedGroupKFold` makes
    equal parts only and takes one label per image.

    Args:
        df: a manifest.
        fractions: share of the images per split, 1 in sum: `{"train": 0.7, "validation": 0.1, "test": 0.2}`.
        seed: another seed, another split; the same seed gives the same split whatever the order of the rows.
        stratify: whether classes are balanced, and not the number of images alone.

    Returns:
        A copy of `df` with `split` filled in.

    Raises:
        SplitError: fractions that are not positive or do not add up to 1, or fewer patients than splits need.

    Example:
        >>> df = split_by_patient(df, {"train": 0.8, "validation": 0.2}, seed=0)
    """
    shares = list(fractions.values())
    if not shares or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise SplitError(f"fractions must be above 0 and 1 in sum. Received: {dict(fractions)}")
    names = np.array(list(fractions), dtype=object)
    return _filled(df, "split", names[_deal(df, list(fractions), shares, seed, stratify)])


def assign_folds(df: pd.DataFrame, folds: int, seed: int, *, stratify: bool = True) -> pd.DataFrame:
    """Divides patients into equal parts for cross-validation, as `split_by_patient` does.

    Args:
        df: a manifest.
        folds: how many, 2 or more.
        seed: as in `split_by_patient`.
        stratify: as in `split_by_patient`.

    Returns:
        A copy of `df` with the column `fold`, "0" to `folds` - 1 as text; `split_by_column` makes splits of it.

    Raises:
        SplitError: fewer than two folds, or fewer patients than folds.

    Example:
        >>> df = split_by_column(assign_folds(df, 5, seed=0), "fold", {"train": [0, 1, 2, 3], "test": [4]})
    """
    if folds < 2:
        raise SplitError(f"there must be 2 folds or more. Received: {folds}")
    names = np.array([str(fold) for fold in range(folds)], dtype=object)
    return _filled(
        df, "fold", names[_deal(df, [f"fold {name}" for name in names], [1 / folds] * folds, seed, stratify)]
    )


def carve(
    df: pd.DataFrame,
    fraction: float,
    seed: int,
    *,
    source: str = "train",
    name: str = "validation",
    stratify: bool = True,
) -> pd.DataFrame:
    """Moves a patient-wise, stratified part of one split into a new one, for choices that must not see the test split.

    Args:
        df: a manifest with `split` filled in.
        fraction: share of the images of `source` that moves, above 0 and below 1.
        seed: as in `split_by_patient`.
        source: the split that gives.
        name: the split that takes.
        stratify: as in `split_by_patient`.

    Returns:
        A copy of `df` in which some rows of `source` have the split `name`.

    Raises:
        SplitError: no row is in `source`, some are in `name` already, or the fraction is not possible.

    Example:
        >>> df = carve(split_by_column(df, "fold", {"train": [0, 1, 2], "test": [3]}), 0.15, seed=0)
    """
    if not 0 < fraction < 1:
        raise SplitError(f"fraction must be above 0 and below 1. Received: {fraction}")
    rows = _rows_of(df, source)
    if (df["split"] == name).any():
        raise SplitError(f"there are rows in the split {name!r} already; carve gives it its only ones.")
    parts = split_by_patient(df[rows], {source: 1 - fraction, name: fraction}, seed, stratify=stratify)
    split = df["split"].to_numpy(dtype=object).copy()
    split[rows] = parts["split"].to_numpy(dtype=object)
    return _filled(df, "split", split)


def split_by_column(df: pd.DataFrame, column: str, mapping: Mapping[str, Sequence[Any]] | None = None) -> pd.DataFrame:
    """Takes the split from a column of the manifest, such as a published `fold`.

    Args:
        df: a manifest.
        column: its name.
        mapping: `{split: values of the column}`; rows with other values are in no split. By default the values of the
            column are the names of the splits.

    Returns:
        A copy of `df` with `split` filled in.

    Raises:
        SplitError: no such column or value, a value under two splits, or a patient on two sides.

    Example:
        >>> df = split_by_column(df, "fold", {"train": [0, 1, 2], "test": [3]})
    """
    if mapping is None:
        mapping = {str(value): [value] for value in df[column].dropna().unique()} if column in df.columns else {"": []}
    split = np.full(len(df), None, dtype=object)
    for name, values in mapping.items():
        try:
            rows = rows_where(df, {column: values})
        except ManifestError as error:
            raise SplitError(f"split {name!r}: {error}") from error
        if any(split[rows]):
            other = next(filter(None, split[rows]))
            raise SplitError(f"splits {other!r} and {name!r} share values of {column!r}. Received: {dict(mapping)}")
        split[rows] = name
    result = _filled(df, "split", split)
    check_patients(result)
    return result


def check_patients(df: pd.DataFrame, split: str = "split") -> None:
    """Makes sure that every patient is on one side.

    Args:
        df: a manifest.
        split: the column that tells the side; rows without a value there are on none.

    Raises:
        SplitError: with the rows and file names of the first ten patients on several sides, and their number.
    """
    used = df[df[split].notna()]
    sides = used.groupby("patient_id", sort=False)[split].nunique()
    torn = sides.index[sides > 1]
    if not len(torn):
        return
    lines = []
    for patient in torn[:_SHOWN]:
        films = used[used["patient_id"] == patient].drop_duplicates(split)  # one film of each side says it
        shown = [
            f"row {row} ({Path(image).name}) in {side}" for row, image, side in films[["image", split]].itertuples()
        ]
        lines.append("  - " + ", ".join(shown))
    if len(torn) > _SHOWN:
        lines.append(f"  ... and {len(torn) - _SHOWN} more")
    raise SplitError(
        f"{len(torn)} patients are on two sides of the split; all films of a patient must be on one. One film of each "
        "side (rows as the manifest counts them, from 0):\n" + "\n".join(lines)
    )


def check_classes(df: pd.DataFrame, split: str, classes: Sequence[str] | None = None) -> None:
    """Makes sure that a split has films with and without each class; no figure can be had, or learned, from one kind.

    Args:
        df: a manifest with `split` filled in.
        split: which split.
        classes: which classes; by default all.

    Raises:
        SplitError: no row is in the split, or a class has films of one kind only.
    """
    rows = df[_rows_of(df, split)]
    names = class_names(df) if classes is None else list(classes)
    values = labels(rows, names)
    problems = []
    for name, column in zip(names, values.T, strict=True):
        present, absent = int((column == 1).sum()), int((column == 0).sum())
        if not (present and absent):
            problems.append(
                f"{name!r}: {present} films with it, {absent} without, {len(rows) - present - absent} unknown"
            )
    if problems:
        raise SplitError(
            f"the split {split!r} ({len(rows)} films) needs films with and without each class. Received: "
            + "; ".join(problems)
        )


def _filled(df: pd.DataFrame, column: str, values: np.ndarray) -> pd.DataFrame:
    """A copy with a text column; left to itself, pandas would turn None into NaN."""
    return df.assign(**{column: pd.Series(values, index=df.index, dtype=object)})


def _rows_of(df: pd.DataFrame, split: str) -> np.ndarray:
    rows = (df["split"] == split).fillna(False).to_numpy(bool)
    if not rows.any():
        known = [str(name) for name in df["split"].dropna().unique()]
        raise SplitError(f"no row is in the split {split!r}.{nearest(split, known)} There are: {known}")
    return rows


def _deal(df: pd.DataFrame, names: Sequence[str], shares: Sequence[float], seed: int, stratify: bool) -> np.ndarray:
    """The part of every row, int64 `[rows]`."""
    if seed < 0:
        raise SplitError(f"seed must be 0 or more. Received: {seed}")
    patients, patient = np.unique(df["patient_id"].to_numpy(dtype=str), return_inverse=True)
    if len(patients) < len(names):
        raise SplitError(f"{len(names)} splits need as many patients. Received: {len(patients)} patients")
    kinds = _kinds(df) if stratify else np.ones((len(df), 1), np.int64)
    images = np.zeros((len(patients), kinds.shape[1]), np.int64)  # a patient's images of each kind
    np.add.at(images, patient, kinds)
    films = np.bincount(patient, minlength=len(patients))

    # Patients in the order of their keys are shuffled by the seed alone: the order of the rows has no say.
    rng = np.random.default_rng(seed)
    rank = rng.permutation(len(patients))
    lacking = np.outer(shares, images.sum(axis=0)).astype(np.float64)  # images of each kind that each part lacks
    lacking_films = np.asarray(shares) * len(df)
    part = np.full(len(patients), -1)
    while (part < 0).any():
        left = images[part < 0].sum(axis=0)
        kind = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin())
        waiting = np.flatnonzero((part < 0) & (images[:, kind] > 0))
        for one in waiting[np.lexsort((rank[waiting], -films[waiting], -images[waiting, kind]))]:
            # Rounded, for a difference of rounding errors is no difference.
            order = np.lexsort((np.round(-lacking_films, 6), np.round(-lacking[:, kind], 6)))
            part[one] = order[0]
            lacking[order[0]] -= images[one]
            lacking_films[order[0]] -= films[one]
    for index, name in enumerate(names):
        if not (part == index).any():
            raise SplitError(
                f"{name!r} would get no patient: {shares[index]:.3g} of {len(patients)} patients is too little"
            )
    return part[patient]


def _kinds(df: pd.DataFrame) -> np.ndarray:
    """What is balanced, 0/1 `[rows, classes + 2]`: each class present, all of the known ones absent, nothing known."""
    values = labels(df)
    present = values == 1
    known = ~np.isnan(values).all(axis=1) if values.shape[1] else np.zeros(len(df), bool)
    return np.column_stack([present, known & ~present.any(axis=1), ~known]).astype(np.int64)
