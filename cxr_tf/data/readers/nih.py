"""NIH ChestX-ray14 (Wang et al., CVPR 2017, arXiv:1705.02315), as its folder is published.

    <root>/Data_Entry_2017.csv, or Data_Entry_2017_v2020.csv    a row a film: findings joined by "|", patient, age, view
    <root>/train_val_list.txt, test_list.txt                    the official split, by patient: a file name a line
    <root>/BBox_List_2017.csv                                   984 boxes on 880 films, in pixels of the 1024 x 1024 PNG
    <root>/images/*.png, or images_001/images/*.png to images_012/images/*.png

Findings were mined from reports. Boxes are a radiologist's, who was given a film and one of eight findings: a box says
where that finding is, and nothing of the others.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cxr_tf.data.manifest import LABEL, Boxes, ManifestError, ManifestWarning, make_manifest, missing_columns, read_csv
from cxr_tf.data.readers.headers import Progress, check_annotations, leads_out, read_headers
from cxr_tf.errors import nearest

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
BOXED = FINDINGS[:8]  # the findings that have boxes
OPACITIES = ("Infiltration", "Pneumonia")

_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # where both are there, the later one is read
_TRAIN, _TEST, _BOXES = "train_val_list.txt", "test_list.txt", "BBox_List_2017.csv"
_COLUMNS = ("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "View Position")
_SEX_COLUMNS = ("Patient Gender", "Patient Sex", "Sex")
_BOX_COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")  # the header is "...,Bbox [x,y,w,h],,,"
_NO_FINDING = "No Finding"
_ALIASES = {"Infiltrate": "Infiltration"}  # the spelling of the box list
_BOX_FRAME = 1024  # pixels a side of the published films, which boxes count in
_SEXES = {"M": "M", "F": "F"}
_OLDEST = 120  # years; the 2017 file has ages up to 414
_AGE_UNITS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_LAYOUT = (
    f"An NIH ChestX-ray14 folder holds {_TABLES[1]} or {_TABLES[0]}, {_TRAIN}, {_TEST}, {_BOXES}, and the films in "
    "images/ or in images_001/images/ to images_012/images/; give the folder that they are in."
)


def read_nih(
    root: str | os.PathLike[str],
    *,
    findings: Sequence[str] = FINDINGS,
    mask_findings: Sequence[str] = OPACITIES,
    missing: str = "error",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Reads the data set's folder.

    A mask is known only as far as somebody drew it: where a film has a box of one of `mask_findings`, and of each other
    of them that its labels name. No film has a known empty mask, "No Finding" neither, as no radiologist looked for it.

    Args:
        root: the folder that holds the CSV file and the images.
        findings: which of `FINDINGS` become classes, in this order. A film has any number of them, "No Finding" none.
        mask_findings: whose boxes make the mask, of `BOXED`. By default those that stand for what the pneumonia and
            COVID-19 challenges outline, a lung opacity; the box of a heart, a mass or a pneumothorax is none. Of the
            880 films with boxes, 230 have one of these two, and 187 a known mask.
        missing: "error", or "skip" where only some of the archives were fetched: films without a file are left out,
            with a warning that counts them.
        progress: called with (done, total) while the headers of films with such boxes are read.

    Returns:
        A manifest in the order of the rows. `split` is "train" and "test" by the official lists: validation films are
        yours to carve out of "train"; None for films in neither. `patient_id` is the number, `study_id`
        "<patient>/<follow-up>". Boxes are in pixels of the film that is there: copies that were resized as a whole have
        them scaled. Ages over 120 years are NaN.

    Raises:
        ManifestError: the folder is not laid out as above, an option is not known, or some of it does not fit together:
            missing columns, unknown findings, patients that are no number or not the one in the film's name, films that
            are named twice, have no file or several, links that lead out of the folder, one list without the other, a
            film or a patient in both lists, boxes that cannot be read or lie outside of their film. All are listed.

    Warns:
        ManifestWarning: films left out by `missing`, files that no row names, ages that cannot be true, no lists or
            boxes at all, films in no list, lists and boxes that name films without a row, boxes cut off at an edge.

    Example:
        >>> manifest = read_nih("/data/nih", findings=["Pneumonia", "Infiltration"], missing="skip")
    """
    _check_names("findings", findings, FINDINGS)
    _check_names("mask_findings", mask_findings, BOXED)
    if missing not in ("error", "skip"):
        raise ManifestError(f'missing must be "error" or "skip". Received: {missing!r}')
    folder = Path(os.path.abspath(root))  # noqa: PTH100 - links stay as they are
    notes: list[str] = []
    try:
        folders = _image_folders(folder)
        files, problems = _files(folder, folders)
    except OSError as error:
        raise ManifestError(f"cannot be listed: {error.strerror}", error.filename or str(root)) from error
    table, file = _read_table(folder)
    names = list(table["Image Index"])
    problems += _name_problems(table, file)
    patients = _patients(table, file, problems)
    found = _findings(table["Finding Labels"], file, problems)
    splits = _splits(folder, names, patients, problems, notes)
    boxes, boxed = _boxes(folder, names, mask_findings, problems, notes)
    ages = _ages(table["Patient Age"], notes)

    absent = [row for row, name in enumerate(names) if name not in files and Path(name).name == name]
    if missing == "error":
        where = f"{folders[0]}/" if len(folders) == 1 else f"{folders[0]}/ to {folders[-1]}/"
        advice = ' (missing="skip" leaves such films out)'
        for row in absent:
            problems.append(f"{file}: line {row + 2}: there is no file {names[row]} in {where}{advice}")
            advice = ""
    elif absent:
        notes.append(
            f"{len(absent)} of {len(names)} films have no file and are left out, the first is {names[absent[0]]}"
        )
    strange = sorted(files.keys() - set(names))
    if strange:
        notes.append(f"no row of {file} names {len(strange)} files, which are not read; the first is {strange[0]}")
    if problems:
        raise ManifestError(problems, str(root))
    gone = set(absent)
    rows = [row for row in range(len(names)) if row not in gone]
    if not rows:
        raise ManifestError(f"none of the {len(names)} films of {file} is there. {_LAYOUT}", str(root))

    framed = [names[row] for row in rows if names[row] in boxes]
    headers = read_headers([files[name] for name in framed], progress)
    for name, header in zip(framed, headers, strict=True):
        if header is not None and (header.width, header.height) != (_BOX_FRAME, _BOX_FRAME):
            across, down = header.width / _BOX_FRAME, header.height / _BOX_FRAME
            boxes[name] = [[x * across, y * down, w * across, h * down] for x, y, w, h in boxes[name]]
    problems = check_annotations(
        [f"{_BOXES}: {name}" for name in framed], headers, [boxes[name] for name in framed], [None] * len(framed)
    )
    if problems:
        raise ManifestError(problems, str(root))
    for note in notes:
        warnings.warn(note, ManifestWarning, stacklevel=2)

    masked = set(mask_findings)
    sexes = next(table[name] for name in _SEX_COLUMNS if name in table)
    films = [names[row] for row in rows]

    def of(values: Iterable[Any]) -> list[Any]:
        every = list(values)
        return [every[row] for row in rows]

    return make_manifest(
        {
            "image": [files[name] for name in films],
            "source": ["nih"] * len(rows),
            "patient_id": of(patients),
            "study_id": [
                f"{p}/{s or n}" for p, s, n in zip(of(patients), of(table["Follow-up #"]), films, strict=True)
            ],
            "view": [text.upper() or None for text in of(table["View Position"])],
            "sex": [_SEXES.get(text.upper()) for text in of(sexes)],
            "age": of(ages),
            **{
                LABEL + name: [float("nan") if some is None else float(name in some) for some in of(found)]
                for name in findings
            },
            "boxes": [boxes.get(name, []) for name in films],
            "mask": [None] * len(rows),
            "mask_known": [
                name in boxes and masked & (some or frozenset()) <= boxed[name]
                for name, some in zip(films, of(found), strict=True)
            ],
            "split": of(splits),
        }
    )


def _check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(names, str) or len(set(names)) != len(names):
        raise ManifestError(f"`{option}` must be a list in which no name occurs twice. Received: {names!r}")
    for name in names:
        if name not in known:
            raise ManifestError(
                f"`{option}` has an unknown name.{nearest(str(name), known)} Known: {', '.join(known)}. "
                f"Received: {name!r}"
            )


def _image_folders(folder: Path) -> list[str]:
    """The folders that films are in, relative to the root."""
    # One by one, for `glob` passes over folders that it may not read, and their films with them.
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    parts = [path / "images" for path in there if path.name.startswith("images_")]
    folders = [path.relative_to(folder).as_posix() for path in (folder / "images", *parts) if path.is_dir()]
    if not folders:
        packed = [path.name for path in there if path.match("images_*.tar.gz")]
        advice = f"Unpack {packed[0]} and its like first. " if packed else ""
        raise ManifestError(f"there is no images/ and no images_001/images/ in it. {advice}{_LAYOUT}", str(folder))
    return folders


def _files(folder: Path, folders: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """File name -> path, for all files that are not hidden, and the problems."""
    home = os.path.realpath(folder)
    files: dict[str, str] = {}
    problems = []
    for part in folders:
        if leads_out(folder / part, home):
            problems.append(f"{part}/ leads out of {folder}")
            continue
        with os.scandir(folder / part) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.is_file():
                    continue
                if entry.is_symlink() and leads_out(entry.path, home):
                    problems.append(f"{part}/{entry.name} leads out of {folder}")
                if entry.name in files:
                    problems.append(f"film {entry.name} has two files, {files[entry.name]} and {entry.path}")
                files[entry.name] = entry.path
    return files, sorted(problems)


def _read_table(folder: Path) -> tuple[pd.DataFrame, str]:
    """The table of films and its file's name."""
    file = next((name for name in _TABLES if (folder / name).is_file()), None)
    if file is None:
        raise ManifestError(f"there is no {_TABLES[1]} and no {_TABLES[0]} in it. {_LAYOUT}", str(folder))
    table = read_csv(folder / file, commas=True)
    problems = missing_columns(table, file, _COLUMNS)
    if not any(name in table for name in _SEX_COLUMNS):
        others = [name for name in table.columns if name not in _COLUMNS]
        problems.append(
            f"{file}: column {_SEX_COLUMNS[0]!r} (or {_SEX_COLUMNS[1]!r}) is missing.{nearest(_SEX_COLUMNS[0], others)}"
        )
    if not problems and not len(table):
        problems.append(f"{file}: it has no row.")
    if problems:
        raise ManifestError(problems, str(folder))
    return table, file


def _name_problems(table: pd.DataFrame, file: str) -> list[str]:
    """Names that cannot be a film's, and names that stand in several rows."""
    problems = []
    first: dict[str, int] = {}
    for line, name in enumerate(table["Image Index"], start=2):
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            problems.append(
                f"{file}: line {line}: Image Index must be a file's name, without folders. Received: {name!r}"
            )
        elif first.setdefault(name, line) != line:
            problems.append(f"{file}: line {line}: film {name} is listed twice, first in line {first[name]}")
    return problems


def _patients(table: pd.DataFrame, file: str, problems: list[str]) -> list[str]:
    """The number of each film's patient, which its name starts with, too."""
    patients = []
    for line, (name, text) in enumerate(zip(table["Image Index"], table["Patient ID"], strict=True), start=2):
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
            received = "other text" if text else "a blank"  # no patient's key
            problems.append(f"{file}: line {line}: Patient ID must be a whole number. Received: {received}")
            patients.append("")
            continue
        patients.append(str(int(text)))
        named = re.match(r"(\d{8})_", name, re.ASCII)
        if named and int(named[1]) != int(text):
            problems.append(f"{file}: line {line}: the Patient ID is not the one in the film's name, {name}")
    return patients


def _findings(texts: pd.Series, file: str, problems: list[str]) -> list[frozenset[str] | None]:
    """The findings of each film, None where the cell is blank."""
    parsed: dict[str, frozenset[str] | None] = {}
    known = (*FINDINGS, _NO_FINDING)
    for text, count in Counter(texts).items():  # a few hundred different ones
        parts = [part.strip() for part in text.split("|")]
        problems += [
            f"{file}: {count} rows have an unknown finding.{nearest(part, known)} Known: {', '.join(known)}. "
            f"Received: {text!r}"
            for part in (parts if text else ())
            if part not in known
        ]
        if _NO_FINDING in parts and len(parts) > 1:
            problems.append(f"{file}: {count} rows have {_NO_FINDING!r} beside a finding. Received: {text!r}")
        parsed[text] = frozenset(parts) - {_NO_FINDING} if text else None
    return [parsed[text] for text in texts]


def _ages(texts: pd.Series, notes: list[str]) -> list[float]:
    """Years: "58", or "058Y", "006M" and "012D" in the oldest files."""
    ages = []
    wrong = []
    for line, text in enumerate(texts, start=2):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([YMWD]?)", text.upper(), re.ASCII)
        years = float(match[1]) * _AGE_UNITS[match[2]] if match else float("nan")
        if text and not years <= _OLDEST:
            wrong.append(f"{text!r} in line {line}")
            years = float("nan")
        ages.append(years)
    if wrong:
        notes.append(
            f"{len(wrong)} ages are no number of years up to {_OLDEST} and count as unknown, the first is {wrong[0]}"
        )
    return ages


def _splits(
    folder: Path, names: list[str], patients: list[str], problems: list[str], notes: list[str]
) -> list[str | None]:
    """The official split of each row."""
    there = [name for name in (_TRAIN, _TEST) if (folder / name).is_file()]
    if not there:
        notes.append(f"there is no {_TRAIN} and no {_TEST}: no film has a split")
        return [None] * len(names)
    if len(there) == 1:
        problems.append(f"there is {there[0]}, but no {_TEST if there[0] == _TRAIN else _TRAIN}")
        return [None] * len(names)
    train, test = (_read_list(folder / name, problems) for name in (_TRAIN, _TEST))
    problems += [f"film {name} is in {_TRAIN} and in {_TEST}" for name in test if name in train]
    strangers = sorted((train.keys() | test.keys()) - set(names))
    if strangers:
        notes.append(f"{_TRAIN} and {_TEST} name {len(strangers)} films without a row, the first is {strangers[0]}")
    splits = ["train" if name in train else "test" if name in test else None for name in names]
    if None in splits:
        notes.append(
            f"{splits.count(None)} films are in neither {_TRAIN} nor {_TEST} and have no split, the first is "
            f"{names[splits.index(None)]}"
        )
    sides: dict[str, dict[str, str]] = {}
    for name, patient, split in zip(names, patients, splits, strict=True):
        if split and patient:
            sides.setdefault(patient, {}).setdefault(split, name)
    problems += [
        f"film {films['train']} in {_TRAIN} and film {films['test']} in {_TEST} are of one patient"
        for films in sides.values()
        if len(films) == 2 and films["train"] not in test
    ]
    return splits


def _read_list(path: Path, problems: list[str]) -> dict[str, int]:
    """File name -> its line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ManifestError(f"cannot read it: {error.strerror or error}", str(path)) from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"it must be UTF-8 text. Received: other bytes ({error.reason})", str(path)) from error
    names: dict[str, int] = {}
    for line, name in enumerate(map(str.strip, text.splitlines()), start=1):
        if name and names.setdefault(name, line) != line:
            problems.append(f"{path.name}: line {line}: film {name} is listed twice, first in line {names[name]}")
    return names


def _boxes(
    folder: Path, names: list[str], chosen: Sequence[str], problems: list[str], notes: list[str]
) -> tuple[dict[str, Boxes], dict[str, set[str]]]:
    """The boxes of chosen findings of each film that has some, and which of these findings they are of."""
    boxes: dict[str, Boxes] = {}
    boxed: dict[str, set[str]] = {}
    if not (folder / _BOXES).is_file():
        if chosen:
            notes.append(f"there is no {_BOXES}: no film has a known mask")
        return boxes, boxed
    table = read_csv(folder / _BOXES, commas=True)  # the published one has three at the end of its first line
    columns = missing_columns(table, _BOXES, _BOX_COLUMNS)
    if columns:
        problems += columns
        return boxes, boxed
    films = set(names)
    strangers = []
    seen: dict[tuple[str, ...], int] = {}
    for line, row in enumerate(table[list(_BOX_COLUMNS)].itertuples(index=False, name=None), start=2):
        name, text, *cells = row
        where = f"{_BOXES}: line {line}"
        finding = _ALIASES.get(text, text)
        box = [_number(cell) for cell in cells]
        if finding not in BOXED:
            problems.append(
                f"{where}: unknown finding.{nearest(text, BOXED)} Known: {', '.join(BOXED)}. Received: {text!r}"
            )
        elif not (all(abs(value) < 1e9 for value in box) and box[2] > 0 and box[3] > 0):
            problems.append(f"{where}: x, y, w and h must be numbers, the last two above 0. Received: {cells}")
        elif seen.setdefault(row, line) != line:
            problems.append(f"{where}: repeats line {seen[row]}")
        elif name not in films:
            strangers.append(name)
        elif finding in chosen:
            boxes.setdefault(name, []).append(box)
            boxed.setdefault(name, set()).add(finding)
    if strangers:
        notes.append(f"{_BOXES} has {len(strangers)} boxes of films without a row, the first is of {strangers[0]!r}")
    return boxes, boxed


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
