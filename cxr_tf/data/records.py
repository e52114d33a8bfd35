"""What is kept of one film: at storage size in memory, and as a record of a shard, written and read back.

A record is a `tf.train.Example` with

    image                               raw 8-bit pixels at storage size, row by row
    height, width                       of these pixels
    mask                                zlib of as many bits (numpy.packbits); empty = no annotation
    mask_pixels                         how many of them are 1
    labels                              in the order of the classes: 1, 0, NaN = unknown
    view, sex, source, age              as in the manifest; "" and NaN = unknown
    image_key, study_key, patient_key   whole numbers in the order of the manifest

and never with a name, a birth date, a UID, a path, or a hash of one. The pixels are raw because decoding is what an
input pipeline has no time for: at 512 pixels TensorFlow decodes some 275 PNG or 605 JPEG films a second and core
(`experiments/benchmarks/input_pipeline.py`).
Masks are packed into bits because inflating one byte a pixel takes longer than anything else that is done to them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cxr_tf.errors import CxrError

KEYS = ("image_key", "study_key", "patient_key")


class RecordError(CxrError):
    """A record that is damaged."""


class StoredFilm(NamedTuple):
    """A film at storage size, as bytes."""

    height: int
    width: int
    image: bytes
    mask: bytes  # zlib of bits; empty = unknown
    mask_pixels: int
    notes: tuple[str, ...]  # what a person should look at

    @classmethod
    def of(cls, image: np.ndarray, mask: np.ndarray | None, notes: Sequence[str] = ()) -> StoredFilm:
        """From pixels, uint8 `[height, width]`, and a mask of their size, 0 and 1, or None where nobody annotated."""
        height, width = image.shape
        packed = b"" if mask is None else zlib.compress(np.packbits(mask).tobytes())
        return cls(height, width, image.tobytes(), packed, 0 if mask is None else int(mask.sum()), tuple(notes))

    def pixels(self) -> np.ndarray:
        """uint8 `[height, width]`, 0-255."""
        return np.frombuffer(self.image, np.uint8).reshape(self.height, self.width)

    def drawn(self) -> np.ndarray | None:
        """The mask, uint8 `[height, width]` of 0 and 1; None where nobody annotated the film."""
        return _unpacked(self.mask, (self.height, self.width)) if self.mask else None


class RecordedFilm(NamedTuple):
    """What a pipeline takes of a record."""

    image: np.ndarray  # uint8 [height, width]
    mask: np.ndarray | None  # uint8 [height, width] of 0 and 1; None where no pixel of it is 1
    known: bool  # annotated
    labels: list[float]


def write_record(film: StoredFilm, row: pd.Series, labels: np.ndarray) -> bytes:
    """A film as a record.

    Args:
        film: its pixels and mask.
        row: its row of the manifest, with the three keys.
        labels: float `[classes]`: 1, 0, NaN = unknown.
    """
    from tensorflow.train import BytesList, Example, Feature, Features, FloatList, Int64List

    def whole(value: int) -> Feature:
        return Feature(int64_list=Int64List(value=[value]))

    def raw(value: bytes) -> Feature:
        return Feature(bytes_list=BytesList(value=[value]))

    def real(values: Sequence[float]) -> Feature:
        return Feature(float_list=FloatList(value=values))

    features = {
        "image": raw(film.image),
        "height": whole(film.height),
        "width": whole(film.width),
        "mask": raw(film.mask),
        "mask_pixels": whole(film.mask_pixels),
        "labels": real(labels.tolist()),
        "age": real([float(row["age"])]),
        **{name: raw(row[name].encode() if isinstance(row[name], str) else b"") for name in ("view", "sex", "source")},
        **{name: whole(int(row[name])) for name in KEYS},
    }
    return Example(features=Features(feature=features)).SerializeToString(deterministic=True)


def read_record(record: bytes, *, truth: bool = True) -> RecordedFilm:
    """A record's film, mask and labels; without `truth` the film alone.

    Raises:
        RecordError: the record is damaged.
    """
    from google.protobuf.message import DecodeError
    from tensorflow.train import Example

    try:
        found: Any = Example.FromString(record).features.feature
        shape = found["height"].int64_list.value[0], found["width"].int64_list.value[0]
        image = np.frombuffer(found["image"].bytes_list.value[0], np.uint8).reshape(shape)
        if not truth:
            return RecordedFilm(image, None, False, [])
        packed = found["mask"].bytes_list.value[0]
        mask = _unpacked(packed, shape) if found["mask_pixels"].int64_list.value[0] else None
        return RecordedFilm(image, mask, bool(packed), list(found["labels"].float_list.value))
    except (DecodeError, IndexError, ValueError, zlib.error) as error:
        raise RecordError("the record is damaged") from error


def _unpacked(packed: bytes, shape: tuple[int, int]) -> np.ndarray:
    bits = np.frombuffer(zlib.decompress(packed), np.uint8)
    return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape)
