"""The manifest: one pandas table with a row for every image, which every reader returns and everything else takes.

| column | type | meaning |
|---|---|---|
| `image` | str | absolute path of the radiograph; no path occurs twice |
| `source` | str | the data set or hospital that the film comes from |
| `patient_id` | str | the person; nobody may stand on two sides of a split |
| `study_id` | str | the examination; belongs to one patient |
| `view` | str or None | "PA", "AP", "LATERAL", ... |
| `sex` | "M", "F" or None | |
| `age` | float | years; NaN = unknown |
| `label:<class>` | float | one column per class, in class order: 1, 0, or NaN = unknown |
| `boxes` | list | `[x, y, width, height]` floats in pixels of the original film; `[]` where there is none |
| `mask` | str or None | absolute path of a PNG of the film's own size; goes before `boxes` where a film has both |
| `mask_known` | bool | True: mask or boxes are the whole truth, empty ones too. False: nobody annotated the film |
| `split` | str or None | "train", "validation", "test", ...; None = in no split |

Further columns (`fold`, a finer diagnosis) are kept as text, None where blank. `patient_id`, `study_id` and paths
stay in the manifest, beside the shards: nothing that leaves the machine carries them.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL.PngImagePlugin import PngImageFile

from cxr_tf.errors import CxrError, nearest
from cxr_tf.files import replacing

LABEL = "label:"
_HEAD = ("image", "source", "patient_id", "study_id", "view", "sex", "age")
_TAIL = ("boxes", "mask", "mask_known", "split")
COLUMNS = (*_HEAD, *_TAIL)  # what every manifest has, beside its labels

_SHOWN = 10  # problems that an error lists
_IDENTIFYING = ("image", "mask", "patient_id", "study_id")  # columns whose values no message lists
_KINDS = 50  # values a column may have and still say what kind a film is, not whose
_LONGEST_BOXES = 50_000  # characters of a boxes cell; ast.literal_eval takes memory many times that

Boxes = list[list[float]]


class ManifestError(CxrError):
    """Bad data set: every problem that was found, of which the message shows the first ten and the count.

    Args:
        problems: one sentence, or a list of them.
        about: what they are about (a file, a folder); starts the message.

    Attributes:
        problems: the whole list.
    """

    def __init__(self, problems: str | Sequence[str], about: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        start = f"{about}: " if about else ""
        if len(self.problems) == 1:
            super().__init__(start + self.problems[0])
            return
        lines = [f"{start}{len(self.problems)} problems.", *(f"  - {problem}" for problem in self.problems[:_SHOWN])]
        if len(self.problems) > _SHOWN:
            lines.append(f"  ... and {len(self.problems) - _SHOWN} more")
        super().__init__("\n".join(lines))


class ManifestWarning(UserWarning):
    """The data set can be read, but something in it should be known."""


def make_manifest(columns: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Builds a checked manifest from lists, one per column, in the order and with the types of the contract.

    Args:
        columns: the columns of the table above, `label:<class>` columns in class order, and any others.

    Returns:
        The manifest, index 0 to n - 1.

    Raises:
        ManifestError: as `validate`.

    Example:
        >>> make_manifest({"image": ["/data/a.png"], "source": ["here"], "patient_id": ["1"], "study_id": ["1"],
        ...     "view": ["PA"], "sex": [None], "age": [float("nan")], "label:Opacity": [1.0],
        ...     "boxes": [[[10.0, 20.0, 30.0, 40.0]]], "mask": [None], "mask_known": [True], "split": [None]})
    """
    names = [name for name in columns if name.startswith(LABEL)]
    others = [name for name in columns if name not in COLUMNS and not name.startswith(LABEL)]
    order = [name for name in (*_HEAD, *names, *_TAIL, *others) if name in columns]
    data: dict[str, pd.Series] = {}
    for name in order:
        if name == "age" or name.startswith(LABEL):
            data[name] = pd.Series(list(columns[name]), dtype="float64")
        elif name == "mask_known":
            data[name] = pd.Series(list(columns[name]), dtype=bool)
        else:
            # pandas' own text type would turn None into NaN.
            data[name] = pd.Series(list(columns[name]), dtype=object)
    df = pd.DataFrame(data)
    validate(df)
    return df


def class_names(df: pd.DataFrame) -> list[str]:
    """The classes of a manifest, in the order of its label columns."""
    return [str(name)[len(LABEL) :] for name in df.columns if str(name).startswith(LABEL)]


def labels(df: pd.DataFrame, classes: Sequence[str] | None = None) -> np.ndarray:
    """The labels of every row.

    Args:
        df: a manifest.
        classes: which classes, in which order; by default those of the manifest, in its order.

    Returns:
        float32 `[rows, classes]`: 1, 0, or NaN = unknown.

    Raises:
        ManifestError: the manifest has no such class.
    """
    known = class_names(df)
    wanted = known if classes is None else list(classes)
    for name in wanted:
        if name not in known:
            raise ManifestError(
                f"the manifest has no class {name!r}.{nearest(name, known)} It has: {', '.join(known) or 'none'}. "
                f"Received: {wanted}"
            )
    return df[[LABEL + name for name in wanted]].to_numpy(np.float32).reshape(len(df), len(wanted))


def row_mask(row: Mapping[str, Any] | pd.Series, height: int, width: int) -> np.ndarray | None:
    """The annotation of one film as pixels: its mask file, or else its filled boxes.

    Args:
        row: a row of a manifest.
        height: rows of the original film.
        width: columns of the original film.

    Returns:
        uint8 `[height, width]` of 0 and 1, or None where there is no annotation (`mask_known` is False).

    Raises:
        ManifestError: the mask cannot be read or is of another size than its film, or a box lies outside of the film.
    """
    if not row["mask_known"]:
        return None
    if isinstance(row["mask"], str):
        return read_mask(row["mask"], height, width)
    return fill_boxes(row["boxes"], height, width)


@contextmanager
def _open_mask(path: str, height: int, width: int) -> Iterator[PngImageFile]:
    name = Path(path).name
    try:
        with PngImageFile(path) as image:
            if image.size != (width, height):  # before anything is decoded, so that the film bounds the memory
                raise ManifestError(
                    f"mask {name} must have the size of its film, {height} x {width} pixels (height x width). "
                    f"Received: {image.height} x {image.width}"
                )
            yield image
    except OSError as error:
        raise ManifestError(f"mask {name} cannot be read: {error.strerror or 'it is damaged'}") from error
    except (SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ManifestError(f"mask {name} cannot be read: it is no PNG file, or a damaged one") from error


def check_mask(path: str, height: int, width: int) -> None:
    """Makes sure, without decoding it, that a mask is a PNG of its film's size.

    Raises:
        ManifestError: it is not; the message names both sizes.
    """
    with _open_mask(path, height, width):
        pass


def read_mask(path: str, height: int, width: int) -> np.ndarray:
    """Reads a mask: whatever is not black is set, in gray, color and palette PNGs alike; transparency says nothing.

    Args:
        path: a PNG.
        height: rows of the film, and so of the mask.
        width: columns of the film.

    Returns:
        uint8 `[height, width]` of 0 and 1.

    Raises:
        ManifestError: it cannot be read or is of another size than its film.
    """
    with _open_mask(path, height, width) as image:
        pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "RGBA") else image)
        if image.mode == "LA":
            pixels = pixels[..., 0]
    is_set = pixels != 0
    return (is_set.any(axis=-1) if is_set.ndim == 3 else is_set).astype(np.uint8)


def clip_boxes(boxes: Iterable[Sequence[float]], height: int, width: int) -> Boxes:
    """Cuts boxes off at the edges of a film.

    Args:
        boxes: `[x, y, width, height]` in pixels of the film.
        height: rows of the film.
        width: columns of the film.

    Returns:
        As many boxes, each inside the film.

    Raises:
        ManifestError: a box has no area or lies wholly outside of the film.
    """
    clipped = []
    for box in boxes:
        x, y, w, h = box
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
        if not (w > 0 and h > 0):
            raise ManifestError(f"a box must have a positive width and height. Received: {list(box)}")
        if not (left < right and top < bottom):
            raise ManifestError(
                f"box lies outside of its film, which is {width} pixels wide and {height} high. "
                f"Boxes are [x, y, width, height] in pixels of the original film. Received: {list(box)}"
            )
        clipped.append([left, top, right - left, bottom - top])
    return clipped


def fill_boxes(boxes: Iterable[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Draws boxes as a mask: a pixel is set where its center lies in a box; every box sets at least one.

    Args:
        boxes: `[x, y, width, height]` in pixels of the film.
        height: rows of the film.
        width: columns of the film.

    Returns:
        uint8 `[height, width]` of 0 and 1.

    Raises:
        ManifestError: as `clip_boxes`.
    """
    mask = np.zeros((height, width), np.uint8)
    for x, y, w, h in clip_boxes(boxes, height, width):
        left, top = min(math.ceil(x - 0.5), width - 1), min(math.ceil(y - 0.5), height - 1)
        right, bottom = max(left + 1, math.ceil(x + w - 0.5)), max(top + 1, math.ceil(y + h - 0.5))
        mask[top:bottom, left:right] = 1
    return mask


def parse_boxes(text: str) -> Boxes:
    """Reads the boxes of a CSV cell: a JSON or Python list of `[x, y, width, height]` or of dicts with these keys.

    Nothing is evaluated. A blank cell is an empty list.

    Raises:
        ManifestError: the text is no such list, or a box has no area.

    Example:
        >>> parse_boxes("[{'x': 1, 'y': 2, 'width': 3, 'height': 4}]")
        [[1.0, 2.0, 3.0, 4.0]]
    """
    if text.strip() in ("", "[]"):
        return []
    wanted = "boxes must be a list of [x, y, width, height] or of {'x', 'y', 'width', 'height'}."
    shown = repr(text if len(text) <= 80 else text[:77] + "...")
    if len(text) > _LONGEST_BOXES:
        raise ManifestError(f"{wanted} Received: {len(text)} characters, more than {_LONGEST_BOXES}")
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        try:
            items = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise ManifestError(f"{wanted} Received: {shown}") from None
    if not isinstance(items, list | tuple):
        raise ManifestError(f"{wanted} Received: {shown}")
    boxes = []
    for item in items:
        if isinstance(item, dict) and set(item) == {"x", "y", "width", "height"}:
            item = [item["x"], item["y"], item["width"], item["height"]]
        problem = _box_problem(item)
        if problem:
            raise ManifestError(f"{problem} Received: {shown}")
        boxes.append([float(value) for value in item])
    return boxes


def _box_problem(box: Any) -> str | None:
    """What is wrong with one box, as far as that shows without its film."""
    if not isinstance(box, list | tuple) or len(box) != 4:
        return "a box must be [x, y, width, height]."
    for value in box:
        # An int beyond the range of a float has no place in a film either.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            return "a box must be four finite numbers [x, y, width, height]."
    if not (box[2] > 0 and box[3] > 0):
        return "a box must have a positive width and height."
    return None


def validate(df: pd.DataFrame) -> None:
    """Holds a table against the contract at the top of this file.

    Raises:
        ManifestError: with every column and row (by its number from 0) that breaks it.
    """
    if not isinstance(df, pd.DataFrame):
        raise ManifestError(f"a manifest is a pandas.DataFrame. Received: {type(df).__name__}")
    missing = [name for name in COLUMNS if name not in df.columns]
    if missing:
        known = [str(name) for name in df.columns]
        raise ManifestError([f"column {name!r} is missing.{nearest(name, known)}" for name in missing], "manifest")
    if not len(df):
        raise ManifestError("the manifest has no row.")
    problems = list(_column_problems(df)) or list(_row_problems(df))
    if problems:
        raise ManifestError(problems, "manifest")


def _column_problems(df: pd.DataFrame) -> Iterable[str]:
    twice = list(df.columns[df.columns.duplicated()].unique())
    for name in twice:
        yield f"column {name!r} occurs twice"
    for name in df.columns:
        if not isinstance(name, str) or not name.strip() or name == LABEL:
            yield f"a column needs a name that is text. Received: {name!r}"
    for name in ["age", *(LABEL + c for c in class_names(df))]:
        if name not in twice and not pd.api.types.is_numeric_dtype(df[name]):
            yield f"column {name!r} must hold numbers, NaN where unknown. Received: dtype {df[name].dtype}"


def _row_problems(df: pd.DataFrame) -> Iterable[str]:
    """Problems row by row; columns are looked at as lists, for a pandas row costs a hundred times as much."""
    rows = range(len(df))
    for name in ("image", "source", "patient_id", "study_id"):
        for row, value in zip(rows, df[name], strict=True):
            if not isinstance(value, str) or not value.strip():
                received = "a blank" if isinstance(value, str) else type(value).__name__  # no patient's key
                yield f"row {row}: {name} must be text and not blank. Received: {received}"
    for name in ("image", "mask"):
        for row, value in zip(rows, df[name], strict=True):
            if isinstance(value, str) and not os.path.isabs(value):  # noqa: PTH117 - ten times as fast
                yield f"row {row}: {name} must be an absolute path. Received: {value!r}"
    for row in np.flatnonzero(df["image"].duplicated().to_numpy()).tolist():
        yield f"row {row}: image occurs twice: {df['image'].iloc[row]!r}"
    for name in ("view", "mask", "split"):
        for row, value in zip(rows, df[name], strict=True):
            if not (isinstance(value, str) and value.strip()) and not _is_missing(value):
                yield f"row {row}: {name} must be text, or None where unknown. Received: {value!r}"
    for row, value in zip(rows, df["sex"], strict=True):
        if value not in ("M", "F") and not _is_missing(value):
            yield f'row {row}: sex must be "M", "F" or None. Received: {value!r}'
    ages = df["age"].to_numpy(np.float64, na_value=np.nan)
    for row in np.flatnonzero(~(np.isnan(ages) | ((ages >= 0) & (ages <= 150)))).tolist():
        yield f"row {row}: age must be 0 to 150 years, or NaN where unknown. Received: {ages[row]}"
    for name in class_names(df):
        values = df[LABEL + name].to_numpy(np.float64, na_value=np.nan)
        for row in np.flatnonzero(~(np.isnan(values) | (values == 0) | (values == 1))).tolist():
            yield f"row {row}: {LABEL}{name} must be 1, 0, or NaN where unknown. Received: {values[row]}"
    for row, value in zip(rows, df["mask_known"], strict=True):
        if not isinstance(value, bool | np.bool_):
            yield f"row {row}: mask_known must be True or False. Received: {value!r}"
    for row, boxes in zip(rows, df["boxes"], strict=True):
        if not isinstance(boxes, list):
            yield f"row {row}: boxes must be a list, empty where there is none. Received: {boxes!r}"
            continue
        for problem in filter(None, map(_box_problem, boxes)):
            yield f"row {row}: {problem} Received: {boxes}"
    first: dict[Any, tuple[int, Any]] = {}
    for row, (study, patient) in enumerate(zip(df["study_id"], df["patient_id"], strict=True)):
        row_before, patient_before = first.setdefault(study, (row, patient))
        if patient != patient_before:
            yield f"rows {row_before} and {row}: one study_id under two patients"


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float | np.floating) and math.isnan(value))


def save_manifest(df: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Writes a manifest as CSV (UTF-8, boxes as JSON, blank = unknown); a file of that name is replaced as a whole.

    Raises:
        ManifestError: the table breaks the contract.
        WriteError: the file cannot be written.
    """
    validate(df)
    columns = []
    for name in df.columns:
        values: Iterable[Any] = df[name]
        if name == "boxes":
            columns.append([json.dumps(boxes) if boxes else "[]" for boxes in values])
        elif name == "mask_known" or name.startswith(LABEL):
            columns.append([{0: "0", 1: "1"}.get(value, "") for value in values])
        elif name == "age":
            columns.append(["" if _is_missing(value) else repr(float(value)) for value in values])
        else:
            columns.append(["" if _is_missing(value) else str(value) for value in values])
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\r\n")  # with "\n" alone, a lone "\r" in a cell is not quoted
            writer.writerow(df.columns)
            writer.writerows(zip(*columns, strict=True))
    except UnicodeEncodeError as error:
        raise ManifestError(f"file names must be UTF-8. Received: {error.object!r}") from error


def load_manifest(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Reads what `save_manifest` wrote: the same values, further columns as text.

    Raises:
        ManifestError: there is no such file, or it is no manifest.
    """
    table = read_csv(path, strip=False)
    about = str(path)
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        known = list(table.columns)
        raise ManifestError([f"column {name!r} is missing.{nearest(name, known)}" for name in missing], about)
    problems: list[str] = []
    columns: dict[str, list[Any]] = {}
    for name in table.columns:
        if name == "boxes":
            convert: Callable[[str], Any] = parse_boxes
        elif name == "mask_known":
            convert = _as_bool
        elif name == "age" or name.startswith(LABEL):
            convert = _as_number
        else:
            convert = _as_text
        columns[name] = []
        for row, value in enumerate(table[name]):
            try:
                columns[name].append(convert(value))
            except (ValueError, ManifestError) as error:
                problems.append(f"row {row}, column {name!r}: {error}")
                columns[name].append(None)
    if problems:
        raise ManifestError(problems, about)
    return make_manifest(columns)


def _as_bool(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"must be 0 or 1. Received: {text!r}")
    return text == "1"


def _as_number(text: str) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        raise ValueError(f"must be a number. Received: {text!r}") from None


def _as_text(text: str) -> str | None:
    return text or None


def read_csv(path: str | os.PathLike[str], *, strip: bool = True, commas: bool = False) -> pd.DataFrame:
    """Reads a CSV file as text, nothing guessed: "007" stays "007", "NA" stays "NA", and a blank cell is "".

    Args:
        path: the file: UTF-8, comma-separated, the first line names the columns. Columns without a name are dropped.
        strip: whether white space around names and cells goes.
        commas: whether lines may end in any number of commas. Where they may, a row with a comma too many in its middle
            may pass.

    Returns:
        The table, every column of `object` dtype holding `str`.

    Raises:
        ManifestError: there is no such file, it is no such CSV, or a column name occurs twice.
    """
    about = str(path)
    problems, rows = [], []
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            while commas and header and not header[-1].strip():
                header.pop()
            for cells in reader:
                if len(cells) == len(header) or (commas and len(cells) > len(header) and not any(cells[len(header) :])):
                    rows.append(cells[: len(header)])
                elif cells:  # a blank line has none
                    problems.append(f"line {reader.line_num}: {len(cells)} fields, but the first has {len(header)}")
    except OSError as error:
        raise ManifestError(f"cannot read it: {error.strerror or error}", about) from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"it must be UTF-8 text. Received: other bytes ({error.reason})", about) from error
    except csv.Error as error:
        raise ManifestError(f"line {reader.line_num}: not CSV: {error}", about) from error
    names = [name.strip() for name in header] if strip else header
    twice = sorted({name for name in names if name and names.count(name) > 1})
    problems[:0] = [f"column {name!r} occurs twice" for name in twice]
    if not any(names):
        problems.append("the first line must name the columns. Received: an empty file or line")
    if problems:
        raise ManifestError(problems, about)
    cells_of = zip(*rows, strict=True) if rows else ([] for _ in names)
    return pd.DataFrame(
        {
            name: pd.Series([cell.strip() for cell in cells] if strip else list(cells), dtype=object)
            for name, cells in zip(names, cells_of, strict=True)
            if name
        }
    )


def rows_where(df: pd.DataFrame, where: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """The rows in which every named column holds one of the listed values.

    A number is compared as a number (1 is "1" and "1.0"), anything else as text; "" is a blank cell.

    Args:
        df: any table.
        where: `{column: values}`. Empty = all rows.

    Returns:
        bool `[rows]`.

    Raises:
        ManifestError: the table has no such column, or none of its rows has such a value.

    Example:
        >>> training = df[rows_where(df, {"fold": [0, 1, 2], "view": ["PA", "AP"]})]
    """
    chosen = np.ones(len(df), bool)
    for column, values in where.items():
        if column not in df.columns:
            known = [str(name) for name in df.columns]
            raise ManifestError(
                f"there is no column {column!r}.{nearest(column, known)} There are: {', '.join(known)}. "
                f"Received: {dict(where)}"
            )
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ManifestError(f"{column!r} needs a list of values. Received: {values!r}")
        cells = df[column].map(lambda cell: "" if _is_missing(cell) else str(cell))
        found = sorted(cells.unique())
        wanted: set[str] = set()
        for value in values:
            same = {cell for cell in found if _equals(cell, value)}
            if not same and (column in _IDENTIFYING or len(found) > _KINDS):
                raise ManifestError(f"no row has {value!r} in column {column!r}, which has {len(found)} values.")
            if not same:
                raise ManifestError(
                    f"no row has {value!r} in column {column!r}.{nearest(str(value), found)} "
                    f"It has: {_listed(found)}. Received: {list(values)}"
                )
            wanted |= same
        chosen &= cells.isin(wanted).to_numpy()
    return chosen


def _equals(cell: str, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return cell.lower() == str(value).lower()
    if isinstance(value, int | float | np.integer | np.floating):
        try:
            return float(cell) == value
        except ValueError:
            return False
    return cell == str(value)


def _listed(values: Iterable[str]) -> str:
    """`'a', 'b', ... (40 in all)`: the values of a column, for a message."""
    values = [repr(value) for value in values]
    return ", ".join(values[:_SHOWN]) + (f", ... ({len(values)} in all)" if len(values) > _SHOWN else "")


def missing_columns(table: pd.DataFrame, file: str, wanted: Sequence[str]) -> list[str]:
    """What to say of each column that `file` must have and has not, with the name that comes nearest."""
    others = [name for name in table.columns if name not in wanted]
    return [f"{file}: column {name!r} is missing.{nearest(name, others)}" for name in wanted if name not in table]
