"""A data set by name, as published, becomes a manifest, and the manifest shards."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from cxr_tf.config import load_options, load_table
from cxr_tf.data import shards
from cxr_tf.data.inspection import Inspection, inspect_films
from cxr_tf.data.readers import DATASETS
from cxr_tf.errors import CxrError, nearest
from cxr_tf.files import writable_folder
from cxr_tf.progress import progress


class DatasetError(CxrError):
    """A data set that is not known, or that needs an experiment file."""


def prepare_dataset(
    dataset: str,
    root: Path,
    out: Path,
    *,
    config: Path | None = None,
    storage_size: int = 512,
    workers: int | None = None,
    strict: bool = False,
    max_megapixels: float = 100.0,
    worker: tuple[int, int] | None = None,
    merge: bool = False,
) -> shards.ShardFolder | None:
    """Reads a data set's folder and writes its shards, with progress.

    Args:
        dataset: one of `DATASETS`.
        root: the data set's folder.
        out: folder of the shards.
        config: the experiment file whose `[dataset]` section has options of the reader; for "table", whose `[table]`
            section maps the columns.
        storage_size: the longer side that films are kept at, in pixels.
        workers: processes; all cores by default.
        strict: fail on the first film that cannot be read, instead of listing it in `rejected.csv`.
        max_megapixels: larger films are refused unread.
        worker: (i, n) makes the part of the i-th of n machines, counted from 0.
        merge: makes one folder of the parts of all machines, and reads no film.

    Returns:
        The finished folder; None for one machine's part.

    Raises:
        DatasetError: for another name, or a table without its experiment file.
        ConfigError, ManifestError, ShardError, WriteError: for what is wrong with the options, the data set or the
            folder.
    """
    if merge and worker is not None:
        raise DatasetError("--merge comes after all workers are done; give it without --worker.")
    manifest = read_dataset(dataset, root, config)
    if merge:
        return shards.merge(manifest, out, storage_size=storage_size)
    with progress("preparing films") as update:
        settings: dict[str, Any] = {
            "storage_size": storage_size,
            "workers": workers,
            "strict": strict,
            "progress": update,
            "max_megapixels": max_megapixels,
        }
        if worker is None:
            return shards.prepare(manifest, out, **settings)
        shards.prepare_part(manifest, out, worker, **settings)
        return None


def inspect_dataset(
    dataset: str,
    root: Path,
    sheet: Path,
    *,
    config: Path | None = None,
    decode: bool = False,
    max_megapixels: float = 100.0,
) -> Inspection:
    """Reads a data set's folder and says what it holds, with progress.

    Args:
        dataset, root, config: as for `prepare_dataset`.
        sheet, decode, max_megapixels: as for `inspect_films`.

    Raises:
        DatasetError, ConfigError, ManifestError, WriteError: for what is wrong with the options, the data set or the
            sheet's folder.
    """
    if sheet.suffix.lower() != ".png":
        raise DatasetError(f"the sheet must be a .png file. Received: {sheet}")
    writable_folder(sheet.parent)
    manifest = read_dataset(dataset, root, config)
    with progress("looking at films") as update:
        return inspect_films(manifest, sheet, decode=decode, max_megapixels=max_megapixels, progress=update)


def read_dataset(dataset: str, root: Path, config: Path | None = None) -> pd.DataFrame:
    """The manifest of a data set, with progress; see `prepare_dataset`."""
    if dataset not in DATASETS:
        raise DatasetError(
            f'Known data sets: {", ".join(DATASETS)}. Received: "{dataset}".{nearest(dataset, DATASETS)}'
        )
    read: Callable[..., pd.DataFrame]
    read = getattr(importlib.import_module(f"cxr_tf.data.readers.{dataset}"), f"read_{dataset}")
    if dataset == "table":
        if config is None:
            raise DatasetError("`table` takes --config EXPERIMENT.toml, whose [table] section maps the columns.")
        columns = load_table(config)
        given, options = root / columns.csv, {"root": root, **columns.model_dump(exclude={"csv"})}
    else:
        given, options = root, load_options(config, read) if config is not None else {}
    with progress("reading the data set") as update:
        return read(given, **options, progress=update)


def parse_worker(text: str | None) -> tuple[int, int] | None:
    """The two numbers of "0/4"; None for None.

    Raises:
        DatasetError: for anything else.
    """
    if text is None:
        return None
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and int(parts[0]) < int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise DatasetError(f"--worker takes i/n: 0/4 is the first of four machines, 3/4 the last. Received: {text!r}")
