"""A manifest becomes TFRecord shards: parallel, resumable, nothing lost silently; and films are read back by their key.

Shard i holds the films of the manifest's rows [i·k, (i+1)·k): the same bytes come out whatever the number of processes.
Each shard is written under a temporary name and renamed, with a small JSON beside it (lengths, checksum, what was
rejected and why), so that a run that was killed goes on with what is missing.

What a record holds stands in `cxr_tf.data.records`: never a name, a birth date, a UID, a path, or a hash of one.
`manifest.csv` beside the shards translates the keys; it holds identifiers and stays where it is.
"""

from __future__ import annotations

import csv
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_tf import preprocess
from cxr_tf.data.appearance import oddities
from cxr_tf.data.manifest import (
    ManifestError,
    class_names,
    labels,
    load_manifest,
    row_mask,
    save_manifest,
    validate,
)
from cxr_tf.data.radiograph import RadiographWarning, read_header, read_radiograph
from cxr_tf.data.records import KEYS, StoredFilm, framed, write_record
from cxr_tf.errors import CxrError
from cxr_tf.files import replacing, writable_folder
from cxr_tf.processes import ordered_processes

_FORMAT = 1  # of the records and of shards.json
_INDEX, _MANIFEST, _REJECTED, _NOTED = "shards.json", "manifest.csv", "rejected.csv", "noted.csv"
_NAME = re.compile(r"shard-\d{5,}-of-\d{5,}\.tfrecord", re.ASCII)
_HEAD, _TAIL = 12, 4  # TFRecord: length and its checksum before a record's bytes, their checksum after
_FEW = 32  # films that are not worth starting processes for
_OPEN_FILES = 256  # shards kept open for reading
_SHOWN = 10  # files that an error lists
_AGAIN = "give the same `cxr-tf prepare` command again"

# What another value of means other shards; said in the error's words.
_SETTINGS = {
    "format": "format of the shards",
    "storage_size": "storage size",
    "shard_size": "shard size",
    "classes": "classes",
    "films": "number of films",
    "manifest": "content of the manifest (films, labels, annotations, patients)",
}


class ShardError(CxrError):
    """Shards that cannot be made, do not fit what is asked, or are damaged."""


def prepare(
    manifest: pd.DataFrame,
    out: str | os.PathLike[str],
    *,
    storage_size: int = 512,
    shard_size: int = 256,
    workers: int | None = None,
    strict: bool = False,
    progress: Callable[[int, int], object] | None = None,
    max_megapixels: float = 100.0,
) -> ShardFolder:
    """Reads every film of a manifest and writes it to shards, with its mask and labels.

    Called again on the same folder, it makes what is missing: shards that were not reached, whose bytes are no longer
    those that were written, or with a rejected film that can now be read. Films that cannot be read are listed in
    `rejected.csv` (path below the films' common folder, reason); the rest is kept. `noted.csv` lists those of the rest
    that a person should look at and says why; their pixels stay as they are: films that look inverted or turned, are
    little like a frontal chest or have a wide border, windows that select nothing, pixels that are not square, 16-bit
    files that are nearly black.

    With several processes, a script that calls this needs Python's usual `if __name__ == "__main__":`.

    Args:
        manifest: the table that a reader returned.
        out: folder of the shards; made if it is not there.
        storage_size: the longer side that films are shrunk to, in pixels. Smaller films stay as they are.
        shard_size: films per shard.
        workers: processes that read films; one per core by default, 0 or 1 for none beside this one.
        strict: fail at the first film that cannot be read.
        progress: called with how many films are done, and of how many.
        max_megapixels: larger films are refused before they are decoded.

    Returns:
        The finished folder, as `open_shards` gives it.

    Raises:
        ShardError: the folder holds shards of other settings or files that are not from here, no film can be read,
            or, with `strict`, one cannot.
        ManifestError: the manifest breaks its contract.
        WriteError: the folder cannot be written, or the disk is full; finished shards are kept.

    Example:
        >>> shards = prepare(read_siim("/data/siim-covid19"), "shards/siim")  # doctest: +SKIP
        >>> len(shards), shards.classes  # doctest: +SKIP
    """
    plan = _planned(manifest, out, storage_size, shard_size)
    with _alone(plan.folder):
        plan.check_settings()
        pieces = _write_shards(plan, range(plan.shards), workers, strict, progress, max_megapixels)
        _merge(plan, pieces)
    return open_shards(plan.folder)


def prepare_part(
    manifest: pd.DataFrame,
    out: str | os.PathLike[str],
    worker: tuple[int, int],
    *,
    storage_size: int = 512,
    shard_size: int = 256,
    workers: int | None = None,
    strict: bool = False,
    progress: Callable[[int, int], object] | None = None,
    max_megapixels: float = 100.0,
) -> tuple[int, int]:
    """Makes one machine's part of the shards that `prepare` makes on its own: every n-th, byte for byte the same.

    The machines write into one shared folder, or each into its own, whose files are then copied into one. When all are
    done, `merge` writes the tables over them.

    Args:
        manifest: the table that a reader returned, the same on every machine.
        out: folder of the shards.
        worker: (i, n) for the i-th of n machines, counted from 0.
        storage_size, shard_size, workers, strict, progress, max_megapixels: as for `prepare`.

    Returns:
        How many shards are this machine's, and how many there are in all.

    Raises:
        ShardError: for a worker that is not one of n, and as `prepare`.
        ManifestError, WriteError: as `prepare`.

    Example:
        >>> prepare_part(manifest, "/shared/shards/siim", (0, 4))  # doctest: +SKIP
        (7, 25)
    """
    index, count = worker
    if count < 1 or not 0 <= index < count:
        raise ShardError(f"a worker is i/n: n is 1 or more, and i is 0 to n - 1. Received: {index}/{count}")
    plan = _planned(manifest, out, storage_size, shard_size)
    mine = range(index, plan.shards, count)
    with _alone(plan.folder, worker):
        plan.check_settings()
        _write_shards(plan, mine, workers, strict, progress, max_megapixels)
    return len(mine), plan.shards


def merge(
    manifest: pd.DataFrame, out: str | os.PathLike[str], *, storage_size: int = 512, shard_size: int = 256
) -> ShardFolder:
    """Makes one folder of shards of the parts that `prepare_part` made, and reads no film.

    Args:
        manifest: the table that the machines had.
        out: folder that holds all their shards, each with its JSON.
        storage_size, shard_size: as the machines had them.

    Returns:
        The finished folder.

    Raises:
        ShardError: shards are missing or damaged (the text names them), made with other settings, or a machine is still
            at work.
        ManifestError, WriteError: as `prepare`.
    """
    plan = _planned(manifest, out, storage_size, shard_size)
    with _alone(plan.folder):
        plan.check_settings()
        pieces = {shard: piece for shard in range(plan.shards) if (piece := plan.finished(shard)) is not None}
        if missing := [plan.path(shard).name for shard in range(plan.shards) if shard not in pieces]:
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise ShardError(
                f"{plan.folder}: {len(missing)} of {plan.shards} shards are missing or damaged: {shown}. Give the "
                "commands of their workers again, each makes only what is missing; shard k is worker k modulo n's."
            )
        _merge(plan, pieces)
        for lock in plan.folder.glob(".worker-*-of-*"):
            lock.unlink()
    return open_shards(plan.folder)


def _planned(manifest: pd.DataFrame, out: str | os.PathLike[str], storage_size: int, shard_size: int) -> _Plan:
    """What is to be made, in a folder that may be written into."""
    for name, value in {"storage_size": storage_size, "shard_size": shard_size}.items():
        if value < 1:
            raise ShardError(f"{name} must be 1 or more. Received: {value}")
    validate(manifest)
    plan = _Plan(Path(out), manifest, storage_size, shard_size)
    plan.check_folder()
    writable_folder(plan.folder)
    return plan


class _Plan:
    """Which row goes into which shard, and what is there already."""

    def __init__(self, folder: Path, manifest: pd.DataFrame, storage_size: int, shard_size: int) -> None:
        self.folder = folder
        self.rows = manifest.reset_index(drop=True).assign(
            image_key=np.arange(len(manifest)),
            study_key=pd.factorize(manifest["study_id"])[0],
            patient_key=pd.factorize(manifest["patient_id"])[0],
        )
        self.root = os.path.commonpath([os.path.dirname(path) for path in self.rows["image"]])  # noqa: PTH120
        self.labels = labels(self.rows)
        self.storage_size, self.shard_size = storage_size, shard_size
        self.shards = -(-len(self.rows) // shard_size)
        self.settings = {
            "format": _FORMAT,
            "storage_size": storage_size,
            "shard_size": shard_size,
            "classes": class_names(manifest),
            "films": len(self.rows),
            "manifest": self._content(),
        }

    def _content(self) -> str:
        """Checksum of what goes into records; splits and further columns may change without new shards."""
        digest = hashlib.sha256()
        columns = ["source", "patient_id", "study_id", "view", "sex", "age", "boxes", "mask_known"]
        for values in zip(self.relative("image"), self.relative("mask"), *map(self.rows.get, columns), strict=True):
            digest.update(
                json.dumps(
                    [None if pd.api.types.is_scalar(v) and pd.isna(v) else v for v in values], default=str
                ).encode()
            )
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def relative(self, column: str) -> list[str | None]:
        """Paths below the films' common folder, so that a data set may move as a whole."""
        return [os.path.relpath(path, self.root) if isinstance(path, str) else None for path in self.rows[column]]

    def keys(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.rows)))

    def path(self, shard: int) -> Path:
        """A shard's file; its JSON has the same name."""
        return self.folder / f"shard-{shard:05}-of-{self.shards:05}.tfrecord"

    def check_folder(self) -> None:
        """Refuses, before anything is written, a folder with files that are somebody else's."""
        try:
            if not self.folder.is_dir():
                return
            # Hidden files are what a killed run left, or a desktop's: none that is written here takes their place.
            names = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise ShardError(f"{self.folder}: cannot be read ({error.strerror}). Give another folder.") from error
        # A shard gets its name after its JSON did, so a shard alone is not from here.
        if not names or _has_sidecar(self.folder) or _settings(self.folder / _INDEX) is not None:
            return
        shown = ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")
        raise ShardError(
            f"{self.folder} is not empty, and its files are not from `cxr-tf prepare`, which would write over them. "
            f"Nothing was changed. Give a new or empty folder. Received a folder with: {shown}"
        )

    def check_settings(self) -> None:
        """Refuses a folder that holds shards of other settings."""
        for path in (self.folder / _INDEX, *sorted(self.folder.glob("shard-*.json"))):
            before = _settings(path)
            if before is None or before == self.settings:
                continue
            changes = "; ".join(
                f"{title}" if name == "manifest" else f"{title}: {before.get(name)} there, {self.settings[name]} now"
                for name, title in _SETTINGS.items()
                if before.get(name) != self.settings[name]
            )
            raise ShardError(
                f"{self.folder} holds shards that were made with other settings. Changed: {changes}. Give another "
                "folder, go back to the settings that were, or delete this folder to make its shards anew."
            )

    def finished(self, shard: int) -> dict[str, Any] | None:
        """What is known of a shard, if it is there byte for byte as it was written."""
        path = self.path(shard)
        piece = _load_json(path.with_suffix(".json"), "bytes", "sha256", "lengths", "rejected")
        if piece is None or not _whole(piece):
            return None
        if not all(_remarks(piece.get(name, []), len(self.rows)) for name in ("rejected", "noted")):
            return None
        try:
            same = path.stat().st_size == piece["bytes"] and _file_hash(path) == piece["sha256"]
        except OSError:
            return None
        return piece if same else None

    def refused(self, key: int, reason: str) -> ShardError:
        """The error that ends a strict run."""
        path = os.path.relpath(self.rows["image"].iloc[key], self.root)
        return ShardError(f"{path} cannot be prepared: {reason}. Without `strict` it would be left out.")


@contextmanager
def _alone(folder: Path, worker: tuple[int, int] | None = None) -> Iterator[None]:
    """Keeps a second process from writing the same shards; the locks end with the process.

    Workers share the folder, and each has a file of its own to lock; whoever is not one of them has it alone.
    """
    locks = [(folder, os.O_RDONLY, fcntl.LOCK_EX if worker is None else fcntl.LOCK_SH)]
    if worker is not None:
        locks.append((folder / f".worker-{worker[0]}-of-{worker[1]}", os.O_WRONLY | os.O_CREAT, fcntl.LOCK_EX))
    with ExitStack() as opened:
        for path, mode, kind in locks:
            descriptor = os.open(path, mode, 0o600)
            opened.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ShardError(
                    f"{folder}: another process is preparing shards there. Wait for it or end it."
                ) from None
            except OSError:
                pass  # a file system without locks
        yield


def _write_shards(
    plan: _Plan,
    wanted: range,
    workers: int | None,
    strict: bool,
    progress: Callable[[int, int], object] | None,
    max_megapixels: float,
) -> dict[int, dict[str, Any]]:
    """Makes those of the wanted shards that are missing or damaged, or have a rejected film that can now be read; what
    is then known of each of them.
    """
    done, total = 0, sum(len(plan.keys(shard)) for shard in wanted)

    def tick(films: int) -> None:
        nonlocal done
        done += films
        if progress is not None:
            progress(done, total)

    names = {plan.path(shard).stem for shard in wanted}
    for leftover in plan.folder.glob(".partial-*-shard-*"):  # of a run that was killed
        if leftover.stem.split("-", 2)[2] in names:
            leftover.unlink(missing_ok=True)
    pieces = {shard: piece for shard in wanted if (piece := plan.finished(shard)) is not None}
    waiting = sum(len(plan.keys(shard)) for shard in wanted if shard not in pieces)
    with film_reader(workers, waiting) as read:
        missing = []
        for shard in wanted:
            if (piece := pieces.get(shard)) is not None:
                refused = [key for key, _ in piece["rejected"]]
                found = list(read(film_job(plan.rows, key, plan.storage_size, max_megapixels) for key in refused))
                if all(isinstance(film, str) for film in found):
                    if strict and refused:
                        raise plan.refused(refused[0], str(found[0]))
                    tick(len(plan.keys(shard)))
                    continue
            missing.append(shard)
        # One stream over all shards: no process waits for the end of a shard.
        films = read(
            film_job(plan.rows, key, plan.storage_size, max_megapixels) for shard in missing for key in plan.keys(shard)
        )
        for shard in missing:
            pieces[shard] = _write_shard(plan, shard, itertools.islice(films, len(plan.keys(shard))), strict, tick)
    return pieces


def _write_shard(
    plan: _Plan, shard: int, films: Iterable[StoredFilm | str], strict: bool, tick: Callable[[int], None]
) -> dict[str, Any]:
    lengths: list[int] = []
    rejected: list[tuple[int, str]] = []
    noted: list[tuple[int, str]] = []
    path = plan.path(shard)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            for key, film in zip(plan.keys(shard), films, strict=True):
                if isinstance(film, str):
                    if strict:
                        raise plan.refused(key, film)
                    rejected.append((key, film))
                else:
                    record = write_record(film, plan.rows.iloc[key], plan.labels[key])
                    file.write(framed(record))
                    lengths.append(len(record))
                    noted += [(key, note) for note in film.notes]
                tick(1)
        digest = _file_hash(temporary, sync=True)
        size = temporary.stat().st_size
        # Whoever opens the folder while this shard changes must not find the old lengths; and whenever the process
        # is killed, a shard has its JSON, by which the next run knows it for one of these.
        (plan.folder / _INDEX).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        piece = {
            "settings": plan.settings,
            "lengths": lengths,
            "bytes": size,
            "sha256": digest,
            "rejected": rejected,
            "noted": noted,
        }
        _save_json(path.with_suffix(".json"), piece)
    return piece


def _read_film(job: Mapping[str, Any]) -> StoredFilm | str:
    """A film at storage size, or why there is none; without path or name, for this goes into tables."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RadiographWarning)
            pixels = read_radiograph(job["image"], max_megapixels=job["max_megapixels"])
            header = read_header(job["image"], max_megapixels=job["max_megapixels"])
        notes = [_without_paths(str(note.message), job) for note in caught if note.category is RadiographWarning]
        if header.view and job["view"] and header.view != job["view"]:
            notes.append(other_view(header.view, job["view"]))
        mask = row_mask(job, *pixels.shape)
        stored = preprocess.to_storage(pixels, job["storage_size"])
        notes += oddities(stored)
        small = None if mask is None else preprocess.mask_to_storage(mask, job["storage_size"])
        return StoredFilm.of(stored, small, notes)
    except CxrError as error:
        return _without_paths(str(error), job)
    except OSError as error:
        return error.strerror or type(error).__name__
    except MemoryError:
        return "needs more memory than there is"


def other_view(header: str, table: str) -> str:
    """What to note of a film whose header and whose data set's table state different views."""
    return f"is {header} by its header, and {table} by the data set's table"


def _without_paths(reason: str, job: Mapping[str, Any]) -> str:
    for name, path in (("the film", job["image"]), ("its mask", job["mask"])):
        if isinstance(path, str):
            reason = reason.replace(path, name).replace(Path(path).name, name)
    return reason.replace("mask its mask", "its mask").removeprefix("the film ").rstrip(".")


def film_job(manifest: pd.DataFrame, row: int, storage_size: int, max_megapixels: float) -> dict[str, Any]:
    """What a process needs to read a film of a manifest."""
    film = manifest.iloc[row]
    return {
        **{name: film[name] for name in ("image", "view", "mask", "mask_known", "boxes")},
        "storage_size": storage_size,
        "max_megapixels": max_megapixels,
    }


@contextmanager
def film_reader(
    workers: int | None, films: int
) -> Iterator[Callable[[Iterable[dict[str, Any]]], Iterator[StoredFilm | str]]]:
    """Gives a function that reads films in order, in several processes where that pays: `film_job`s -> for each the
    film as shards keep it, or the reason that they do not.
    """
    if workers is None:
        workers = 1 if films <= _FEW else os.cpu_count() or 1
    with ordered_processes(_read_film, workers) as read:
        yield read


def _merge(plan: _Plan, found: Mapping[int, dict[str, Any]]) -> None:
    """Writes the tables over all shards; `shards.json` last, for it says that the folder is whole."""
    for name in (_REJECTED, _NOTED, _MANIFEST, _INDEX):
        for leftover in plan.folder.glob(f".partial-*-{name}"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
    pieces = [found[shard] for shard in range(plan.shards)]
    rejected = [(key, reason) for piece in pieces for key, reason in piece["rejected"]]
    noted = [(key, note) for piece in pieces for key, note in piece.get("noted", [])]
    if len(rejected) == len(plan.rows):
        for shard in range(plan.shards):
            plan.path(shard).unlink(missing_ok=True)
            plan.path(shard).with_suffix(".json").unlink(missing_ok=True)
        # Tables of an earlier run would, without shards, pass for somebody else's.
        for name in (_MANIFEST, _REJECTED, _NOTED):
            (plan.folder / name).unlink(missing_ok=True)
        reasons = "; ".join(sorted({reason for _, reason in rejected})[:3])
        raise ShardError(f"none of the {len(rejected)} films can be prepared: {reasons}.")
    paths = plan.relative("image")
    for name, what, said in ((_REJECTED, "reason", rejected), (_NOTED, "note", noted)):
        with replacing(plan.folder / name) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", what])
            writer.writerows((paths[key], text) for key, text in said)
    kept = plan.rows.drop(index=[key for key, _ in rejected]).reset_index(drop=True)
    save_manifest(kept, plan.folder / _MANIFEST)
    index = {
        "settings": plan.settings,
        "films": len(kept),
        "rejected": len(rejected),
        "noted": len({key for key, _ in noted}),
        "versions": _versions(),
        "shards": [
            {"file": plan.path(shard).name, **{name: piece[name] for name in ("bytes", "sha256", "lengths")}}
            for shard, piece in enumerate(pieces)
        ],
    }
    _save_json(plan.folder / _INDEX, index)


def open_shards(folder: str | os.PathLike[str]) -> ShardFolder:
    """Opens what `prepare` wrote.

    Raises:
        ShardError: there is none, it is not finished, or a file is missing, of another size, or not from `prepare`.

    Example:
        >>> shards = open_shards("shards/siim")  # doctest: +SKIP
    """
    return ShardFolder(folder)


class ShardFolder:
    """Films at storage size, read by their key in any order; the files stay on disk.

    Copies for other processes (fork, pickle) open their own files.

    Args:
        folder: what `prepare` wrote.

    Attributes:
        folder: its path.
        manifest: the rows that were kept; their index 0 to n - 1 is a film's key here. The columns `image_key`,
            `study_key` and `patient_key` hold the numbers that stand in the records.
        classes: class names, in the order of a record's labels.
        storage_size: the longer side that films were shrunk to, in pixels.
        rejected: how many films were left out; `rejected.csv` says why.
        noted: how many films were kept and should be looked at; `noted.csv` says why.
        data_hash: hex, over the checksums of all shards.

    Raises:
        ShardError: as `open_shards`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        index = self._index()
        self.classes: list[str] = index["settings"]["classes"]
        self.storage_size: int = index["settings"]["storage_size"]
        self.rejected: int = index["rejected"]
        self.noted: int = index.get("noted", 0)
        self._shards: list[dict[str, Any]] = index["shards"]
        for shard in self._shards:
            path = self.folder / shard["file"]
            if not path.is_file():
                raise self._missing(path)
            if path.stat().st_size != shard["bytes"]:
                raise self._damaged(path, "has another size than was written")
        self.data_hash = hashlib.sha256("".join(shard["sha256"] for shard in self._shards).encode()).hexdigest()
        lengths = [np.asarray(shard["lengths"], np.int64) for shard in self._shards]
        self._lengths = np.concatenate(lengths)
        self._shard_of = np.repeat(np.arange(len(lengths)), [len(part) for part in lengths])
        self._offsets = np.concatenate([np.cumsum(part + _HEAD + _TAIL) - part - _TAIL for part in lengths])
        self.manifest = self._manifest(index["settings"]["shard_size"])
        # An evicted file closes when the last thread that reads it is done.
        self._open = functools.lru_cache(maxsize=_OPEN_FILES)(self._file)

    def _index(self) -> dict[str, Any]:
        """`shards.json`, with everything in it that is read from it."""
        path = self.folder / _INDEX
        try:
            begun, there = _has_sidecar(self.folder), path.is_file()
        except OSError as error:
            raise ShardError(f"{self.folder}: cannot be read ({error.strerror}).") from error
        if not there:
            state = "the shards there are not finished" if begun else "there are no shards"
            raise ShardError(f"{self.folder}: {state} ({_INDEX} is missing). `cxr-tf prepare` makes them.")
        settings = _settings(path) or {}
        if (found := settings.get("format", _FORMAT)) != _FORMAT:
            raise ShardError(
                f"{self.folder}: this version reads shards of format {_FORMAT}. Received: {found}. Prepare them again."
            )
        index = _load_json(path, "settings", "shards", "rejected")
        classes, shards = settings.get("classes"), (index or {}).get("shards")
        if (
            index is None
            or not all(_is_count(settings.get(name)) and settings[name] for name in ("storage_size", "shard_size"))
            or not (isinstance(classes, list) and all(isinstance(name, str) for name in classes))
            or not all(_is_count(index.get(name, 0)) for name in ("rejected", "noted"))
            or not (isinstance(shards, list) and shards and all(map(_whole, shards)))
            or not all(isinstance(name := shard.get("file"), str) and _NAME.fullmatch(name) for shard in shards)
        ):
            mend = f"Delete it and {_AGAIN}: the shards are kept." if begun else "Give a folder that it made."
            raise ShardError(f"{path} is damaged, or not from `cxr-tf prepare`. {mend}")
        return index

    def _manifest(self, shard_size: int) -> pd.DataFrame:
        """The kept rows, if they are those of these shards."""
        path = self.folder / _MANIFEST
        if not path.is_file():
            raise ShardError(f"{path} is missing. To mend it, {_AGAIN}: it writes the table and keeps the shards.")
        try:
            manifest = load_manifest(path)
            for name in KEYS:
                manifest[name] = manifest[name].astype(np.int64)
        except (ManifestError, KeyError, TypeError, ValueError, OverflowError):
            manifest = None
        if (
            manifest is None
            or class_names(manifest) != self.classes
            or not np.array_equal(manifest["image_key"] // shard_size, self._shard_of)
            or not manifest["image_key"].is_monotonic_increasing
            or not manifest["image_key"].is_unique
        ):
            raise ShardError(
                f"{path} is not the manifest of these shards; prepare again: move it away if it is yours, and "
                f"{_AGAIN}. It writes the table and keeps the shards."
            )
        return manifest

    def __len__(self) -> int:
        return len(self._lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_shards, (self.folder,)

    def read(self, keys: Iterable[int]) -> list[bytes]:
        """Reads records by key.

        Args:
            keys: whole numbers from 0 to `len(self) - 1`, in any order.

        Returns:
            One serialized `tf.train.Example` per key.

        Raises:
            ShardError: there is no such key, or a file can no longer be read.
        """
        return [self._record(int(key)) for key in keys]

    def _record(self, key: int) -> bytes:
        if not 0 <= key < len(self):
            raise ShardError(f"{self.folder} has films 0 to {len(self) - 1}. Received: {key}")
        shard, length = int(self._shard_of[key]), int(self._lengths[key])
        path = self.folder / self._shards[shard]["file"]
        try:
            file = self._open(shard)  # held while it is read, so that it is not closed meanwhile
            record = os.pread(file.number, length, int(self._offsets[key]))
        except FileNotFoundError as error:
            raise self._missing(path) from error
        except OSError as error:
            raise self._unreadable(path, error) from error
        if len(record) != length:
            raise self._damaged(path, "is shorter than it was")
        return record

    def _file(self, shard: int) -> _File:
        return _File(self.folder / self._shards[shard]["file"])

    def verify(self, progress: Callable[[int, int], object] | None = None) -> None:
        """Reads every shard and compares its checksum.

        Args:
            progress: called with how many shards are done, and of how many.

        Raises:
            ShardError: a shard's bytes are not those that were written.
        """
        for done, shard in enumerate(self._shards, start=1):
            path = self.folder / shard["file"]
            try:
                digest = _file_hash(path)
            except FileNotFoundError as error:
                raise self._missing(path) from error
            except OSError as error:
                raise self._unreadable(path, error) from error
            if digest != shard["sha256"]:
                raise self._damaged(path, "is damaged: its checksum is not the one that was written")
            if progress is not None:
                progress(done, len(self._shards))

    def _damaged(self, path: Path, problem: str) -> ShardError:
        return ShardError(f"{path} {problem}. To mend it, {_AGAIN}: it makes only that shard.")

    def _missing(self, path: Path) -> ShardError:
        return ShardError(f"{path} is missing. If its disk is there, {_AGAIN}: it makes only what is missing.")

    def _unreadable(self, path: Path, error: OSError) -> ShardError:
        return ShardError(
            f"{path} cannot be read ({error.strerror}). If its disk is sound, {_AGAIN}: it makes only that shard."
        )


class _File:
    """A file open for reading, closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _file_hash(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_json(path: Path, *names: str) -> dict[str, Any] | None:
    """None where there is no such file, half of one, or one that lacks any of these names."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and all(name in content for name in names) else None


def _settings(path: Path) -> dict[str, Any] | None:
    """What the shards were made with that `shards.json` or a shard's JSON speaks of; None where it does not say."""
    settings = (_load_json(path, "settings") or {}).get("settings")
    return settings if isinstance(settings, dict) and "format" in settings else None


def _has_sidecar(folder: Path) -> bool:
    return any(_NAME.fullmatch(path.with_suffix(".tfrecord").name) for path in folder.glob("shard-*.json"))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _whole(piece: Any) -> bool:
    """Whether this describes a shard: its lengths add up to its size."""
    return (
        isinstance(piece, dict)
        and re.fullmatch("[0-9a-f]{64}", str(piece.get("sha256"))) is not None
        and isinstance(lengths := piece.get("lengths"), list)
        and all(map(_is_count, lengths))
        and _is_count(piece.get("bytes"))
        and piece["bytes"] == sum(lengths) + len(lengths) * (_HEAD + _TAIL)
    )


def _remarks(said: Any, rows: int) -> bool:
    """Whether this says something of films: pairs of a row and a text."""
    return isinstance(said, list) and all(
        isinstance(pair, list) and len(pair) == 2 and _is_count(pair[0]) and pair[0] < rows and isinstance(pair[1], str)
        for pair in said
    )


def _save_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("cxr-tf", "numpy", "pillow", "pydicom", "tensorflow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            continue
    return found
