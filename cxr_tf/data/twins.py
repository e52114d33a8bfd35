"""Near-identical films among many, found by what they show.

A film that was exported twice (other compression, size, contrast, a narrower crop, mirrored, inverted) is found in
three steps, each of which leaves the next one less to do:

1. perceptual hashes (`imagehash.phash`, 256 bits) of the whole film and of it cropped in 25 ways, compared pair by
   pair: first the 64 bits of the lowest frequencies, of whole films and their middles and then of all crops; then all;
2. a registration of 48-pixel pictures that may move and stretch along both axes (inverse compositional alignment; Baker
   and Matthews, "Lucas-Kanade 20 years on", International Journal of Computer Vision 2004);
3. the correlation of the aligned 96-pixel pictures, of which a band-pass with local contrast normalization leaves ribs,
   vessels and edges: chests are alike in everything coarser.

Two films of one person, taken minutes apart, are no twins: breath and heart have moved.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image
from scipy import ndimage
from threadpoolctl import threadpool_limits

from cxr_tf.processes import ordered_processes

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
_MIDDLE = _CROPS.index((*_TRIMS[3], *_TRIMS[3]))  # the most that is cut off

_SIDE = 16  # of a hash, in bits
_CORNER = 8  # of its part of lowest frequencies
# What follows was set on 1,613 real films, 400 generated ones and a twin of each with all changes at once, half of them
# cropped by 5 % wherever they were cropped. Of other pairs of real films the hashes keep fewer than 1 in 50,000, of
# generated ones 1 in 1,200; experiments/benchmarks/audit.py says what is found in the end.
_LOOK_BITS = 17  # how many of 64 may differ at a first look, which leaves 8 % of other pairs of real films
_CORNER_BITS, _BITS = 8, 34  # how many of 64, and of all, may differ
_ROWS, _COLUMNS = 64, 4096  # films of a block: what is compared stays in the processor's cache
_NEAR = 1024  # pairs of which all views are compared together
_CHUNK = 128  # pairs that are aligned together
_ROUGH_BAND, _BAND = (0.5, 1.5), (0.7, 2.0)  # scales that are kept, in pixels
_ROUGH = 0.88  # correlation after a first step of the registration; twins have 0.93 and more
_TWIN = 0.92  # at full size; twins have 0.945 and more, other pairs up to 0.83 (real), 0.88 (a sample of generated)


class Films(Protocol):
    """Films by number; copies go to other processes."""

    def read(self, film: int) -> np.ndarray | str:
        """A film, uint8 `[height, width]`, or why it cannot be read."""


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


class Signatures(NamedTuple):
    """The signatures of all films that can be compared, numbered anew."""

    films: np.ndarray  # int64 [n], which films they are
    corner: np.ndarray  # uint64 [n, views]: the first 64 bits of their hashes
    rest: np.ndarray  # uint64 [n, views, 3]: the others
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


def signatures(films: Films, count: int, workers: int, store: BinaryIO, tick: Callable[[int], object]) -> Signatures:
    """Reads all films. Their pictures go into the file `store`."""
    compared: list[int] = []
    unread: dict[int, str] = {}
    corner = np.empty((count, _VIEWS), np.uint64)
    rest = np.empty((count, _VIEWS, _SIDE * _SIDE // 64 - 1), np.uint64)
    for film, result in enumerate(_read_all(films, count, workers)):
        if isinstance(result, str):
            unread[film] = result
        elif result is not None:
            number = len(compared)
            corner[number], rest[number] = result.hashes[:, 0], result.hashes[:, 1:]
            _store(store, result)
            compared.append(film)
        tick(1)
    n = len(compared)
    return Signatures(np.asarray(compared, np.int64), corner[:n], rest[:n], store, unread)


def _store(store: BinaryIO, sign: _Signature) -> None:
    store.write(sign.look.tobytes() + sign.thumb.tobytes())
    store.flush()  # it is read by its number, past Python's buffer


def _read_all(films: Films, count: int, workers: int) -> Iterator[_Result]:
    """What `_read_some` gives, film by film in order, in several processes where that pays."""
    tasks = [range(start, min(start + _TASK, count)) for start in range(0, count, _TASK)]
    if workers <= 1 or count <= _FEW:
        for task in tasks:
            yield from _read_some(films, task)
        return
    with ordered_processes(_read_there, workers, _remember, (films,)) as read:
        for found in read(tasks):
            yield from found


def _read_some(films: Films, which: Iterable[int]) -> list[_Result]:
    """The signature of each film, None for a blank one, or why it cannot be read."""
    return [pixels if isinstance(pixels, str) else _sign(pixels) for pixels in map(films.read, which)]


_films_of_process: Films  # in a process of its own, which is sent them once


def _remember(films: Films) -> None:
    global _films_of_process
    _films_of_process = films


def _read_there(which: Iterable[int]) -> list[_Result]:
    return _read_some(_films_of_process, which)


# --- twins ----------------------------------------------------------------------------------------------------------


class Twin(NamedTuple):
    """Two films that are one."""

    first: int
    second: int
    flipped: bool
    inverted: bool
    correlation: float


def find_twins(signs: Signatures, workers: int, tick: Callable[[int], object]) -> list[Twin]:
    """All pairs of near-identical films."""
    count = len(signs.films)

    def block(start: int) -> list[Twin]:
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
        corner: uint64 `[n, views]`, the first 64 bits of the hashes.
        rest: uint64 `[n, views, 3]`, the others.
        start: first film.
        end: film after the last.

    Returns:
        int64 `[pairs, 3]`: the films, and the number of the comparison of views that brought them closest.
    """
    found = [np.zeros((0, 4), np.int64)]
    for left in range(start, len(corner), _COLUMNS):
        rows, columns = corner[start:end, None], corner[left : left + _COLUMNS].T.copy()
        different = np.bitwise_count(rows[:, :, _WHOLE] ^ columns[_WHOLE])
        mirrored = np.bitwise_count(rows[:, :, _FLIPPED] ^ columns[_WHOLE])
        # What differs nowhere from a film differs everywhere from its negative.
        turned = (mirrored <= _CORNER_BITS) | (np.maximum(mirrored, different) >= 64 - _CORNER_BITS)
        for one, other in ((_MIDDLE, _WHOLE), (_WHOLE, _MIDDLE)):
            np.minimum(different, np.bitwise_count(rows[:, :, one] ^ columns[other]), out=different)
        near = np.flatnonzero((different <= _LOOK_BITS) | turned)
        for begin in range(0, len(near), _NEAR):
            row, column = np.divmod(near[begin : begin + _NEAR], columns.shape[1])
            later = column + left > row + start
            found.append(_alike(corner, rest, row[later] + start, column[later] + left))
    pairs = np.concatenate(found)
    pairs = pairs[np.lexsort(pairs.T[[2, 1, 0]])]
    first = np.ones(len(pairs), bool)
    first[1:] = (pairs[1:, :2] != pairs[:-1, :2]).any(axis=1)
    return pairs[first][:, [0, 1, 3]]


def _alike(corner: np.ndarray, rest: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Those comparisons of films `a` with films `b` that bring them close.

    Returns:
        int64 `[found, 4]`: the films, how many bits differ, and the number of the comparison.
    """
    first, second = corner[a], corner[b]
    different = first ^ second[:, :1], first[:, :1] ^ second[:, 1 : len(_CROPS)]  # in the order of _COMPARED
    bits = np.bitwise_count(np.concatenate(different, axis=1))
    pair, number = np.divmod(np.flatnonzero(bits <= _CORNER_BITS), bits.shape[1])
    one, other = np.asarray(_COMPARED)[number].T
    a, b, distance = a[pair], b[pair], bits[pair, number].astype(np.int64)
    distance += np.bitwise_count(rest[a, one] ^ rest[b, other]).sum(axis=1, dtype=np.int64)
    near = distance <= _BITS
    return np.column_stack([a[near], b[near], distance[near], number[near]])


def _verified(signs: Signatures, candidates: np.ndarray) -> list[Twin]:
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
            twins.append(Twin(first, second, bool(flipped[i]), bool(inverted[i]), float(correlation)))
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
