"""Leakage and duplicates: patients, studies and near-identical films, across splits and across data sets.

A film that was exported twice (other compression, size, contrast, a narrower crop, mirrored, inverted) is found in
three steps, each of which leaves the next one less to do:

1. perceptual hashes (`imagehash.phash`, 256 bits) of the whole film and of it cropped in 25 ways, compared pair by
   pair: first the 64 bits of the lowest frequencies, then all;
2. a registration of 48-pixel pictures that may move and stretch along both axes (inverse compositional alignment; Baker
   and Matthews, "Lucas-Kanade 20 years on", International Journal of Computer Vision 2004);
3. the correlation of the aligned 96-pixel pictures, of which a band-pass with local contrast normalization leaves ribs,
   vessels and edges: chests are alike in everything coarser.

Two films of one person, taken minutes apart, are no twins: breath and heart have moved.
"""

from __future__ import annotations

import base64
import io
import math
import os
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
from threadpoolctl import threadpool_limits

from cxr_tf.data.manifest import load_manifest
from cxr_tf.data.radiograph import read_radiograph
from cxr_tf.data.shards import ShardFolder, _begin_worker, open_shards
from cxr_tf.errors import CxrError
from cxr_tf.files import WriteError, replacing, writable_folder
from cxr_tf.preprocess import to_storage

TEST, TRAIN, PRETRAINING = "test", "train", "pre-training"

_THUMB, _LOOK = 96, 48  # sides in pixels of the pictures that are correlated, and registered
_BLANK = 2.0  # standard deviation in gray levels below which there is nothing to compare
_FEW = 64  # films that are not worth starting processes for
_TASK = 32  # films a process reads at a time

# Parts of a side cut off at its start and its end, so that every crop of up to 5 % is near one of them.
_TRIMS = ((0.006, 0.006), (0.042, 0.008), (0.008, 0.042), (0.043, 0.043), (0.025, 0.025))
_CROPS = ((0.0, 0.0, 0.0, 0.0), *((*rows, *columns) for rows in _TRIMS for columns in _TRIMS))
_WHOLE, _FLIPPED, _INVERTED, _BOTH = 0, len(_CROPS), len(_CROPS) + 1, len(_CROPS) + 2
_VIEWS = len(_CROPS) + 3
# Which view of one film is held against which of the other. Mirrored and inverted films are looked for uncropped.
_COMPARED = (
    *((view, _WHOLE) for view in (*range(len(_CROPS)), _FLIPPED, _INVERTED, _BOTH)),
    *((_WHOLE, view) for view in range(1, len(_CROPS))),
)
_KINDS = {(False, False): "copy", (True, False): "mirrored", (False, True): "inverted", (True, True): "both"}

_SIDE = 16  # of a hash, in bits
_CORNER = 8  # of its part of lowest frequencies
# What follows was set on 1,613 real films, 400 generated ones and a twin of each with all changes at once, half of them
# cropped by 5 % wherever they were cropped. Of other pairs of real films the hashes keep fewer than 1 in 50,000, of
# generated ones 1 in 1,200; experiments/benchmarks/audit.py says what is found in the end.
_CORNER_BITS, _BITS = 8, 34  # how many may differ
_ROWS, _COLUMNS = 64, 4096  # films of a block: what is compared stays in the processor's cache
_CHUNK = 128  # pairs that are aligned together
_ROUGH_BAND, _BAND = (0.5, 1.5), (0.7, 2.0)  # scales that are kept, in pixels
_ROUGH = 0.88  # correlation after a first step of the registration; twins have 0.93 and more
_TWIN = 0.92  # at full size; twins have 0.945 and more, other pairs up to 0.83 (real), 0.88 (a sample of generated)

_ON_PAGE = 200  # pairs that the page shows
_SHOWN = 10  # things that a message lists
_PICTURE = 224  # side of a film on the page, in pixels


class AuditError(CxrError):
    """Data sets that cannot be audited."""


@dataclass(frozen=True)
class Audit:
    """What `audit` found. No path, name or identifier of a patient is in it; a film is told by its data set and row.

    Attributes:
        sets: one row per data set, in the order given: `films`, and `splits` (their names; empty: none, so that the
            whole set counts as pre-training data).
        pairs: near-identical films, those that leak first, then by correlation: `kind` ("copy", "mirrored", "inverted",
            "both"), `correlation`, `leak` (a test film and one that is learned from), `same_patient`, and for the
            `first_` and the `second_` film `set` (from 1), `row` (from 0, of the manifest; of shards, the key),
            `source`, `split`.
        sides: patients and studies on several sides, one film of each side: `what` ("patient", "study"), `number`,
            `set`, `row`, `source`, `split`.
        unread: films that could not be looked at: `set`, `row`, `reason`.
        blank: how many films show nothing, and were held against no other.
        failures: why the audit fails, a sentence each; empty if it does not.
        notes: what should be known beside.
    """

    sets: pd.DataFrame
    pairs: pd.DataFrame
    sides: pd.DataFrame
    unread: pd.DataFrame
    blank: int
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a test film has a twin in what is learned from, somebody is on two sides, or a film was not read."""
        return bool(self.failures)

    def summary(self) -> str:
        """What was found, in lines for a terminal."""
        lines = []
        for number, films, splits in self.sets[["films", "splits"]].itertuples():
            lines.append(f"data set {number}: {films:,} films, {splits or f'no split: all count as {PRETRAINING}'}")
        lines.append(f"near-identical pairs: {len(self.pairs):,}")
        lines += [f"  {_pair_in_words(pair)}" for pair in self.pairs.head(_SHOWN).itertuples()]
        if len(self.pairs) > _SHOWN:
            lines.append(f"  ... and {len(self.pairs) - _SHOWN:,} more")
        for what, plural in (("patient", "patients"), ("study", "studies")):
            torn = self.sides[self.sides["what"] == what]
            lines.append(f"{plural} on several sides: {torn['number'].nunique():,}")
            for _, films in list(torn.groupby("number", sort=False))[:_SHOWN]:
                lines.append("  " + ", ".join(_film_in_words(film) for film in films.itertuples()))
        if len(self.unread):
            lines.append(f"films that could not be read: {len(self.unread):,}")
            for film in self.unread.head(_SHOWN).itertuples():
                lines.append(f"  data set {film.set}, row {film.row}: {film.reason}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"FAILED: {failure}" for failure in self.failures] or ["passed"]
        return "\n".join(lines)


def _film_in_words(film: Any) -> str:
    return f"data set {film.set}, row {film.row} ({film.split or 'in no split'})"


def _pair_in_words(pair: Any) -> str:
    first, second = (
        f"{getattr(pair, end + '_set')}:{getattr(pair, end + '_row')} ({getattr(pair, end + '_split') or 'no split'})"
        for end in ("first", "second")
    )
    patient = "same patient" if pair.same_patient else "other patient"
    return f"{first} = {second}, {pair.kind}, correlation {pair.correlation:.3f}, {patient}{', LEAK' * pair.leak}"


def audit(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    max_megapixels: float = 100.0,
) -> Audit:
    """Looks for patients, studies and near-identical films on several sides of a split, and across data sets.

    It fails when a film of the split "test" has a twin in any other split or in a data set without splits (which counts
    as pre-training data), when a patient or study is on several sides, or when films could not be read. A film without
    a split in a data set that has some is on no side. Patients and studies of different data sets are the same if their
    `source` and identifier are. Data sets for pre-training and the split "train" are one side.

    Memory holds the hashes, a kilobyte a film; small pictures lie in a temporary file, 12 KB a film. With several
    processes, a script that calls this needs Python's usual `if __name__ == "__main__":`.

    Args:
        paths: manifests (CSV) and folders of shards.
        out: folder for `audit.html` (pairs side by side, the first 200), `pairs.csv`, `sides.csv` and `unread.csv`.
            They name films by data set and row and hold no identifier, but the page shows films: it stays where the
            data is. Without a folder nothing is written.
        workers: processes that read films, then threads that compare them; one per core by default.
        progress: called with how many films were read and how many compared, in sum, and of how many in sum.
        max_megapixels: larger films are refused unread.

    Returns:
        The `Audit`.

    Raises:
        AuditError: no path, one given twice, one that does not exist, or no film that can be read.
        ManifestError, ShardError: a manifest or folder of shards cannot be used.
        WriteError: `out` cannot be written.

    Example:
        >>> found = audit(["shards/siim", "chexpert.csv"], "audit")  # doctest: +SKIP
        >>> found.failed, len(found.pairs)  # doctest: +SKIP
        (False, 3)
    """
    sets = _open_sets(paths)
    if out is not None:
        writable_folder(out)
    workers = workers or os.cpu_count() or 1
    table = _table(sets)
    films = _Films(sets, max_megapixels)
    done = 0

    def tick(some: int) -> None:
        nonlocal done
        done += some
        if progress is not None:
            progress(done, 2 * len(table))

    with tempfile.TemporaryFile(dir=out) as store:
        signs = _signatures(films, len(table), workers, store, tick)
        if len(signs.unread) == len(table):
            reasons = "; ".join(sorted(set(signs.unread.values()))[:3])
            raise AuditError(f"none of the {len(table)} films can be read: {reasons}.")
        twins = _twins(signs, workers, tick)
    tick(len(table) - len(signs.films))  # what could not be compared
    pairs, sides = _pairs(table, twins), _sides(table)
    unread = table.loc[list(signs.unread), ["set", "row"]].assign(reason=list(signs.unread.values()))
    found = Audit(
        sets=_set_table(table, sets),
        pairs=pairs.drop(columns=["first", "second"]),
        sides=sides,
        unread=unread.reset_index(drop=True),
        blank=len(table) - len(signs.unread) - len(signs.films),
    )
    _judge(found, table)
    if out is not None:
        _write(found, pairs, films, Path(out))
    return found


# --- data sets ------------------------------------------------------------------------------------------------------


class _Set(NamedTuple):
    """A data set: its rows, and its films in shards or in files of their own."""

    manifest: pd.DataFrame
    shards: ShardFolder | None


def _open_sets(paths: Sequence[str | os.PathLike[str]]) -> list[_Set]:
    given = [Path(path) for path in paths]
    if not given:
        raise AuditError("give one or more manifests (CSV files) or folders of shards. Received: none")
    resolved = [path.resolve() for path in given]
    sets = []
    for number, path in enumerate(given):
        if resolved[number] in resolved[:number]:
            raise AuditError(f"{path} is given twice: every film would be its own twin.")
        if not path.exists():
            raise AuditError(f"{path}: there is no such file or folder. Give a manifest (CSV) or a folder of shards.")
        if path.is_dir():
            shards = open_shards(path)
            sets.append(_Set(shards.manifest, shards))
        else:
            sets.append(_Set(load_manifest(path), None))
    return sets


def _table(sets: Sequence[_Set]) -> pd.DataFrame:
    """One row per film of all sets; `side` is "" for a film in no split."""
    parts = []
    for number, (manifest, _) in enumerate(sets, start=1):
        split = manifest["split"].fillna("").astype(str)
        parts.append(
            pd.DataFrame(
                {
                    "set": number,
                    "row": np.arange(len(manifest)),
                    **{name: manifest[name].to_numpy() for name in ("source", "patient_id", "study_id")},
                    "split": split.to_numpy(),
                    "side": split.to_numpy() if split.any() else PRETRAINING,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _set_table(table: pd.DataFrame, sets: Sequence[_Set]) -> pd.DataFrame:
    rows = []
    for number in range(1, len(sets) + 1):
        split = table.loc[table["set"] == number, "split"]
        counts = split[split != ""].value_counts(sort=False)
        rows.append((len(split), ", ".join(f"{name} {count:,}" for name, count in counts.items())))
    return pd.DataFrame(rows, columns=["films", "splits"], index=range(1, len(sets) + 1))


class _Films:
    """The films of all data sets, one after the other; copies go to other processes."""

    def __init__(self, sets: Sequence[_Set], max_megapixels: float) -> None:
        self.sources = [shards or manifest["image"].tolist() for manifest, shards in sets]
        self.ends = np.cumsum([len(manifest) for manifest, _ in sets])
        self.max_megapixels = max_megapixels

    def read(self, film: int) -> np.ndarray | str:
        """A film, uint8 `[height, width]`, or why it cannot be read, without its path."""
        number = int(np.searchsorted(self.ends, film, side="right"))
        source, row = self.sources[number], film - (int(self.ends[number - 1]) if number else 0)
        if isinstance(source, ShardFolder):
            return _from_record(source.read([row])[0])
        path = source[row]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `prepare` says them
                return read_radiograph(path, max_megapixels=self.max_megapixels)
        except CxrError as error:
            reason = str(error).replace(path, "the film").replace(Path(path).name, "the film")
            return reason.removeprefix("the film ").rstrip(".")
        except OSError as error:
            return error.strerror or type(error).__name__
        except MemoryError:
            return "needs more memory than there is"


def _from_record(record: bytes) -> np.ndarray | str:
    from google.protobuf.message import DecodeError
    from tensorflow.train import Example

    try:
        features = Example.FromString(record).features.feature
        height, width = (features[name].int64_list.value[0] for name in ("height", "width"))
        return np.frombuffer(features["image"].bytes_list.value[0], np.uint8).reshape(height, width)
    except (DecodeError, IndexError, ValueError):
        return "its record is damaged"


# --- signatures -----------------------------------------------------------------------------------------------------


class _Signature(NamedTuple):
    """What is kept of a film."""

    hashes: np.ndarray  # uint64 [views, 4], the lowest frequencies first
    look: np.ndarray  # int8 [_LOOK, _LOOK], band-passed
    thumb: np.ndarray  # uint8 [_THUMB, _THUMB]


def _sign(pixels: np.ndarray) -> _Signature | None:
    """The signature of a film; None for a blank one. Its aspect is lost: a crop and a squeeze change it alike."""
    image = Image.fromarray(pixels).resize((_THUMB, _THUMB), Image.Resampling.BILINEAR)
    thumb = np.asarray(image)
    if thumb.std() < _BLANK:
        return None
    whole = _hash(image, _CROPS[_WHOLE])
    flipped = _hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), _CROPS[_WHOLE])
    crops = [_hash(image, crop) for crop in _CROPS[1:]]
    small = np.asarray(image.resize((_LOOK, _LOOK), Image.Resampling.BOX), np.float32)
    look = np.clip(np.rint(40 * _band(small[None], *_ROUGH_BAND)[0]), -127, 127).astype(np.int8)
    # Inverting a film turns the sign of every frequency.
    return _Signature(np.stack([whole, *crops, flipped, ~whole, ~flipped]), look, thumb)


def _hash(image: Image.Image, crop: Sequence[float]) -> np.ndarray:
    import imagehash

    top, bottom, left, right = (_THUMB * part for part in crop)
    box = (left, top, _THUMB - right, _THUMB - bottom)
    bits = imagehash.phash(image.resize((2 * _SIDE, 2 * _SIDE), Image.Resampling.BILINEAR, box), _SIDE, 2).hash
    parts = bits[:_CORNER, :_CORNER], bits[:_CORNER, _CORNER:], bits[_CORNER:]
    return np.packbits(np.concatenate([part.ravel() for part in parts])).view(np.uint64)


def _band(pictures: np.ndarray, fine: float, coarse: float) -> np.ndarray:
    """Band-pass and local contrast normalization, float32 `[n, side, side]`; scales in pixels."""

    def blurred(x: np.ndarray, sigma: float) -> np.ndarray:
        return ndimage.gaussian_filter(x, (0, sigma, sigma), truncate=3, mode="nearest")

    band = blurred(pictures, fine) - blurred(pictures, coarse)
    noise = 3.0  # gray levels: what is weaker is not made as strong as the rest
    return band / np.sqrt(blurred(band * band, 2 * coarse) + noise**2)


class _Signatures(NamedTuple):
    """The signatures of all films that can be compared, numbered anew."""

    films: np.ndarray  # int64 [n], which films they are
    corner: np.ndarray  # uint64 [views, n]: the first 64 bits of their hashes
    rest: np.ndarray  # uint64 [views, n, 3]: the others
    store: BinaryIO  # file with their looks and thumbs
    unread: dict[int, str]  # film -> why

    def looks(self, numbers: np.ndarray) -> np.ndarray:
        """float32 `[len(numbers), _LOOK, _LOOK]`."""
        return self._stored(numbers, 0, _LOOK, np.int8)

    def thumbs(self, numbers: np.ndarray) -> np.ndarray:
        """float32 `[len(numbers), _THUMB, _THUMB]`."""
        return self._stored(numbers, _LOOK**2, _THUMB, np.uint8)

    def _stored(self, numbers: np.ndarray, offset: int, side: int, dtype: type) -> np.ndarray:
        once, index = np.unique(numbers, return_inverse=True)
        places = (once * (_LOOK**2 + _THUMB**2) + offset).tolist()
        found = b"".join(os.pread(self.store.fileno(), side * side, place) for place in places)
        return np.frombuffer(found, dtype).reshape(-1, side, side).astype(np.float32)[index]


_Result = _Signature | str | None  # None: blank; text: why a film cannot be read


def _signatures(films: _Films, count: int, workers: int, store: BinaryIO, tick: Callable[[int], object]) -> _Signatures:
    """Reads all films. Their pictures go into the file `store`."""
    compared: list[int] = []
    unread: dict[int, str] = {}
    corner = np.empty((_VIEWS, count), np.uint64)
    rest = np.empty((_VIEWS, count, _SIDE * _SIDE // 64 - 1), np.uint64)
    for film, result in enumerate(_read_all(films, count, workers)):
        if isinstance(result, str):
            unread[film] = result
        elif result is not None:
            number = len(compared)
            corner[:, number], rest[:, number] = result.hashes[:, 0], result.hashes[:, 1:]
            _store(store, result)
            compared.append(film)
        tick(1)
    n = len(compared)
    return _Signatures(np.asarray(compared, np.int64), corner[:, :n], rest[:, :n], store, unread)


def _store(store: BinaryIO, sign: _Signature) -> None:
    try:
        store.write(sign.look.tobytes() + sign.thumb.tobytes())
        store.flush()  # it is read by its number, past Python's buffer
    except OSError as error:
        raise WriteError(
            f"a temporary file with {(_LOOK**2 + _THUMB**2) // 1000} KB a film cannot be written ({error.strerror}). "
            "It lies in the output folder, or without one where TMPDIR says."
        ) from error


def _read_all(films: _Films, count: int, workers: int) -> Iterator[_Result]:
    """What `_read_some` gives, film by film in order, in several processes where that pays."""
    tasks = [range(start, min(start + _TASK, count)) for start in range(0, count, _TASK)]
    if workers <= 1 or count <= _FEW:
        for task in tasks:
            yield from _read_some(films, task)
        return
    # Spawned, not forked: TensorFlow's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_reader, (films,))
    ahead: deque[Future[list[_Result]]] = deque()  # bounded: results wait in memory
    try:
        for task in tasks:
            ahead.append(pool.submit(_read_there, task))
            if len(ahead) >= 4 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    except BrokenProcessPool as error:
        raise AuditError(
            "a process that reads films was ended from outside, most often because memory ran out. Use fewer workers, "
            'or lower max_megapixels. (A script that calls `audit` needs `if __name__ == "__main__":`.)'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _read_some(films: _Films, which: Iterable[int]) -> list[_Result]:
    """The signature of each film, None for a blank one, or why it cannot be read."""
    return [pixels if isinstance(pixels, str) else _sign(pixels) for pixels in map(films.read, which)]


_films_of_process: _Films  # in a process of the pool


def _begin_reader(films: _Films) -> None:
    global _films_of_process
    _begin_worker()
    _films_of_process = films


def _read_there(which: Iterable[int]) -> list[_Result]:
    return _read_some(_films_of_process, which)


# --- twins ----------------------------------------------------------------------------------------------------------


class _Twin(NamedTuple):
    """Two films that are one."""

    first: int
    second: int
    flipped: bool
    inverted: bool
    correlation: float


def _twins(signs: _Signatures, workers: int, tick: Callable[[int], object]) -> list[_Twin]:
    """All pairs of near-identical films."""
    count = len(signs.films)

    def block(start: int) -> list[_Twin]:
        return _verified(signs, _candidates(signs.corner, signs.rest, start, min(start + _ROWS, count)))

    twins = []
    # NumPy works outside of Python's lock; its own threads would only get in the way of these.
    with threadpool_limits(1), ThreadPoolExecutor(workers) as threads:
        for start, found in zip(range(0, count, _ROWS), threads.map(block, range(0, count, _ROWS)), strict=True):
            twins += found
            tick(min(_ROWS, count - start))
    return twins


def _candidates(corner: np.ndarray, rest: np.ndarray, start: int, end: int) -> np.ndarray:
    """Pairs with similar hashes of one of `start` to `end` and a later film.

    Args:
        corner: uint64 `[views, n]`, the first 64 bits of the hashes.
        rest: uint64 `[views, n, 3]`, the others.
        start: first film.
        end: film after the last.

    Returns:
        int64 `[pairs, 3]`: the films, and the number of the comparison of views that brought them closest.
    """
    found = []
    for left in range(start, corner.shape[1], _COLUMNS):
        right = min(left + _COLUMNS, corner.shape[1])
        different = np.empty((end - start, right - left), np.uint64)
        bits = np.empty(different.shape, np.uint8)
        for number, (one, other) in enumerate(_COMPARED):
            np.bitwise_xor(corner[one, start:end, None], corner[other, None, left:right], out=different)
            np.bitwise_count(different, out=bits)
            row, column = np.divmod(np.flatnonzero(bits <= _CORNER_BITS), right - left)
            a, b = row + start, column + left
            later = b > a
            a, b, distance = a[later], b[later], bits[row[later], column[later]].astype(np.int64)
            distance += np.bitwise_count(rest[one, a] ^ rest[other, b]).sum(axis=1, dtype=np.int64)
            near = distance <= _BITS
            found.append(np.column_stack([a[near], b[near], distance[near], np.full(near.sum(), number)]))
    pairs = np.concatenate(found)
    pairs = pairs[np.lexsort(pairs.T[[2, 1, 0]])]
    first = np.ones(len(pairs), bool)
    first[1:] = (pairs[1:, :2] != pairs[:-1, :2]).any(axis=1)
    return pairs[first][:, [0, 1, 3]]


def _verified(signs: _Signatures, candidates: np.ndarray) -> list[_Twin]:
    """Those candidates that correlate once they are aligned."""
    twins = []
    for begin in range(0, len(candidates), _CHUNK):
        a, b, number = candidates[begin : begin + _CHUNK].T
        one, other = np.asarray(_COMPARED)[number].T
        # The source is the film that has to be cropped, mirrored or inverted to look like the target.
        swap = other != _WHOLE
        source, target, view = np.where(swap, b, a), np.where(swap, a, b), np.where(swap, other, one)
        flipped, inverted = np.isin(view, (_FLIPPED, _BOTH)), np.isin(view, (_INVERTED, _BOTH))
        moves = _moves(np.where(view < len(_CROPS), view, _WHOLE))

        moving, fixed = _turned(signs.looks(source), flipped, inverted), signs.looks(target)
        moves, score = _register(moving, fixed, moves, steps=1)
        left = np.flatnonzero(score >= _ROUGH)
        if not len(left):
            continue
        moves, _ = _register(moving[left], fixed[left], moves[left], steps=3)
        moving = _turned(signs.thumbs(source[left]), flipped[left], inverted[left])
        fixed = signs.thumbs(target[left])
        score = _correlation(_band(_moved(moving, moves), *_BAND), _band(fixed, *_BAND))
        for i, correlation in zip(left[score >= _TWIN], score[score >= _TWIN], strict=True):
            first, second = signs.films[[a[i], b[i]]].tolist()
            twins.append(_Twin(first, second, bool(flipped[i]), bool(inverted[i]), float(correlation)))
    return twins


def _turned(pictures: np.ndarray, flipped: np.ndarray, inverted: np.ndarray) -> np.ndarray:
    """Mirrors and negates some of the pictures; band-passed, a negative is an inverted film."""
    pictures[flipped] = pictures[flipped, :, ::-1]
    pictures[inverted] *= -1
    return pictures


def _moves(crops: np.ndarray) -> np.ndarray:
    """float32 `[n, 4]`: shift and scale of rows, then of columns, that take a point of the crop to one of the film.

    Coordinates run from -1 to 1 over a side.
    """
    top, bottom, left, right = np.asarray(_CROPS, np.float32)[crops].T
    return np.column_stack([top - bottom, 1 - top - bottom, left - right, 1 - left - right])


def _moved(pictures: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Looks at each picture through its move: linear interpolation, edges repeated; float32 `[n, side, side]`."""
    side = pictures.shape[-1]
    pixel = np.arange(side, dtype=np.float32)
    place = (2 * pixel + 1) / side - 1

    def weights(shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
        at = ((scale[:, None] * place + shift[:, None] + 1) * side - 1) / 2
        return np.maximum(1 - np.abs(at.clip(0, side - 1)[:, :, None] - pixel), 0)

    rows, columns = weights(moves[:, 0], moves[:, 1]), weights(moves[:, 2], moves[:, 3])
    return rows @ pictures @ columns.transpose(0, 2, 1)


def _normal(pictures: np.ndarray) -> np.ndarray:
    """The inner part of each picture with mean 0 and length 1; at its edges the band-pass lacked what lies beyond."""
    margin = math.ceil(pictures.shape[-1] / 16)
    inner = pictures[:, margin:-margin, margin:-margin]
    inner = inner - inner.mean(axis=(1, 2), keepdims=True)
    return inner / np.sqrt((inner * inner).sum(axis=(1, 2), keepdims=True) + 1e-6)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Normalized correlation of pictures, float32 `[n]`."""
    return np.einsum("nij,nij->n", _normal(a), _normal(b))


def _register(moving: np.ndarray, fixed: np.ndarray, moves: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Aligns pictures by inverse compositional Gauss-Newton steps.

    Args:
        moving: float32 `[n, side, side]`.
        fixed: float32 `[n, side, side]`.
        moves: float32 `[n, 4]`, where to begin.
        steps: how many; films that are twins are close after one, and there after three.

    Returns:
        The best moves and their correlations, float32 `[n, 4]` and `[n]`.
    """
    count, side, _ = fixed.shape
    target = _normal(fixed)
    margin = (side - target.shape[-1]) // 2
    place = ((2 * np.arange(side, dtype=np.float32) + 1) / side - 1)[margin:-margin]
    down, across = (np.gradient(target, axis=axis) * (side / 2) for axis in (1, 2))
    slopes = np.stack([down, down * place[:, None], across, across * place], axis=1).reshape(count, 4, -1)
    curvature = slopes @ slopes.transpose(0, 2, 1) + 1e-4 * np.eye(4, dtype=np.float32)
    best, correlation = moves, np.full(count, -1, np.float32)
    for step_number in range(steps + 1):
        seen = _normal(_moved(moving, moves))
        now = np.einsum("nij,nij->n", seen, target)
        better = now > correlation
        best, correlation = np.where(better[:, None], moves, best), np.where(better, now, correlation)
        if step_number == steps:
            break
        error = (seen - target).reshape(count, -1, 1)
        step = np.linalg.solve(curvature, slopes @ error)[:, :, 0].clip(-0.06, 0.06)
        scale = (moves[:, 1::2] / (1 + step[:, 1::2])).clip(0.8, 1.25)
        shift = (moves[:, ::2] - scale * step[:, ::2]).clip(-0.25, 0.25)
        moves = np.stack([shift, scale], axis=2).reshape(count, 4)
    return best, correlation


# --- the verdict ----------------------------------------------------------------------------------------------------


def _pairs(table: pd.DataFrame, twins: Sequence[_Twin]) -> pd.DataFrame:
    """The table of pairs, with the films' numbers in `first` and `second`."""
    first = np.asarray([twin.first for twin in twins], np.int64)
    second = np.asarray([twin.second for twin in twins], np.int64)
    sides = table["side"].to_numpy()
    one, other = sides[first], sides[second]
    who = table["source"].to_numpy() + "\0" + table["patient_id"].to_numpy()
    pairs = pd.DataFrame(
        {
            "kind": [_KINDS[twin.flipped, twin.inverted] for twin in twins],
            "correlation": np.asarray([twin.correlation for twin in twins], np.float64).round(4),
            "leak": ((one == TEST) != (other == TEST)) & (one != "") & (other != ""),
            "same_patient": who[first] == who[second],
            **{
                f"{end}_{name}": table[name].to_numpy()[films]
                for end, films in (("first", first), ("second", second))
                for name in ("set", "row", "source", "split")
            },
            "first": first,
            "second": second,
        }
    )
    return pairs.sort_values(["leak", "correlation"], ascending=False, kind="stable", ignore_index=True)


def _sides(table: pd.DataFrame) -> pd.DataFrame:
    """Patients and studies on several sides, one film of each side."""
    used = table[table["side"] != ""]
    used = used.assign(side=used["side"].replace(PRETRAINING, TRAIN))
    parts = []
    for what, column in (("patient", "patient_id"), ("study", "study_id")):
        who = used.groupby(["source", column], sort=False).ngroup()
        films = used.assign(what=what, number=who).drop_duplicates(["number", "side"])
        films = films[films.groupby("number")["side"].transform("size") > 1]
        films = films.assign(number=pd.factorize(films["number"])[0] + 1)
        parts.append(films.sort_values(["number", "set", "row"]))
    return pd.concat(parts)[["what", "number", "set", "row", "source", "split"]].reset_index(drop=True)


def _judge(found: Audit, table: pd.DataFrame) -> None:
    """Fills in failures and notes."""
    leaks = int(found.pairs["leak"].sum())
    if leaks:
        found.failures.append(f"{_number(leaks, 'pair')} of a test film and one in another split or in {PRETRAINING}")
    for what, plural in (("patient", "patients"), ("study", "studies")):
        torn = found.sides.loc[found.sides["what"] == what, "number"].nunique()
        if torn:
            found.failures.append(f"{_number(torn, what, plural)} on several sides")
    if len(found.unread):
        found.failures.append(f"{_number(len(found.unread), 'film')} could not be read, so nothing is known of them")
    if found.blank:
        found.notes.append(f"{_number(found.blank, 'film')} without content, held against no other")
    if not (table["side"] == TEST).any():
        found.notes.append(f'no film is in a split named "{TEST}": a leak into test data cannot be seen')


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


# --- what is written ------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Audit</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1000px; color: #222; padding: 0 1em }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(470px, 1fr)); gap: 1.2em }
.pair { border: 1px solid #ccc; border-radius: 4px; padding: .6em } .leak { border: 2px solid #b00020 }
.films { display: flex; gap: .5em } figure { margin: 0; flex: 1 } img { max-width: 100%; background: #000 }
figcaption { font-size: 13px } .bad { color: #b00020 } table { border-collapse: collapse } td, th { padding: 0 1em 0 0;
text-align: left }
</style>
<h1 class="{{ 'bad' if found.failed }}">{{ "Failed" if found.failed else "Passed" }}</h1>
{% for line in found.failures %}<p class="bad">{{ line }}</p>{% endfor %}
{% for line in found.notes %}<p>{{ line }}</p>{% endfor %}
<p>Films are named by data set and row (from 0; in shards, the key). This page shows films: it stays where they are.</p>
<table><tr><th>data set<th>films<th>splits</tr>
{% for set in found.sets.itertuples() %}
<tr><td>{{ set.Index }}<td>{{ set.films }}<td>{{ set.splits or "none: pre-training" }}</tr>
{% endfor %}</table>
<h2>Near-identical films: {{ found.pairs | length }}</h2>
{% if found.pairs | length > pairs | length %}<p>The first {{ pairs | length }}; all are in pairs.csv.</p>{% endif %}
<div class="pairs">{% for pair, films in pairs %}
<div class="pair {{ 'leak' if pair.leak }}">
<div>{{ loop.index }}: {{ pair.kind }}, correlation {{ "%.3f" | format(pair.correlation) }},
{{ "same patient" if pair.same_patient else "other patient" }}
{%- if pair.leak %}, <b class="bad">leak</b>{% endif %}</div>
<div class="films">{% for film in films %}
<figure>{% if film.picture %}<img alt="" src="data:image/png;base64,{{ film.picture }}">{% endif %}
<figcaption>data set {{ film.set }}, row {{ film.row }}<br>{{ film.source }}, {{ film.split or "in no split" }}
</figcaption></figure>{% endfor %}</div></div>
{% endfor %}</div>
<h2>Patients and studies on several sides: {{ sides | length }}</h2>
<ul>{% for what, films in sides %}
<li>{{ what }}: {% for film in films %}data set {{ film.set }}, row {{ film.row }} ({{ film.split or "no split"
}}){{ ", " if not loop.last }}{% endfor %}</li>{% endfor %}</ul>
{% if found.unread | length %}<h2>Films that could not be read: {{ found.unread | length }}</h2>
<ul>{% for film in unread %}
<li>data set {{ film.set }}, row {{ film.row }}: {{ film.reason }}</li>{% endfor %}</ul>{% endif %}
</html>
"""


def _write(found: Audit, pairs: pd.DataFrame, films: _Films, out: Path) -> None:
    """Writes the tables and the page."""
    import jinja2

    for name, table in (("pairs.csv", found.pairs), ("sides.csv", found.sides), ("unread.csv", found.unread)):
        with replacing(out / name) as temporary:
            table.to_csv(temporary, index=False)
    shown = []
    for pair in pairs.head(_ON_PAGE).itertuples():
        ends = [
            {
                **{name: getattr(pair, f"{end}_{name}") for name in ("set", "row", "source", "split")},
                "picture": _picture(films.read(int(getattr(pair, end)))),
            }
            for end in ("first", "second")
        ]
        shown.append((pair, ends))
    sides = [(key[0], list(group.itertuples())) for key, group in found.sides.groupby(["what", "number"], sort=False)]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    text = page.render(
        found=found, pairs=shown, sides=sides[:_ON_PAGE], unread=list(found.unread.head(_ON_PAGE).itertuples())
    )
    with replacing(out / "audit.html") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _picture(pixels: np.ndarray | str) -> str:
    """A film as small PNG in base64; "" if it can no longer be read."""
    if isinstance(pixels, str):
        return ""
    buffer = io.BytesIO()
    Image.fromarray(to_storage(pixels, _PICTURE)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
