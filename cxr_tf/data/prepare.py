"""A data set by name, as published, becomes shards."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from cxr_tf.config import load_table
from cxr_tf.data import shards
from cxr_tf.errors import CxrError, nearest
from cxr_tf.progress import Update, progress

DATASETS = ("siim", "table")


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
) -> shards.ShardFolder:
    """Reads a data set's folder and writes its shards, with progress.

    Args:
        dataset: "siim" or "table".
        root: the data set's folder.
        out: folder of the shards.
        config: for "table", the experiment file whose `[table]` section maps the columns.
        storage_size: the longer side that films are kept at, in pixels.
        workers: processes; all cores by default.
        strict: fail on the first film that cannot be read, instead of listing it in `rejected.csv`.
        max_megapixels: larger films are refused unread.

    Raises:
        DatasetError: for another name, or a table without its experiment file.
        ManifestError, ShardError, WriteError: for what is wrong with the data set or the folder.
    """
    if dataset not in DATASETS:
        raise DatasetError(
            f'Known data sets: {", ".join(DATASETS)}. Received: "{dataset}".{nearest(dataset, DATASETS)}'
        )
    with progress("reading the data set") as update:
        manifest = _read(dataset, root, config, update)
    with progress("preparing films") as update:
        return shards.prepare(
            manifest,
            out,
            storage_size=storage_size,
            workers=workers,
            strict=strict,
            progress=update,
            max_megapixels=max_megapixels,
        )


def _read(dataset: str, root: Path, config: Path | None, update: Update) -> pd.DataFrame:
    if dataset == "siim":
        from cxr_tf.data.readers.siim import read_siim

        return read_siim(root, progress=update)
    if config is None:
        raise DatasetError("`prepare table` takes --config EXPERIMENT.toml, whose [table] section maps the columns.")
    from cxr_tf.data.readers.table import read_table

    columns = load_table(config)
    return read_table(root / columns.csv, root=root, **columns.model_dump(exclude={"csv"}))
