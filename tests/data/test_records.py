"""One film as a record: TensorFlow reads it, nothing needs TensorFlow to, damage is told."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cxr_tf.data.records import RecordError, StoredFilm, framed, read_record, write_record

ROW = pd.Series(
    {"view": "PA", "sex": None, "source": "Klinik ä", "age": 47.5, "image_key": 3, "study_key": 2, "patient_key": 2**40}
)
LABELS = np.array([1.0, 0.0, np.nan])
FILM = np.arange(35, dtype=np.uint8).reshape(5, 7)


def record(mask: np.ndarray | None = None) -> bytes:
    return write_record(StoredFilm.of(FILM, mask), ROW, LABELS)


def test_tensorflow_reads_and_writes_the_same_bytes():
    from tensorflow.train import Example

    written = record(FILM % 2)
    example = Example.FromString(written)
    assert example.SerializeToString(deterministic=True) == written
    feature = example.features.feature
    assert feature["image"].bytes_list.value[0] == FILM.tobytes()
    assert list(feature["patient_key"].int64_list.value) == [2**40]
    words = [feature[name].bytes_list.value[0].decode() for name in ("view", "sex", "source")]
    assert words == ["PA", "", "Klinik ä"]
    np.testing.assert_equal(list(feature["labels"].float_list.value), LABELS.tolist())


def test_tensorflow_writes_the_same_file(tmp_path):
    import tensorflow as tf

    records = [record(), b"", b"x" * 100_000, *(bytes([i]) * i for i in range(40))]
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for one in records:
            writer.write(one)
    assert b"".join(map(framed, records)) == (tmp_path / "theirs").read_bytes()


def test_reading_needs_no_tensorflow():
    code = (
        "import sys; from cxr_tf.data import audit, records; "
        f"records.read_record({record()!r}); assert 'tensorflow' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(
    st.integers(1, 30).flatmap(
        lambda side: st.tuples(
            arrays(np.uint8, (side, 31 - side)),
            st.none() | arrays(np.uint8, (side, 31 - side), elements=st.integers(0, 1)),
        )
    )
)
def test_what_is_written_is_read(film):
    image, mask = film
    read = read_record(write_record(StoredFilm.of(image, mask), ROW, LABELS))
    np.testing.assert_array_equal(read.image, image)
    assert read.known == (mask is not None)
    if mask is not None and mask.any():
        np.testing.assert_array_equal(read.mask, mask)
    else:
        assert read.mask is None
    np.testing.assert_array_equal(read.labels, LABELS.astype(np.float32))


@pytest.mark.parametrize("damaged", [b"", b"\xff" * 40, record()[:-3], record()[7:], b"\x0a\x00"])
def test_a_damaged_record(damaged):
    with pytest.raises(RecordError, match="damaged"):
        read_record(damaged)


@given(st.data())
def test_any_damage_is_read_or_told(data):
    content = bytearray(record(FILM % 2))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RecordError):
        read_record(bytes(content))
