"""CheXpert (Irvin et al., AAAI 2019, arXiv:1901.07031), as its folder is published.

    CheXpert-v1.0-small/train.csv, valid.csv    Path, Sex, Age, Frontal/Lateral, AP/PA and a column for each finding
    CheXpert-v1.0-small/{train,valid}/patientNNNNN/studyN/viewN_{frontal,lateral}.jpg

The full-size set is called `CheXpert-v1.0`, or comes in batches, which are read as they are:

    CheXpert-v1.0 batch 1 (validate & csv)/train.csv, valid.csv, valid/patientNNNNN/...
    CheXpert-v1.0 batch 2 (train 1)/patientNNNNN/...    likewise "batch 3 (train 2)" and "batch 4 (train 3)"

A finding is 1, 0, -1 where the report is not certain, or blank where it does not mention it. There are no masks.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cxr_tf.data.manifest import LABEL, ManifestError, ManifestWarning, make_manifest, missing_columns, read_csv
from cxr_tf.data.readers.headers import Progress, leads_out
from cxr_tf.errors import nearest

FINDINGS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)

_NO_FINDING, _NO_PATHOLOGY = FINDINGS[0], (FINDINGS[0], FINDINGS[-1])
_CSV = {"train": "train.csv", "validation": "valid.csv"}
_FOLDER = {"train": "train", "validation": "valid"}
_BATCHES = {"train": "CheXpert-v1.0 batch * (train *)", "validation": "CheXpert-v1.0 batch * (validate*)/valid"}
_COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS)
_UNCERTAIN = {"ignore": float("nan"), "one": 1.0, "zero": 0.0}
_BLANK = {"ignore": float("nan"), "zero": 0.0}
_SEXES = {"Male": "M", "Female": "F", "Unknown": None, "": None}
_VIEWS = {  # LL and RL: 17 frontal films of the published set, which may be either
    ("Frontal", "AP"): "AP",
    ("Frontal", "PA"): "PA",
    ("Frontal", "LL"): None,
    ("Frontal", "RL"): None,
    ("Frontal", ""): None,
    ("Lateral", ""): "LATERAL",
    ("Lateral", "LL"): "LATERAL",
    ("Lateral", "RL"): "LATERAL",
}
_PATH = re.compile(
    r"(?:CheXpert-v1\.0(?:-small)?/)?((train|valid)/(patient\d+)/(study\d+)/(view\d+_(frontal|lateral)\.jpg))", re.ASCII
)
_LAYOUT = (
    "A CheXpert folder (CheXpert-v1.0-small, CheXpert-v1.0) holds train.csv, valid.csv, train/ and valid/; give that "
    'folder or the one that it is in. Of the full-size set in batches, give the folder that holds "CheXpert-v1.0 batch '
    '1 (validate & csv)" and the others.'
)
_STEP = 1000  # films between two reports of progress


def read_chexpert(
    root: str | os.PathLike[str],
    *,
    split: str = "train",
    findings: Sequence[str] = FINDINGS,
    uncertain: str | Mapping[str, str] = "ignore",
    blank: str = "ignore",
    frontal_only: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Reads the data set's folder.

    By default nothing is claimed that a report does not say: uncertain and unmentioned findings are unknown, and an
    unknown label adds nothing to a loss. Which reading of -1 serves best differs from finding to finding, as the
    paper's comparison shows, and is yours to choose.

    Args:
        root: the folder that holds the CSV files, whatever it is called, or the one that it, or the batches, are in.
        split: "train" (train.csv), "validation" (valid.csv, labeled by radiologists) or "all": both, in this order.
        findings: which of `FINDINGS`, in the order that the manifest's classes shall have.
        uncertain: how -1 is read: "ignore" (unknown), "one" or "zero", or `{finding: reading}`, in which findings that
            are not named are ignored.
        blank: how a blank is read: "ignore" (unknown) or "zero", a common practice. A blank "No Finding" is 0 in any
            case where a finding other than "Support Devices" is 1: it cannot be 1 there by its definition, and
            train.csv has no 0 for it.
        frontal_only: leaves lateral films out, before their files are looked for.
        progress: called with (done, total) while files are looked for.

    Returns:
        A manifest in the order of the rows. `split` is None for films of train.csv, which are yours to divide, and
        "validation" for those of valid.csv. `patient_id` is "patientNNNNN" and `study_id` "patientNNNNN/studyN".
        `view` is "AP", "PA", "LATERAL", or None where a frontal film does not say which it is. An age of 0, a
        placeholder, is NaN. All masks are unknown.

    Raises:
        ManifestError: the folder is not laid out as above, an option is not known, or rows are malformed: missing
            columns, values other than the published ones, paths of another form, films that are named twice or have no
            file, links that lead out of the folder, a patient in both files. All such rows are listed.

    Warns:
        ManifestWarning: films that are frontal by their name and lateral by their row, or the reverse; the row counts.

    Example:
        >>> manifest = read_chexpert(
        ...     "/data/CheXpert-v1.0-small", findings=["Edema", "Consolidation"], frontal_only=True,
        ...     uncertain={"Edema": "one", "Consolidation": "zero"},
        ... )
    """
    uncertain_of = _options(split, findings, uncertain, blank)
    folder = Path(os.path.abspath(root))  # noqa: PTH100 - links stay as they are
    home = os.path.realpath(folder)
    splits = list(_CSV) if split == "all" else [split]
    try:
        places = [_locate(folder, name) for name in splits]
        patients = [_patient_folders(folders, home) for _, folders in places]
    except OSError as error:
        raise ManifestError(f"cannot be listed: {error.strerror}", error.filename or str(root)) from error
    tables = [read_csv(csv) for csv, _ in places]
    problems = [
        text
        for name, table in zip(splits, tables, strict=True)
        for text in missing_columns(table, _CSV[name], _COLUMNS)
    ]
    if problems:
        raise ManifestError(problems, str(root))

    columns: dict[str, list[Any]] = {}
    films: list[_Film] = []
    for name, table, folders in zip(splits, tables, patients, strict=True):
        table.index += 2  # the line of a row, as editors count
        if frontal_only:
            table = table[table["Frontal/Lateral"] != "Lateral"]
        films += _films(table, name, folders, problems)
        part = _described(table, _CSV[name], problems)
        part |= _labels(table, _CSV[name], findings, uncertain_of, _BLANK[blank], problems)
        part["split"] = [None if name == "train" else name] * len(table)
        for column, values in part.items():
            columns.setdefault(column, []).extend(values)
    problems += _shared(films)
    problems += _file_problems(films, home, progress)
    if problems:
        raise ManifestError(problems, str(root))
    if not films:
        raise ManifestError(f"no row names a{' frontal' if frontal_only else ''} film.", str(root))
    odd = [film for film in films if film.odd]
    if odd:
        warnings.warn(
            f"{len(odd)} films are frontal by their name and lateral by their row, or the reverse; the row counts. The "
            f"first is in {odd[0].where}",
            ManifestWarning,
            stacklevel=2,
        )
    return make_manifest(
        {
            "image": [f"{film.folder}/{film.study}/{film.name}" for film in films],
            "source": ["chexpert"] * len(films),
            "patient_id": [film.patient for film in films],
            "study_id": [f"{film.patient}/{film.study}" for film in films],
            **columns,
            "boxes": [[] for _ in films],
            "mask": [None] * len(films),
            "mask_known": [False] * len(films),
        }
    )


class _Film(NamedTuple):
    """A row's film: where the row is, and what its path says."""

    where: str
    split: str
    patient: str
    study: str
    name: str
    folder: str | None  # of the patient; None where there is none, "" where a link leads out
    odd: bool


def _options(split: str, findings: Sequence[str], uncertain: str | Mapping[str, str], blank: str) -> dict[str, float]:
    """What -1 of each finding stands for."""
    problems = []
    if split not in (*_CSV, "all"):
        problems.append(f'split must be "train", "validation" or "all". Received: {split!r}')
    if blank not in _BLANK:
        problems.append(f'blank must be "ignore" or "zero". Received: {blank!r}')
    if isinstance(findings, str) or len(set(findings)) != len(findings):
        problems.append(f"findings must be a list that names each once. Received: {findings!r}")
        findings = []
    by_finding = uncertain if isinstance(uncertain, Mapping) else dict.fromkeys(FINDINGS, uncertain)
    for option, given in (("findings", findings), ("uncertain", by_finding)):
        problems += [
            f"{option}: there is no finding {name!r}.{nearest(name, FINDINGS)} Known: {', '.join(FINDINGS)}"
            for name in given
            if name not in FINDINGS
        ]
    problems += [
        f'uncertain must be "ignore", "one" or "zero", or a mapping of findings to these. Received: {reading!r}'
        for reading in dict.fromkeys(by_finding.values())
        if reading not in _UNCERTAIN
    ]
    if problems:
        raise ManifestError(problems)
    return {name: _UNCERTAIN[by_finding.get(name, "ignore")] for name in FINDINGS}


def _locate(folder: Path, split: str) -> tuple[Path, list[Path]]:
    """The CSV file, and the folders that hold the patients' folders."""
    csv, name = _CSV[split], _FOLDER[split]
    homes = [folder] if (folder / csv).is_file() else sorted(p.parent for p in folder.glob(f"*/{csv}") if p.is_file())
    if not homes:
        raise ManifestError(f"there is no {csv} in it. {_LAYOUT}", str(folder))
    if len(homes) > 1:
        found = ", ".join(repr(home.name) for home in homes)
        raise ManifestError(
            f"there is a {csv} in several folders of it; give one of them. Received: {found}", str(folder)
        )
    films = [homes[0] / name]
    if not films[0].is_dir():
        films = sorted(path for path in folder.glob(_BATCHES[split]) if path.is_dir())
    if not films:
        raise ManifestError(f"there is no folder {name!r} beside {csv}. {_LAYOUT}", str(folder))
    return homes[0] / csv, films


def _patient_folders(folders: Sequence[Path], home: str) -> dict[str, str]:
    """Patient -> folder, "" where a link leads out."""
    patients: dict[str, str] = {}
    for folder in folders:
        if leads_out(folder, home):
            raise ManifestError(f"{folder.name} leads out of it; give the folder that it leads into.", home)
        with os.scandir(folder) as entries:
            for entry in entries:
                patients[entry.name] = "" if entry.is_symlink() and leads_out(entry.path, home) else entry.path
    return patients


def _films(table: pd.DataFrame, split: str, folders: Mapping[str, str], problems: list[str]) -> list[_Film]:
    """The films of all rows but those whose path has another form or is named twice."""
    films: list[_Film] = []
    lines: dict[str, int] = {}
    for line, text, kind in zip(table.index, table["Path"], table["Frontal/Lateral"], strict=True):
        where = f"{_CSV[split]}: line {line}"
        match = _PATH.fullmatch(text)
        if match is None or match[2] != _FOLDER[split]:
            problems.append(
                f"{where}: Path must look like CheXpert-v1.0-small/{_FOLDER[split]}/patient00001/study1/"
                f"view1_frontal.jpg. Received: {text!r}"
            )
            continue
        path, _, patient, study, name, side = match.groups()
        if lines.setdefault(path, line) != line:
            problems.append(f"{where}: names {path}, as line {lines[path]} does")
            continue
        films.append(_Film(where, split, patient, study, name, folders.get(patient), side != kind.lower()))
    return films


def _shared(films: Sequence[_Film]) -> list[str]:
    """Films whose patient is in the other file too."""
    first: dict[str, _Film] = {}
    return [
        f"{film.where}: its patient is in {first[film.patient].where} too; nobody may be in both files"
        for film in films
        if first.setdefault(film.patient, film).split != film.split
    ]


def _file_problems(films: Sequence[_Film], home: str, progress: Progress | None) -> list[str]:
    """What is wrong with the files, by one system call a film and one a study: there are 223,414 of the former."""
    problems = []
    studies: dict[str, str] = {}
    for number, film in enumerate(films, start=1):
        wrong = "leads out of the folder" if film.folder == "" else ""
        if film.folder is None:
            wrong = "there is no such file"
        elif film.folder:
            study = f"{film.folder}/{film.study}"
            if study not in studies:
                studies[study] = _wrong(study, home, stat.S_ISDIR)
            wrong = studies[study] or _wrong(f"{study}/{film.name}", home, stat.S_ISREG)
        if wrong:
            path = f"{_FOLDER[film.split]}/{film.patient}/{film.study}/{film.name}"
            problems.append(f"{film.where}: {wrong}. Received: {path!r}")
        if progress and (number % _STEP == 0 or number == len(films)):
            progress(number, len(films))
    return problems


def _wrong(path: str, home: str, is_kind: Callable[[int], bool]) -> str:
    """Why a path is no file or folder within `home`; "" where it is."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            if leads_out(path, home):
                return "leads out of the folder"
            mode = os.stat(path).st_mode  # noqa: PTH116 - beside lstat
    except (FileNotFoundError, NotADirectoryError):
        return "there is no such file"
    except OSError as error:
        return f"cannot be reached: {error.strerror}"
    return "" if is_kind(mode) else "there is no such file"


def _described(table: pd.DataFrame, file: str, problems: list[str]) -> dict[str, list[Any]]:
    """View, sex and age."""
    views = []
    for line, kind, projection in zip(table.index, table["Frontal/Lateral"], table["AP/PA"], strict=True):
        if (kind, projection) not in _VIEWS:
            problems.append(
                f"{file}: line {line}: Frontal/Lateral must be Frontal, with AP, PA, LL, RL or a blank in AP/PA, or "
                f"Lateral, with LL, RL or a blank. Received: {kind!r}, {projection!r}"
            )
        views.append(_VIEWS.get((kind, projection)))
    ages = {text: age for text in table["Age"].unique() if (age := _age(text)) is not None}
    return {
        "view": views,
        "sex": _values(table["Sex"], _SEXES, "Male, Female, Unknown or blank", file, problems),
        "age": _values(table["Age"], ages, "0 to 150 years, or blank", file, problems),
    }


def _age(text: str) -> float | None:
    """Years, NaN for 0 and blank, None for what is no age."""
    if not re.fullmatch(r"\d{0,3}(\.0)?", text, re.ASCII) or float(text or 0) > 150:
        return None
    return float(text or 0) or float("nan")


def _labels(
    table: pd.DataFrame,
    file: str,
    findings: Sequence[str],
    uncertain_of: Mapping[str, float],
    blank: float,
    problems: list[str],
) -> dict[str, list[Any]]:
    columns = {}
    for name in findings:
        readings = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "": blank}
        accepted = "1, 0 or blank"
        if name != _NO_FINDING:
            readings |= {"-1": uncertain_of[name], "-1.0": uncertain_of[name]}
            accepted = "1, 0, -1 or blank"
        columns[LABEL + name] = _values(table[name], readings, accepted, file, problems)
    if _NO_FINDING in findings:
        pathologies = [name for name in FINDINGS if name not in _NO_PATHOLOGY]
        found = np.logical_or.reduce([table[name].isin(["1", "1.0"]).to_numpy() for name in pathologies])
        values = np.array(columns[LABEL + _NO_FINDING])
        values[found & (table[_NO_FINDING] == "").to_numpy()] = 0
        columns[LABEL + _NO_FINDING] = values.tolist()
    return columns


def _values(cells: pd.Series, readings: Mapping[str, Any], accepted: str, file: str, problems: list[str]) -> list[Any]:
    """What the cells of a column stand for; those that stand for nothing become problems."""
    strange = cells[~cells.isin(list(readings))]
    problems += [
        f"{file}: line {line}: {cells.name} must be {accepted}. Received: {text!r}" for line, text in strange.items()
    ]
    return [readings.get(text) for text in cells]
