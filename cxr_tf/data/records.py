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
input pipeline has no time for: at 512 pixels TensorFlow decodes some 400 PNG or 800 JPEG films a second and core
(`experiments/benchmarks/input_pipeline.py`).
Masks are packed into bits because inflating one byte a pixel takes longer than anything else that is done to them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pandas as pd
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from cxr_tf.errors import CxrError

KEYS = ("image_key", "study_key", "patient_key")

# tensorflow/core/example/{example,feature}.proto, so that processes that read films need not load TensorFlow for it.
_EXAMPLE = """
name: "example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: ".tensorflow.BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: ".tensorflow.FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: ".tensorflow.Int64List" oneof_index: 0 }
}
message_type {
  name: "Features"
  nested_type {
    name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".tensorflow.Feature" }
  }
  field {
    name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".tensorflow.Features.FeatureEntry"
  }
}
message_type {
  name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".tensorflow.Features" }
}
"""


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
    example = _example_class()()
    feature = example.features.feature

    def whole(name: str, value: int) -> None:
        feature[name].int64_list.value.append(value)

    def raw(name: str, value: bytes) -> None:
        feature[name].bytes_list.value.append(value)

    raw("image", film.image)
    whole("height", film.height)
    whole("width", film.width)
    raw("mask", film.mask)
    whole("mask_pixels", film.mask_pixels)
    feature["labels"].float_list.value.extend(labels.tolist())
    feature["age"].float_list.value.append(float(row["age"]))
    for name in ("view", "sex", "source"):
        raw(name, row[name].encode() if isinstance(row[name], str) else b"")
    for name in KEYS:
        whole(name, int(row[name]))
    return example.SerializeToString(deterministic=True)


def framed(record: bytes) -> bytes:
    """A record as a TFRecord file has it, one behind another: its length and its bytes, each with a masked CRC-32C.

    Written here because `tf.io.TFRecordWriter` costs `prepare` four seconds and half a gigabyte of TensorFlow.
    """
    length = struct.pack("<Q", len(record))
    return b"".join((length, _masked_crc(length), record, _masked_crc(record)))


def _masked_crc(content: bytes) -> bytes:
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def read_record(record: bytes, *, truth: bool = True) -> RecordedFilm:
    """A record's film, mask and labels; without `truth` the film alone.

    Raises:
        RecordError: the record is damaged.
    """
    try:
        found = _example_class().FromString(record).features.feature
        shape = found["height"].int64_list.value[0], found["width"].int64_list.value[0]
        image = np.frombuffer(found["image"].bytes_list.value[0], np.uint8).reshape(shape)
        if not truth:
            return RecordedFilm(image, None, False, [])
        packed = found["mask"].bytes_list.value[0]
        mask = _unpacked(packed, shape) if found["mask_pixels"].int64_list.value[0] else None
        return RecordedFilm(image, mask, bool(packed), list(found["labels"].float_list.value))
    except (DecodeError, IndexError, ValueError, zlib.error) as error:
        raise RecordError("the record is damaged") from error


@cache
def _example_class() -> Any:
    pool = descriptor_pool.DescriptorPool()  # of its own: TensorFlow puts the same names into the default one
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def _unpacked(packed: bytes, shape: tuple[int, int]) -> np.ndarray:
    pixels = shape[0] * shape[1]
    size = -(-pixels // 8)
    bits = np.frombuffer(zlib.decompressobj().decompress(packed, size), np.uint8)  # no more: it may be anybody's shard
    if len(bits) != size:
        raise ValueError(f"{len(bits)} bytes of a mask of {size}")
    return np.unpackbits(bits, count=pixels).reshape(shape)
