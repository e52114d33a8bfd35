"""COVID-19 image data collection (Cohen et al., arXiv:2003.11597, github.com/ieee8023/covid-chestxray-dataset).

    <root>/metadata.csv     a row an image: patientid, offset, sex, age, finding, view, filename, license and others
    <root>/images/          radiographs and slices of CT, JPEG and PNG
    <root>/volumes/         CT volumes, which are left out

The file has had hundreds of revisions. All are read: column names in any case, `modality` and `folder` where they are
there, and findings as paths (`Pneumonia/Viral/COVID-19`) or, in the older ones, flat (`COVID-19, ARDS`). Columns that
tell about a person (`location`, `date`, `clinical_notes`, ...) never enter the manifest.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_tf.data.manifest import LABEL, ManifestError, ManifestWarning, make_manifest, read_csv
from cxr_tf.data.readers.headers import Progress, leads_out
from cxr_tf.errors import nearest

FRONTAL = ("PA", "AP", "AP Supine", "AP Erect", "AP semi erect")
CLASSES: Mapping[str, Sequence[str]] = {
    "No finding": ("No Finding",),
    "COVID-19": ("Pneumonia/Viral/COVID-19", "COVID-19"),
    "Other viral": (
        "Pneumonia/Viral",
        "SARS",
        "MERS",
        "MERS-CoV",
        "Influenza",
        "Swine-Origin Influenza A (H1N1) Viral Pneumonia",
        "Varicella",
        "Herpes",
        "Herpes pneumonia",
    ),
    "Bacterial": (
        "Pneumonia/Bacterial",
        "Bacterial",
        "Streptococcus",
        "Staphylococcus",
        "MRSA",
        "Klebsiella",
        "Legionella",
        "Mycoplasma",
        "Mycoplasma Bacterial Pneumonia",
        "Chlamydophila",
        "E.Coli",
        "Nocardia",
    ),
    "Other": (
        "Pneumonia/Fungal",
        "Pneumonia/Lipoid",
        "Pneumonia/Aspiration",
        "Tuberculosis",
        "Spinal Tuberculosis",
        "ARDS",
        "Pneumocystis",
        "Aspergillosis",
        "Invasive Aspergillosis",
        "Allergic bronchopulmonary aspergillosis",
        "Lipoid",
        "Aspiration",
        "Aspiration pneumonia",
        "Eosinophilic pneumonia",
        "Chronic eosinophilic pneumonia",
        "Organizing pneumonia",
        "Cryptogenic organizing pneumonia",
        "Cryptogenic organising pneumonia",
        "Unusual interstitial pneumonia",
        "Accelerated Phase Usual Interstitial Pneumonia",
        "Lymphocytic interstitial pneumonia",
        "Desquamative interstitial pneumonia",
    ),
}
# Findings that say nothing of the cause: no class can be told, and that is as it should be.
_UNDECIDED = ("", "todo", "unknown", "pneumonia", "lobar pneumonia", "multilobar pneumonia", "round pneumonia")
_COURSE = "ards"  # what a pneumonia led to; its cause stands beside it

_METADATA, _IMAGES = "metadata.csv", "images"
_COLUMNS = ("patientid", "offset", "sex", "age", "finding", "view", "filename", "license")
_LATER_COLUMNS = ("modality", "folder")
_CT_VIEWS = ("ct", "axial", "coronal", "sagittal")
_SEXES = {"M": "M", "F": "F"}
_OLDEST = 120  # years
_LAYOUT = f"A COVID-19 image data collection holds {_METADATA} and {_IMAGES}/; give the folder that they are in."


def read_covid19(
    root: str | os.PathLike[str],
    *,
    views: Sequence[str] | str = FRONTAL,
    licenses: Sequence[str] | None = None,
    classes: Mapping[str, Sequence[str]] = CLASSES,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Reads the collection's folder.

    Args:
        root: the folder that holds `metadata.csv` and `images`.
        views: which views, as the file calls them, in any case; by default the frontal ones. "all" reads lateral films
            and those without a view, too. CT is never read.
        licenses: only films with one of these licenses, each in full and as the file writes it, in any case: "CC BY" is
            not "CC BY 4.0", nor "CC BY-NC-SA", which asks for more. "" stands for no license. By default all films.
        classes: `{class: findings}`, in the order of the manifest's classes. A finding stands for all below it
            ("Pneumonia/Viral" for "Pneumonia/Viral/SARS") that no class names more closely; case does not matter.
        progress: called with (done, total) once all films have been found; nothing here takes time.

    Returns:
        A manifest in the order of the rows, one class a film, `split` None and no mask known. Labels are unknown where
        a finding is in no class ("todo", "Unknown", "Pneumonia" without its cause) or in several; ARDS beside a cause
        does not count. `view` is in capitals, "LATERAL" for "L"; `study_id` is "<patient>/<offset>", so that films of a
        day are one study. The further columns `finding` and `license` are carried along as they stand in the file.

    Raises:
        ManifestError: the folder is not laid out as above, an option has a view or license that is not there, or rows
            are malformed: missing columns, films that are named twice or have no file, names with folders in them,
            links that lead out of the folder. All such rows are listed.

    Warns:
        ManifestWarning: how many rows are left out and why, rows without a patient, findings that no class knows, files
            that no row names.

    Example:
        >>> manifest = read_covid19("/data/covid-chestxray-dataset", licenses=["CC BY", "CC BY 3.0", "CC BY 4.0"])
    """
    classes_of = _meanings(classes)
    folder = Path(os.path.abspath(root))  # noqa: PTH100 - links stay as they are
    try:
        table = _read_metadata(folder)
        files, problems = _files(folder)
    except OSError as error:
        raise ManifestError(f"cannot be listed: {error.strerror}", error.filename or str(root)) from error

    total = len(table)
    strays = sorted(files.keys() - set(table["filename"]))
    is_ct = _is_ct(table)
    table = table[~is_ct]
    left_out = [f"{is_ct.sum()} of CT"] if is_ct.any() else []
    if licenses is not None:
        chosen = _chosen(table["license"], "licenses", licenses, known=())
        left_out += _left_out(table["license"][~chosen], "with other licenses")
        table = table[chosen]
    if views != "all":
        chosen = _chosen(table["view"], "views", views, known=FRONTAL)
        left_out += _left_out(table["view"][~chosen], "of other views")
        table = table[chosen]
    if not len(table):
        raise ManifestError(f"none of its {total} rows is left: {'; '.join(left_out)} are left out.", str(root))

    problems += _name_problems(table, files)
    if problems:
        raise ManifestError(problems, str(root))
    names = list(table["filename"])
    if progress:
        progress(len(names), len(names))
    patients = [text or f"film {name}" for text, name in zip(table["patientid"], names, strict=True)]
    found = [_class_of(text, classes_of) for text in table["finding"]]
    strange = Counter(
        text
        for text, number in zip(table["finding"], found, strict=True)
        if number is None and text.lower() not in _UNDECIDED
    )
    notes = [f"{len(table)} of {total} rows are read; left out: {'; '.join(left_out)}"] if left_out else []
    if "" in set(table["patientid"]):
        alone = list(table["patientid"]).count("")
        notes.append(f"{alone} of {len(table)} rows have no patientid: each such film counts as a patient of its own")
    if strays:
        notes.append(f"no row names {len(strays)} files of {_IMAGES}/, which are not read, the first is {strays[0]}")
    if strange:
        notes.append(
            f"{strange.total()} films have findings of no class, or of several, and no label: {_counted(strange)}. "
            "`classes` can name them"
        )
    for note in notes:
        warnings.warn(note, ManifestWarning, stacklevel=2)
    return make_manifest(
        {
            "image": [files[name] for name in names],
            "source": ["covid19"] * len(names),
            "patient_id": patients,
            "study_id": [f"{p}/{o or n}" for p, o, n in zip(patients, table["offset"], names, strict=True)],
            "view": ["LATERAL" if text.upper() == "L" else text.upper() or None for text in table["view"]],
            "sex": [_SEXES.get(text.upper()) for text in table["sex"]],
            "age": [_age(text) for text in table["age"]],
            **{
                LABEL + name: [float("nan") if at is None else float(at == number) for at in found]
                for number, name in enumerate(classes)
            },
            "boxes": [[] for _ in names],
            "mask": [None] * len(names),
            "mask_known": [False] * len(names),
            "split": [None] * len(names),
            "finding": [text or None for text in table["finding"]],
            "license": [text or None for text in table["license"]],
        }
    )


def _read_metadata(folder: Path) -> pd.DataFrame:
    """The columns that are needed, under their latest names; a row's number, counted from 1, is its index."""
    for name in (_METADATA, _IMAGES):
        if not (folder / name).exists():
            raise ManifestError(f"there is no {name} in it. {_LAYOUT}", str(folder))
    table = read_csv(folder / _METADATA)
    names = {name.lower(): name for name in table.columns}
    twice = [name for name in table.columns if names[name.lower()] != name]
    others = [name for name in names if name not in (*_COLUMNS, *_LATER_COLUMNS)]
    problems = [
        f"{_METADATA}: column {name!r} is missing.{nearest(name, others)}" for name in _COLUMNS if name not in names
    ]
    problems += [f"{_METADATA}: columns {name!r} and {names[name.lower()]!r} are the same" for name in twice]
    for name in _LATER_COLUMNS:  # the first revisions lack them; a misspelled one must not let CT in
        close = difflib.get_close_matches(name, others, n=1, cutoff=0.75)
        if name not in names and close:
            problems.append(f'{_METADATA}: column {name!r} is missing. Did you mean "{close[0]}"?')
    if not problems and not len(table):
        problems.append(f"{_METADATA}: it has no row.")
    if problems:
        raise ManifestError(problems, str(folder))
    blank = pd.Series([""] * len(table), dtype=object)
    table = pd.DataFrame(
        {name: table[names[name]] if name in names else blank for name in (*_COLUMNS, *_LATER_COLUMNS)}
    )
    table.index += 1
    return table


def _files(folder: Path) -> tuple[dict[str, str], list[str]]:
    """File name -> path, and the links that lead out of the folder."""
    home = os.path.realpath(folder)
    if leads_out(folder / _IMAGES, home):
        raise ManifestError(f"{_IMAGES}/ leads out of it; name the folder that it leads into.", str(folder))
    with os.scandir(folder / _IMAGES) as entries:
        there = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    there.sort(key=lambda entry: entry.name)
    problems = [
        f"{_IMAGES}/{e.name} leads out of {folder}" for e in there if e.is_symlink() and leads_out(e.path, home)
    ]
    return {entry.name: entry.path for entry in there}, problems


def _is_ct(table: pd.DataFrame) -> pd.Series:
    """Rows of anything but radiographs; the first revisions tell it by the view alone."""
    return (
        ~table["modality"].str.lower().isin(["x-ray", ""])
        | ~table["folder"].str.lower().isin([_IMAGES, ""])
        | table["view"].str.lower().isin(_CT_VIEWS)
        | table["filename"].str.lower().str.endswith(".gz")
    ).astype(bool)


def _chosen(cells: pd.Series, option: str, values: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Which rows have one of the values, in any case; each must be in the file, or known."""
    there = Counter(cells)
    if isinstance(values, str) or not values:
        raise ManifestError(f"`{option}` needs a list. In the file: {_counted(there)}. Received: {values!r}")
    names = {name.lower() for name in (*there, *known)}
    for value in values:
        if str(value).lower() not in names:
            raise ManifestError(
                f"`{option}`: no film has {value!r}.{nearest(str(value), [*there, *known])} In the file: "
                f"{_counted(there)}. Received: {list(values)}"
            )
    wanted = {value.lower() for value in values}
    return cells.str.lower().isin(wanted).to_numpy(bool)


def _left_out(cells: pd.Series, why: str) -> list[str]:
    return [f"{len(cells)} {why} ({_counted(Counter(cells))})"] if len(cells) else []


def _counted(values: Counter[str]) -> str:
    """`'PA' 196, 'AP' 120`, the most frequent first."""
    return ", ".join(f"{value!r} {count}" for value, count in values.most_common())


def _name_problems(table: pd.DataFrame, files: Mapping[str, str]) -> list[str]:
    """Rows whose film is not there, or in another row as well."""
    problems = []
    first: dict[str, int] = {}
    in_lower_case = {name.lower(): name for name in files}
    for row, name in zip(table.index.tolist(), table["filename"], strict=True):
        where = f"{_METADATA}: row {row}"
        if name in ("", ".", "..") or Path(name).name != name:
            problems.append(f"{where}: filename must be a file's name, without folders. Received: {name!r}")
        elif first.setdefault(name, row) != row:
            problems.append(f"{where}: {name} is listed twice, first in row {first[name]}")
        elif name not in files:
            other = in_lower_case.get(name.lower())
            advice = f', but there is "{other}": file names keep their case' if other else ""
            problems.append(f"{where}: there is no file {_IMAGES}/{name}{advice}")
    return problems


def _meanings(classes: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Finding, in lower case -> the number of its class."""
    if not isinstance(classes, Mapping) or not classes:
        raise ManifestError(f"`classes` must be {{class: [findings]}}. Received: {classes!r}")
    meanings: dict[str, int] = {}
    for number, (name, findings) in enumerate(classes.items()):
        if isinstance(findings, str):
            raise ManifestError(f"class {name!r} needs a list of findings. Received: {findings!r}")
        for finding in findings:
            if meanings.setdefault(finding.strip().lower(), number) != number:
                raise ManifestError(f"finding {finding!r} is in two classes, {name!r} is the second.")
    return meanings


def _class_of(finding: str, meanings: Mapping[str, int]) -> int | None:
    """The number of a finding's class, None where there is none or no single one."""
    parts = [part.strip().lower() for part in finding.split(",")]
    found = set()
    for part in [part for part in parts if part != _COURSE] or parts:
        while part and part not in meanings:
            part = part.rpartition("/")[0].strip()
        found.add(meanings.get(part))
    return found.pop() if len(found) == 1 else None


def _age(text: str) -> float:
    years = float(text) if re.fullmatch(r"\d{1,3}(\.\d+)?", text, re.ASCII) else float("nan")
    return years if years <= _OLDEST else float("nan")
