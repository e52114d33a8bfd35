"""Any data set whose films are listed in a CSV file: its columns are mapped to those of the manifest.

Labels come in one of three ways:

- one column that names the class of each film: `label`, `classes`;
- one column that names several, joined: `label`, `classes`, `label_separator` ("Effusion|Mass");
- a column of 1, 0 and blank for each class: `label_columns`.

A blank label is unknown. So is a mask, unless there is a mask file, a box, an explicit empty list of boxes (`[]`), or a
column that says where an empty mask is the truth (`mask_empty`).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_tf.data.manifest import (
    COLUMNS,
    LABEL,
    Boxes,
    ManifestError,
    ManifestWarning,
    make_manifest,
    parse_boxes,
    read_csv,
    rows_where,
)
from cxr_tf.data.readers.headers import Progress, check_annotations, leads_out, read_headers
from cxr_tf.errors import nearest

_SEXES = {"m": "M", "male": "M", "f": "F", "female": "F"}
_AGE_UNITS = {"": 1.0, "y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25}  # "058Y" is how DICOM writes ages


def read_table(
    csv: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    image: str = "image",
    patient: str = "patient_id",
    study: str | None = None,
    source: str | None = None,
    view: str | None = None,
    sex: str | None = None,
    age: str | None = None,
    label: str | None = None,
    classes: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    label_columns: Mapping[str, str] | Sequence[str] | None = None,
    label_separator: str | None = None,
    ignore: Sequence[str] = (),
    mask: str | None = None,
    mask_where: Mapping[str, Sequence[Any]] | None = None,
    mask_empty: str | None = None,
    boxes: str | None = None,
    keep: Sequence[str] = (),
    where: Mapping[str, Sequence[Any]] | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Reads a CSV file as a manifest.

    Args:
        csv: the file: UTF-8, comma-separated, the first line names the columns.
        root: the folder that image and mask paths are relative to, and that none may leave; by default the CSV's.
        image: column of image paths.
        patient: column of patient keys. Where each film is a patient of its own, name the image column.
        study: column of study keys, which need to differ within a patient only. By default each image is a study.
        source: column that tells where a film comes from. By default the name of the root folder.
        view: column of views.
        sex: column of "M", "F", "male", "female" in any case; other values are unknown.
        age: column of ages, "58" or DICOM's "058Y", "006M"; other values are unknown.
        label: column that names classes.
        classes: for `label`, the class names in their order, with the values that mean them: `{"Pneumonia": ["pna",
            "pneumonia"]}`; a list where the values are the names.
        label_columns: a column of 1, 0 or blank for each class, `{class: column}`; a list where columns are called as
            their classes. In place of `label`.
        label_separator: what joins several values of the label column. Each film then has any number of classes.
        ignore: values of the label column that stand for no class. Where a film has one class, its label is then not
            known; where it may have several, it has none of them by this value ("No Finding").
        mask: column of mask paths (PNG, black is background, of the film's size), blank where there is none.
        mask_where: `{column: values}` for rows whose mask counts, such as those of one kind; others are blank.
        mask_empty: column that is 1 where a film is known to have nothing to mask; else 0 or blank. A mask or box that
            another annotator drew goes before it.
        boxes: column of boxes in pixels of the film, as JSON or Python: a list of `[x, y, width, height]` or of dicts
            with these keys. Blank is unknown, `[]` is known to be empty.
        keep: further columns to carry along, as text.
        where: `{column: values}`: only rows that have them are read.
        progress: called with (done, total) while the headers of films with boxes or masks are read.

    Returns:
        A manifest in the order of the rows, `split` None.

    Raises:
        ManifestError: a column that is not there, a class that is not known, a label, mask or box that cannot be read,
            a path outside of the root, a file that is missing or listed twice, a mask of another size than its film, a
            box outside of it. All such rows are listed.

    Warns:
        ManifestWarning: boxes that are cut off at an edge; masks and boxes that contradict `mask_empty`.

    Example:
        >>> manifest = read_table(
        ...     "/data/cxr/metadata.csv", view="view", label="finding", keep=["fold"],
        ...     classes={"No finding": ["No finding"], "Pneumonia": ["Pneumonia (unspecified)"]},
        ... )
    """
    table = read_csv(csv)
    table.index += 2  # the line of a row, as editors count (exact as long as no cell has a line break)
    folder = Path(os.path.abspath(root if root is not None else Path(csv).parent))  # noqa: PTH100 - links stay
    named = {"image": image, "patient": patient, "study": study, "source": source, "view": view, "sex": sex, "age": age}
    named |= {"label": label, "mask": mask, "mask_empty": mask_empty, "boxes": boxes}
    label_columns = label_columns or {}
    by_class = {c: label_columns[c] if isinstance(label_columns, Mapping) else c for c in label_columns}
    _check_columns(str(csv), table, {role: name for role, name in named.items() if name}, list(by_class.values()), keep)
    if (label is None) != (classes is None) or (label is not None and label_columns):
        raise ManifestError(
            "labels are either `label` (a column) with `classes`, or `label_columns`. "
            f"Received: label={label!r}, classes={classes!r}, label_columns={label_columns!r}"
        )
    with_mask = rows_where(table, mask_where or {})  # before rows are left out: a value may occur in those alone
    chosen = rows_where(table, where or {})
    table, with_mask = table[chosen], with_mask[chosen]
    if not len(table):
        raise ManifestError(f"it has no row{' with ' + str(dict(where)) if where else ''}.", str(csv))

    problems: list[str] = []
    images = _paths(table, image, folder, problems)
    for line, path, twice in zip(table.index, images, pd.Series(images, dtype=object).duplicated(), strict=True):
        if twice and path is not None:
            problems.append(f"line {line}: {path.name} is listed twice in column {image!r}")
    patients = list(table[patient])
    problems += [f"line {line}: column {patient!r} is blank" for line, text in table[patient].items() if not text]
    labels: dict[str, list[float]] = {}
    if label is not None and classes is not None:
        labels = _class_labels(table[label], classes, label_separator, ignore, problems)
    for name, column in by_class.items():
        labels[name] = _flags(table[column], problems)

    masks: list[str | None] = [None] * len(table)
    if mask is not None:
        table = table.assign(**{mask: np.where(with_mask, table[mask], "")})
        masks = [str(path) if path else None for path in _paths(table, mask, folder, problems, required=False)]
    film_boxes: list[Boxes] = [[] for _ in masks]
    empty = np.zeros(len(table), bool)
    if boxes is not None:
        film_boxes = [_or_problem(parse_boxes, text, [], line, problems) for line, text in table[boxes].items()]
        empty = np.array([text != "" and not b for text, b in zip(table[boxes], film_boxes, strict=True)], bool)
    annotated = np.array([path is not None or bool(b) for path, b in zip(masks, film_boxes, strict=True)], bool)
    if mask_empty is not None:
        empty |= np.array(_flags(table[mask_empty], problems)) == 1
        contradicted = list(table.index[empty & annotated])
        if contradicted:
            warnings.warn(
                f"{len(contradicted)} films have a mask or boxes though {mask_empty!r} is 1, the first in line "
                f"{contradicted[0]}; the mask or boxes count. `mask_where` can leave some out",
                ManifestWarning,
                stacklevel=2,
            )
    if problems:
        raise ManifestError(problems, str(csv))

    lines, rows = list(table.index), np.flatnonzero(annotated).tolist()
    problems = check_annotations(
        [f"line {lines[row]}" for row in rows],
        read_headers([str(images[row]) for row in rows], progress),
        [film_boxes[row] for row in rows],
        [masks[row] for row in rows],
    )
    if problems:
        raise ManifestError(problems, str(csv))
    return make_manifest(
        {
            "image": [str(path) for path in images],
            "source": [text or folder.name for text in table[source]] if source else [folder.name] * len(table),
            "patient_id": patients,
            # With the patient, so that studies "1", "2" of every patient are told apart.
            "study_id": [
                f"{p}/{s or i}" for p, s, i in zip(patients, table[study or image], table[image], strict=True)
            ],
            "view": [text.upper() or None for text in table[view]] if view else [None] * len(table),
            "sex": [_SEXES.get(text.lower()) for text in table[sex]] if sex else [None] * len(table),
            "age": [_age(text) for text in table[age]] if age else [float("nan")] * len(table),
            **{LABEL + name: values for name, values in labels.items()},
            "boxes": film_boxes,
            "mask": masks,
            "mask_known": (annotated | empty).tolist(),
            "split": [None] * len(table),
            **{name: [text or None for text in table[name]] for name in keep},
        }
    )


def _check_columns(
    about: str, table: pd.DataFrame, roles: Mapping[str, str], labels: Sequence[str], keep: Sequence[str]
) -> None:
    asked = [*roles.items(), *(("label_columns", name) for name in labels), *(("keep", name) for name in keep)]
    known = list(table.columns)
    problems = [
        f"there is no column {name!r} for `{role}`.{nearest(name, known)}" for role, name in asked if name not in known
    ]
    problems += [
        f"`keep` cannot carry {name!r}: the manifest has a column of that name, map it instead"
        for name in keep
        if name in COLUMNS or name.startswith(LABEL)
    ]
    if problems:
        raise ManifestError(problems, f"{about} (columns: {', '.join(known)})")


def _paths(
    table: pd.DataFrame, column: str, folder: Path, problems: list[str], *, required: bool = True
) -> list[Path | None]:
    """The files that a column names; what is missing, or outside of the folder, becomes a problem."""
    home = os.path.realpath(folder)

    @cache
    def inside(path: Path) -> bool:  # asked once a folder: resolving costs a system call per level
        return not leads_out(path, home)

    def problem(text: str, path: Path) -> str | None:
        if not text:
            return "is blank" if required else None
        if "\0" in text or Path(text).is_absolute() or ".." in Path(text).parts:
            return f"must be a path relative to {folder}, without '..'"
        try:
            if not inside(path.parent) or (path.is_symlink() and not inside(path)):
                return f"leads out of {folder}"
            return None if path.is_file() else "there is no such file"
        except OSError as error:
            return f"cannot be reached: {error.strerror}"

    paths: list[Path | None] = []
    for line, text in table[column].items():
        path = folder / text
        wrong = problem(text, path)
        if wrong:
            problems.append(f"line {line}, column {column!r}: {wrong}. Received: {text!r}")
        paths.append(path if text and not wrong else None)
    return paths


def _class_labels(
    values: pd.Series,
    classes: Mapping[str, Sequence[str]] | Sequence[str],
    separator: str | None,
    ignore: Sequence[str],
    problems: list[str],
) -> dict[str, list[float]]:
    """Label columns from a column that names one class, or several."""
    meanings = {c: [str(v) for v in classes[c]] if isinstance(classes, Mapping) else [c] for c in classes}
    index: dict[str, int] = {}
    for number, (name, means) in enumerate(meanings.items()):
        for value in means:
            if value in index or value in ignore:
                raise ManifestError(f"value {value!r} of class {name!r} stands for another class too, or is ignored.")
            index[value] = number
    known = [*index, *ignore]
    rows = np.full((len(values), len(meanings)), np.nan)
    strange: dict[str, int] = {}
    for row, text in enumerate(values):
        parts = [part.strip() for part in text.split(separator)] if separator else [text]
        parts = [part for part in parts if part]
        for part in parts:
            if part not in index and part not in ignore:
                strange[part] = strange.get(part, 0) + 1
        columns = [index[part] for part in parts if part in index]
        if columns or (separator and parts):
            rows[row] = 0
            rows[row, columns] = 1
    for value, count in strange.items():
        problems.append(
            f"{count} rows have the unknown class {value!r} in column {values.name!r}.{nearest(value, known)} "
            f"Known: {', '.join(map(repr, known))}"
        )
    return {name: rows[:, number].tolist() for number, name in enumerate(meanings)}


def _flags(values: pd.Series, problems: list[str]) -> list[float]:
    """1, 0, and NaN for blank cells."""
    flags = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "": float("nan")}
    for line, text in values.items():
        if text not in flags:
            problems.append(f"line {line}: column {values.name!r} must be 1, 0 or blank. Received: {text!r}")
    return [flags.get(text, float("nan")) for text in values]


def _or_problem(read: Callable[[str], Any], text: str, otherwise: Any, line: Any, problems: list[str]) -> Any:
    try:
        return read(text)
    except ManifestError as error:
        problems.append(f"line {line}: {error}")
        return otherwise


def _age(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([ymwd]?)", text.lower())
    years = float(match[1]) * _AGE_UNITS[match[2]] if match else float("nan")
    return years if years <= 150 else float("nan")
