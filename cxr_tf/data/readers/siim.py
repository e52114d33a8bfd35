"""SIIM-FISABIO-RSNA COVID-19 Detection (2021), as its folder is published.

    <root>/train_study_level.csv    id (<study>_study) and one column per class, of which exactly one is 1
    <root>/train_image_level.csv    id (<image>_image), boxes, label, StudyInstanceUID
    <root>/train/<study>/<series>/<image>.dcm
    <root>/test/<study>/<series>/<image>.dcm    no labels were published

Labels belong to studies, and a study may have several images. Boxes are Python text, `[{'x': ..., 'y': ..., 'width':
..., 'height': ...}]` in original pixels; `label` says the same by corners. An image of a positive study without boxes
was not annotated (mostly a second image of its study): its mask is unknown, not empty. One of a negative study has a
known empty mask. Patients, of whom many have several studies, are in the DICOM headers alone.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pandas as pd

from cxr_tf.data.manifest import (
    LABEL,
    Boxes,
    ManifestError,
    ManifestWarning,
    make_manifest,
    parse_boxes,
    read_csv,
)
from cxr_tf.data.readers.headers import Progress, check_annotations, leads_out, read_headers
from cxr_tf.errors import nearest

CLASSES = ("Negative for Pneumonia", "Typical Appearance", "Indeterminate Appearance", "Atypical Appearance")

_STUDIES, _IMAGES = "train_study_level.csv", "train_image_level.csv"
_STUDY_COLUMNS = ("id", *CLASSES)
_IMAGE_COLUMNS = ("id", "boxes", "label", "StudyInstanceUID")
_LAYOUT = (
    f"A SIIM-FISABIO-RSNA folder holds {_STUDIES}, {_IMAGES} and train/<study>/<series>/<image>.dcm; give the folder "
    "that they are in."
)
_CORNERS_DIFFER = 1.0  # pixels by which `label` may differ from `boxes`


def read_siim(root: str | os.PathLike[str], *, split: str = "train", progress: Progress | None = None) -> pd.DataFrame:
    """Reads the challenge's folder.

    Args:
        root: the folder that holds both CSV files and `train`.
        split: "train", or "test", whose labels and masks are all unknown.
        progress: called with (done, total) while DICOM headers are read.

    Returns:
        A manifest in the order of the image-level file ("test": of the paths). `split` is None for training images,
        which are yours to divide, and "test" for the others. A file whose header cannot be read stays in it, under the
        patient of its study's other images or as a patient of its own, for preparation to reject it by name.

    Raises:
        ManifestError: the folder is not laid out as above, or some of it does not fit together: missing, unknown and
            duplicate columns or ids, studies that are not in exactly one class, images without a file and files that no
            row names, boxes that cannot be read, contradict `label` or a negative study, or lie outside of their image,
            files that a link leads out of the folder to.

    Warns:
        ManifestWarning: headers that cannot be read or name no patient; boxes that are cut off at an edge.

    Example:
        >>> manifest = read_siim("/data/siim-covid19")
    """
    folder = Path(os.path.abspath(root))  # noqa: PTH100 - links stay as they are
    if split not in ("train", "test"):
        raise ManifestError(f'split must be "train" or "test". Received: {split!r}')
    try:
        if not (folder / split).is_dir():
            raise ManifestError(f"there is no folder {split!r} in it. {_LAYOUT}", str(root))
        files, problems = _files(folder / split)
    except OSError as error:
        raise ManifestError(f"cannot be listed: {error.strerror}", error.filename or str(root)) from error
    if split == "train":
        names, studies, columns, found = _rows(folder, files)
        problems += found
    else:
        names, studies = list(files), [path.parts[-3] for path in files.values()]
        columns = {LABEL + name: [float("nan")] * len(names) for name in CLASSES}
        columns |= {"boxes": [[] for _ in names], "mask_known": [False] * len(names)}
    if problems:
        raise ManifestError(problems, str(root))
    if not names:
        raise ManifestError(f"there is no {split}/<study>/<series>/<image>.dcm in it. {_LAYOUT}", str(root))

    paths = [str(files[name]) for name in names]
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
    return make_manifest(
        {
            "image": paths,
            "source": ["siim"] * len(names),
            "patient_id": _patients(studies, [header.patient_id if header else None for header in headers]),
            "study_id": studies,
            "view": [header.view if header else None for header in headers],
            "sex": [header.sex if header else None for header in headers],
            "age": [header.age if header and header.age is not None else float("nan") for header in headers],
            **columns,
            "mask": [None] * len(names),
            "split": [None if split == "train" else split] * len(names),
        }
    )


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Image id -> its file, in the order of the paths."""
    files: dict[str, Path] = {}
    problems = []
    # Not by `glob`, which passes over folders that it may not read, and their films with them.
    found = [path for study in _folders(folder) for series in _folders(study) for path in series.iterdir()]
    home = os.path.realpath(folder.parent)
    if leads_out(folder, home):
        raise ManifestError(f"{folder.name}/ leads out of it; give the folder that it leads into", str(folder.parent))
    for path in sorted(path for path in found if path.name.endswith(".dcm")):
        if leads_out(path, home):
            problems.append(f"{_short(path)} leads out of {folder.parent}")
        if path.stem in files:
            problems.append(
                f"image {path.stem} has two files, in studies {files[path.stem].parts[-3]} and {path.parts[-3]}"
            )
        files[path.stem] = path
    return files, problems


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir()]


def _rows(folder: Path, files: dict[str, Path]) -> tuple[list[str], list[str], dict[str, list], list[str]]:
    """Image ids, their study ids, label and mask columns, and the problems, from the two CSV files."""
    for name in (_STUDIES, _IMAGES):
        if not (folder / name).is_file():
            raise ManifestError(f"there is no {name} in it. {_LAYOUT}", str(folder))
    study_rows, image_rows = read_csv(folder / _STUDIES), read_csv(folder / _IMAGES)
    problems = [
        *_column_problems(study_rows, _STUDIES, _STUDY_COLUMNS),
        *_column_problems(image_rows, _IMAGES, _IMAGE_COLUMNS),
    ]
    if problems:
        raise ManifestError(problems, str(folder))

    study_ids = _ids(study_rows, _STUDIES, "_study", problems)
    class_of = {}
    for study, cells in zip(study_ids, study_rows[list(CLASSES)].itertuples(index=False), strict=True):
        if sorted(cells) != ["0", "0", "0", "1"]:
            problems.append(
                f"{_STUDIES}: study {study} must have a 1 in one class and 0 in the others. Received: {list(cells)}"
            )
        class_of[study] = cells.index("1") if "1" in cells else 0

    names = _ids(image_rows, _IMAGES, "_image", problems)
    studies = [str(study) for study in image_rows["StudyInstanceUID"]]
    boxes: list[Boxes] = []
    for name, study, boxes_text, label_text in zip(
        names, studies, image_rows["boxes"], image_rows["label"], strict=True
    ):
        where = f"{_IMAGES}: image {name}"
        boxes.append([])
        try:
            boxes[-1] = parse_boxes(boxes_text)
            _check_label(boxes[-1], label_text)
        except ManifestError as error:
            problems.append(f"{where}: {error}")
        if study not in class_of:
            problems.append(f"{where}: its study {study} is not in {_STUDIES}")
        elif boxes[-1] and class_of[study] == 0:
            problems.append(f"{where}: has boxes, but its study {study} is {CLASSES[0]}")
        if name not in files:
            problems.append(f"{where}: there is no file train/{study}/<series>/{name}.dcm")
        elif files[name].parts[-3] != study:
            problems.append(f"{where}: its study is {study}, but its file is in train/{files[name].parts[-3]}")
    problems += [f"{_IMAGES}: no row names the file {_short(files[name])}" for name in sorted(set(files) - set(names))]
    problems += [
        f"{_STUDIES}: study {study} has no image in {_IMAGES}" for study in sorted(set(study_ids) - set(studies))
    ]

    one_hot = [[float(index == class_of.get(study, -1)) for study in studies] for index in range(len(CLASSES))]
    columns: dict[str, list] = {LABEL + name: values for name, values in zip(CLASSES, one_hot, strict=True)}
    columns["boxes"] = boxes
    columns["mask_known"] = [bool(b) or class_of.get(s, -1) == 0 for b, s in zip(boxes, studies, strict=True)]
    return names, studies, columns, problems


def _column_problems(table: pd.DataFrame, file: str, wanted: tuple[str, ...]) -> list[str]:
    unknown = [name for name in table.columns if name not in wanted]
    return [f"{file}: column {name!r} is missing.{nearest(name, unknown)}" for name in wanted if name not in table] + [
        f"{file}: column {name!r} is unknown.{nearest(name, wanted)} Known: {', '.join(wanted)}" for name in unknown
    ]


def _ids(table: pd.DataFrame, file: str, ending: str, problems: list[str]) -> list[str]:
    """The ids of a file without their ending."""
    ids: list[str] = []
    for line, text in enumerate(table["id"], start=2):
        if not text.endswith(ending) or text == ending:
            problems.append(f"{file}: line {line}: an id must be <name>{ending}. Received: {text!r}")
        ids.append(text.removesuffix(ending))
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            problems.append(f"{file}: id {name}{ending} occurs twice")
        seen.add(name)
    return ids


def _check_label(boxes: Boxes, text: str) -> None:
    """Holds `boxes` against `label`: `opacity 1 x1 y1 x2 y2` as often as there are boxes, or `none 1 0 0 1 1`."""
    parts = text.split()
    corners = []
    try:
        for start in range(0, len(parts), 6):
            kind, _, *numbers = parts[start : start + 6]
            x1, y1, x2, y2 = (float(number) for number in numbers)
            if kind not in ("opacity", "none"):
                raise ValueError
            if kind == "opacity":
                corners.append((x1, y1, x2, y2))
        if not parts:
            raise ValueError
    except ValueError:
        raise ManifestError(
            f"label must be 'opacity 1 x1 y1 x2 y2 ...' or 'none 1 0 0 1 1'. Received: {text[:80]!r}"
        ) from None
    left = list(corners)
    for x, y, w, h in boxes:
        for other in left:
            if all(abs(a - b) <= _CORNERS_DIFFER for a, b in zip((x, y, x + w, y + h), other, strict=True)):
                left.remove(other)
                break
    if left or len(boxes) != len(corners):
        raise ManifestError(f"boxes and label differ. Received: boxes {boxes}, label {text[:80]!r}")


def _patients(studies: list[str], patients: list[str | None]) -> list[str]:
    """Fills in patients that a header does not tell: that of the study's other images, else one for the study."""
    of_study = {study: patient for study, patient in zip(studies, patients, strict=True) if patient}
    alone = {study for study in studies if study not in of_study}
    if alone:
        warnings.warn(
            f"{len(alone)} of {len(set(studies))} studies have no PatientID: each counts as a patient of its own",
            ManifestWarning,
            stacklevel=3,
        )
    return [patient or of_study.get(study, f"study {study}") for study, patient in zip(studies, patients, strict=True)]


def _short(path: Path) -> str:
    return "/".join(path.parts[-4:])
