"""What a data set holds, before anything is prepared: counts, formats, what would be rejected, and a sheet of films."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from cxr_tf.data.manifest import LABEL, class_names, labels
from cxr_tf.data.radiograph import Header, RadiographError, read_header
from cxr_tf.data.shards import film_job, film_reader, other_view

_SHOWN = 10  # films that a list names
_THREADS = 16  # as for readers: what takes time is the disk
_SHEET = 24
_FORMATS = {"dicom": "DICOM", "png": "PNG", "jpeg": "JPEG"}


@dataclass
class Inspection:
    """What was found; `str()` of it is a page of text without identifiers other than paths below the films' folder.

    Attributes:
        manifest: the data set.
        formats: how many films are of each file format and transfer syntax.
        sizes: int `[films, 2]`, rows and columns, of those whose header could be read.
        rejected: row of the manifest -> why it cannot be prepared.
        noted: row -> what a person should look at.
        decoded: how many films were read with their pixels.
        drawn: how many are on the sheet.
    """

    manifest: pd.DataFrame
    formats: Counter[str] = field(default_factory=Counter)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), int))
    rejected: dict[int, str] = field(default_factory=dict)
    noted: dict[int, str] = field(default_factory=dict)
    decoded: int = 0
    drawn: int = 0

    def __str__(self) -> str:
        films = self.manifest
        lines = [
            f"{len(films):,} films, {films['study_id'].nunique():,} studies, "
            f"{films['patient_id'].nunique():,} patients",
            _line("sources", _counted(films["source"])),
            _line("classes", self._classes()),
            _line("views", _counted(films["view"])),
            _line("sexes", _counted(films["sex"])),
            _line("ages", self._ages()),
            _line("masks", self._masks()),
            _line("splits", _counted(films["split"], "none")),
            _line("formats", _joined(self.formats.most_common())),
            _line("sizes", self._sizes()),
        ]
        share = "all" if self.decoded + len(self.rejected) >= len(films) else f"{self.decoded:,}"
        lines.append(
            _line("rejected", f"{len(self.rejected):,} would be (headers of all were read, and pixels of {share})")
        )
        lines += self._listed(self.rejected)
        if self.noted:
            lines.append(_line("look at", f"{len(self.noted):,} films"))
            lines += self._listed(self.noted)
        return "\n".join(lines)

    def _classes(self) -> str:
        known = labels(self.manifest)
        counts = list(zip(class_names(self.manifest), (known == 1).sum(axis=0), strict=True))
        unknown = int(np.isnan(known).all(axis=1).sum())
        return _joined([*counts, ("without any label", unknown)] if unknown else counts)

    def _ages(self) -> str:
        ages = self.manifest["age"].dropna()
        if ages.empty:
            return "not stated"
        low, middle, high = ages.quantile([0.0, 0.5, 1.0])
        return f"{low:.0f} to {high:.0f} years, median {middle:.0f}; not stated {len(self.manifest) - len(ages):,}"

    def _masks(self) -> str:
        known = self.manifest["mask_known"]
        drawn = self.manifest["mask"].notna() | self.manifest["boxes"].map(bool)
        return _joined(
            [("drawn", drawn.sum()), ("known to be empty", (known & ~drawn).sum()), ("unknown", (~known).sum())]
        )

    def _sizes(self) -> str:
        if not len(self.sizes):
            return "none could be read"
        area = self.sizes.prod(axis=1)
        pick = self.sizes[np.argsort(area, kind="stable")[[0, len(area) // 2, -1]]]
        small, middle, large = (f"{height:,} x {width:,}" for height, width in pick)
        return f"{small} to {large} pixels (rows x columns), in the middle {middle}"

    def _listed(self, said: Mapping[int, str]) -> list[str]:
        root = _root(self.manifest)
        lines = [
            f"  {os.path.relpath(self.manifest['image'].iloc[row], root)}: {text}"
            for row, text in sorted(said.items())[:_SHOWN]
        ]
        return lines + ([f"  ... and {len(said) - _SHOWN:,} more"] if len(said) > _SHOWN else [])


def inspect_films(
    manifest: pd.DataFrame,
    sheet: str | os.PathLike[str] | None = None,
    *,
    decode: bool = False,
    max_megapixels: float = 100.0,
    progress: Callable[[int, int], object] | None = None,
) -> Inspection:
    """Reads every film's header and some films' pixels; writes nothing but the sheet.

    Args:
        manifest: what a reader returned.
        sheet: PNG file to draw some films on, drawn by chance but always the same, with their annotations.
        decode: read the pixels of every film, and so find all that `prepare` would reject; it takes as long.
        max_megapixels: as for `prepare`.
        progress: called with how many films are done, and of how many.

    Raises:
        WriteError: the sheet cannot be written.

    Example:
        >>> print(inspect_films(read_siim("/data/siim-covid19"), "sheet.png"))  # doctest: +SKIP
    """
    found = Inspection(manifest)
    shown = set(np.random.default_rng(0).permutation(len(manifest))[:_SHEET].tolist())
    wanted = range(len(manifest)) if decode else sorted(shown)
    total, done, sizes, pictures = len(manifest) + len(wanted), 0, [], []

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with ThreadPoolExecutor(_THREADS) as threads:
        for row, header in enumerate(threads.map(lambda path: _header(path, max_megapixels), manifest["image"])):
            if isinstance(header, str):
                found.rejected[row] = header
            else:
                found.formats[_format(header)] += 1
                sizes.append((header.height, header.width))
                if note := _view_note(header, manifest["view"].iloc[row]):
                    found.noted[row] = note
            tick()
    found.sizes = np.array(sizes, int).reshape(-1, 2)
    with film_reader(None, len(wanted)) as read:
        films = read(film_job(manifest, row, 512, max_megapixels) for row in wanted)
        for row, film in zip(wanted, films, strict=True):
            if isinstance(film, str):
                found.rejected[row] = film
            else:
                found.decoded += 1
                if notes := dict.fromkeys([*filter(None, [found.noted.get(row)]), *film.notes]):  # each once
                    found.noted[row] = "; ".join(notes)
                if row in shown:
                    pictures.append({"film": film.pixels(), "truth": film.drawn(), **_words(manifest.iloc[row])})
            tick()
    if sheet is not None and pictures:
        from cxr_tf.evaluate.figures import contact_sheet

        contact_sheet(pictures, sheet, side=256, title=f"{len(pictures)} of {len(manifest):,} films")
        found.drawn = len(pictures)
    return found


def _header(path: str, max_megapixels: float) -> Header | str:
    """The header, or why there is none."""
    try:
        return read_header(path, max_megapixels=max_megapixels)
    except RadiographError as error:
        return str(error).replace(path, "").strip().rstrip(".")


def _view_note(header: Header, view: str | None) -> str | None:
    if header.view is None and view is None and header.format == "dicom":
        return "does not say its view"
    if header.view is not None and view is not None and header.view != view:
        return other_view(header.view, view)
    return None


def _words(row: pd.Series) -> dict[str, str]:
    positive = [name[len(LABEL) :] for name in row.index if name.startswith(LABEL) and row[name] == 1]
    return {
        "title": ", ".join(positive) or "no class",
        "caption": f"{row['view'] or 'view not stated'}, {row['source']}",
    }


def _format(header: Header) -> str:
    if header.transfer_syntax is None:
        return _FORMATS[header.format]
    from pydicom.uid import UID

    inverted = " MONOCHROME1" if header.photometric == "MONOCHROME1" else ""
    return f"DICOM, {UID(header.transfer_syntax).name}{inverted}"


def _root(manifest: pd.DataFrame) -> str:
    return os.path.commonpath([os.path.dirname(path) for path in manifest["image"]])  # noqa: PTH120


def _counted(column: pd.Series, missing: str = "not stated") -> str:
    counts = [(str(name), int(count)) for name, count in column.value_counts().items()]
    blank = int(column.isna().sum())
    return _joined([*counts, (missing, blank)] if blank else counts)


def _joined(counts: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} {int(count):,}" for name, count in counts) or "none"


def _line(name: str, text: str) -> str:
    return f"{name:10}{text}"
