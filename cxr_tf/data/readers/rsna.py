"""RSNA Pneumonia Detection Challenge (2018), as its folder is published.

    <root>/stage_2_train_labels.csv           patientId, x, y, width, height, Target: a row for each box
    <root>/stage_2_detailed_class_info.csv    patientId, class, repeated for each box
    <root>/stage_2_train_images/<patientId>.dcm
    <root>/stage_2_test_images/<patientId>.dcm    no labels were published

A `patientId` is the name of one file, and the PatientID in its header: every film counts as a patient of its own,
though the films are chosen from NIH ChestX-ray14, where some people have several. Target is 1, with a box, where the
class is "Lung Opacity", and 0, with blanks, in the other two: those films were looked at, so that their empty masks are
the truth. View, sex and age are in the DICOM headers alone.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import pandas as pd

from cxr_tf.data.manifest import LABEL, Boxes, ManifestError, ManifestWarning, make_manifest, missing_columns, read_csv
from cxr_tf.data.readers.headers import Progress, check_annotations, leads_out, read_headers
from cxr_tf.errors import nearest

CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")

_LABELS, _INFO = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
_FOLDERS = {"train": "stage_2_train_images", "test": "stage_2_test_images"}
_BOX = ("x", "y", "width", "height")
_TARGETS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
_LAYOUT = (
    f"An RSNA Pneumonia folder holds {_LABELS}, {_INFO} and {_FOLDERS['train']}/<patientId>.dcm (the test half: "
    f"{_FOLDERS['test']}/<patientId>.dcm); give the folder that they are in."
)


def read_rsna(root: str | os.PathLike[str], *, split: str = "train", progress: Progress | None = None) -> pd.DataFrame:
    """Reads the challenge's folder.

    Args:
        root: the folder that holds both CSV files and `stage_2_train_images`.
        split: "train", or "test", whose labels and masks are all unknown; it needs `stage_2_test_images` alone.
        progress: called with (done, total) while DICOM headers are read.

    Returns:
        A manifest in the order in which the label file first names the films ("test": of the file names), one class of
        `CLASSES` a film, boxes in pixels, masks all known. `patient_id` is the file's name without its ending. `split`
        is None for training films, which are yours to divide, and "test" for the others. A file whose header cannot be
        read stays in it, for preparation to reject it by name.

    Raises:
        ManifestError: the folder is not laid out as above, or some of it does not fit together: missing columns,
            repeated rows, a film with several targets or classes, boxes that cannot be read, contradict Target or lie
            outside of their film, a Target that contradicts the class, films without a file, class or row, links that
            lead out of the folder.

    Warns:
        ManifestWarning: headers that cannot be read or name another patient than their file does; boxes that are cut
            off at an edge.

    Example:
        >>> manifest = read_rsna("/data/rsna-pneumonia")
    """
    folder = Path(os.path.abspath(root))  # noqa: PTH100 - links stay as they are
    if split not in _FOLDERS:
        raise ManifestError(f'split must be "train" or "test". Received: {split!r}')
    try:
        files, problems = _files(folder, _FOLDERS[split])
    except OSError as error:
        raise ManifestError(f"cannot be listed: {error.strerror}", error.filename or str(root)) from error
    if split == "train":
        names, columns, found = _rows(folder, files)
        problems += found
    else:
        names = list(files)
        columns = {LABEL + name: [float("nan")] * len(names) for name in CLASSES}
        columns |= {"boxes": [[] for _ in names], "mask_known": [False] * len(names)}
    if problems:
        raise ManifestError(problems, str(root))
    if not names:
        raise ManifestError(f"{_LABELS} names no film.", str(root))

    paths = [files[name] for name in names]
    headers = read_headers(paths, progress)
    problems = check_annotations([f"image {n}" for n in names], headers, columns["boxes"], [None] * len(names))
    if problems:
        raise ManifestError(problems, str(root))
    unread = [name for name, header in zip(names, headers, strict=True) if header is None]
    if unread:
        warnings.warn(
            f"{len(unread)} of {len(names)} files have no header that can be read, the first is {unread[0]}.dcm; they "
            "stay in the manifest, and preparing it will reject those that cannot be decoded, each with its reason",
            ManifestWarning,
            stacklevel=2,
        )
    renamed = [n for n, h in zip(names, headers, strict=True) if h is not None and h.patient_id not in (None, n)]
    if renamed:
        warnings.warn(
            f"{len(renamed)} of {len(names)} files have a PatientID that is not the file's name, the first is "
            f"{renamed[0]}.dcm; the name counts. Where files were renamed, they have another film's labels",
            ManifestWarning,
            stacklevel=2,
        )
    return make_manifest(
        {
            "image": paths,
            "source": ["rsna"] * len(names),
            "patient_id": names,
            "study_id": [(h.study_uid if h else None) or name for name, h in zip(names, headers, strict=True)],
            "view": [header.view if header else None for header in headers],
            "sex": [header.sex if header else None for header in headers],
            "age": [header.age if header and header.age is not None else float("nan") for header in headers],
            **columns,
            "mask": [None] * len(names),
            "split": [None if split == "train" else split] * len(names),
        }
    )


def _files(folder: Path, images: str) -> tuple[dict[str, str], list[str]]:
    """Film -> its file, in the order of the names, and the links that lead out of the folder."""
    if not (folder / images).is_dir():
        raise ManifestError(f"there is no folder {images!r} in it. {_hint(folder, images)}{_LAYOUT}", str(folder))
    home = os.path.realpath(folder)
    if leads_out(folder / images, home):
        raise ManifestError(f"{images} leads out of it; name the folder that it leads into.", str(folder))
    files: dict[str, str] = {}
    problems = []
    with os.scandir(folder / images) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.endswith(".dcm"):
                continue
            files[entry.name.removesuffix(".dcm")] = entry.path
            if entry.is_symlink() and leads_out(entry.path, home):
                problems.append(f"{images}/{entry.name} leads out of {folder}")
            elif not entry.is_file():
                problems.append(f"{images}/{entry.name} is no file")
    if not files:
        raise ManifestError(f"there is no {images}/<patientId>.dcm in it. {_LAYOUT}", str(folder))
    return files, problems


def _hint(folder: Path, images: str) -> str:
    """What may have become of a missing folder of films."""
    if (folder / f"{images}.zip").is_file():
        return f"Unpack {images}.zip first. "
    others = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and path.name not in _FOLDERS.values():
            with os.scandir(path) as entries:
                if any(entry.name.endswith(".dcm") for entry in entries):
                    others.append(path.name)
    if not others:
        return ""
    return f"There are .dcm files in {', '.join(map(repr, others))}: rename it to {images!r} if it is that. "


def _rows(folder: Path, files: dict[str, str]) -> tuple[list[str], dict[str, list], list[str]]:
    """Films, label and mask columns, and the problems, from the two CSV files."""
    for name in (_LABELS, _INFO):
        if not (folder / name).is_file():
            zipped = f"Unpack {name}.zip first. " if (folder / f"{name}.zip").is_file() else ""
            raise ManifestError(f"there is no {name} in it. {zipped}{_LAYOUT}", str(folder))
    labels, info = read_csv(folder / _LABELS), read_csv(folder / _INFO)
    problems = [
        *missing_columns(labels, _LABELS, ("patientId", *_BOX, "Target")),
        *missing_columns(info, _INFO, ("patientId", "class")),
    ]
    if problems:
        raise ManifestError(problems, str(folder))

    target_of, boxes_of = _targets(labels, problems)
    class_of = _classes(info, problems)
    images = _FOLDERS["train"]
    for name, target in target_of.items():
        kind = class_of.get(name)
        if name not in class_of:
            problems.append(f"{_LABELS}: image {name} is not in {_INFO}")
        elif kind is not None and target is not None and (kind == CLASSES[2]) != bool(target):
            problems.append(
                f"image {name}: Target is {target} in {_LABELS}, but its class is {kind!r} in {_INFO}; Target is 1 "
                f"where the class is {CLASSES[2]!r}, and 0 elsewhere"
            )
        if name not in files:
            problems.append(f"{_LABELS}: image {name}: there is no file {images}/{name}.dcm")
    problems += [f"{_INFO}: image {name} is not in {_LABELS}" for name in class_of if name not in target_of]
    problems += [f"{_LABELS}: no row names the file {images}/{name}.dcm" for name in files if name not in target_of]

    names = list(target_of)
    columns: dict[str, list] = {LABEL + kind: [float(class_of.get(n) == kind) for n in names] for kind in CLASSES}
    columns |= {"boxes": [boxes_of[name] for name in names], "mask_known": [True] * len(names)}
    return names, columns, problems


def _targets(table: pd.DataFrame, problems: list[str]) -> tuple[dict[str, int | None], dict[str, Boxes]]:
    """Target (None where it cannot be told) and boxes of each film, in the order of the file."""
    target_of: dict[str, int | None] = {}
    boxes_of: dict[str, Boxes] = {}
    seen: dict[tuple[str, ...], int] = {}
    for line, row in enumerate(table[["patientId", *_BOX, "Target"]].itertuples(index=False, name=None), start=2):
        name, *cells, text = row
        where = f"{_LABELS}: line {line}, image {name}"
        if not name:
            problems.append(f"{_LABELS}: line {line}: patientId is blank")
            continue
        target = _TARGETS.get(text)
        boxes = boxes_of.setdefault(name, [])
        before = target_of.setdefault(name, target)
        first = seen.setdefault(row, line)
        if first != line:
            problems.append(f"{where}: repeats line {first}")
        elif target is None:
            problems.append(f"{where}: Target must be 0 or 1. Received: {text!r}")
        elif before is not None and target != before:
            problems.append(f"{where}: Target is {target}, but {before} in an earlier row of that film")
        elif target == 0 and any(cells):
            problems.append(f"{where}: has a box, but its Target is 0. Received: {cells}")
        elif target == 1 and not any(cells):
            problems.append(f"{where}: Target is 1, but its box is blank")
        elif target == 1:
            box = [_number(cell) for cell in cells]
            if all(map(math.isfinite, box)) and box[2] > 0 and box[3] > 0:
                boxes.append(box)
            else:
                problems.append(
                    f"{where}: x, y, width and height must be numbers, the last two above 0. Received: {cells}"
                )
    return target_of, boxes_of


def _classes(table: pd.DataFrame, problems: list[str]) -> dict[str, str | None]:
    """The class of each film, None where it cannot be told; a film has a row for each of its boxes."""
    class_of: dict[str, str | None] = {}
    for line, (name, kind) in enumerate(zip(table["patientId"], table["class"], strict=True), start=2):
        if not name:
            problems.append(f"{_INFO}: line {line}: patientId is blank")
            continue
        known = kind if kind in CLASSES else None
        before = class_of.setdefault(name, known)
        if known is None:
            problems.append(
                f"{_INFO}: line {line}, image {name}: the class is unknown.{nearest(kind, CLASSES)} "
                f"Known: {', '.join(map(repr, CLASSES))}. Received: {kind!r}"
            )
        elif before is not None and kind != before:
            problems.append(f"{_INFO}: line {line}, image {name}: {kind!r}, but {before!r} in an earlier row")
    return class_of


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
