"""Pixels -> model input: closed cases, NumPy against TensorFlow, and the way back."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_tf import preprocess

SIDES = st.integers(1, 97)
SIZES = st.integers(1, 64)


def film(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def smooth_film(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.rint(127 + 60 * np.sin(5 * x + 1) + 60 * np.cos(4 * y)).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (400, 300, 100, (100, 75)),
        (300, 400, 100, (75, 100)),
        (512, 512, 320, (320, 320)),
        (1000, 1, 100, (100, 1)),  # 0.1 pixels wide: never below 1
        (4, 3, 2, (2, 2)),  # 1.5 goes up
        (10, 7, 20, (20, 14)),  # enlarged where the model's input is larger
    ],
)
def test_fitted_size_keeps_the_aspect(height, width, size, expected):
    assert preprocess.fitted_size(height, width, size) == expected


@given(SIDES, SIDES, SIZES)
def test_fitted_size_is_the_rounded_ratio(height, width, size):
    fitted = preprocess.fitted_size(height, width, size)
    assert max(fitted) == size
    for side, original in zip(fitted, (height, width), strict=True):
        assert side >= 1
        assert side == 1 or abs(side - original * size / max(height, width)) <= 0.5


@given(SIDES, SIDES, SIZES)
@settings(max_examples=50, deadline=None)
def test_tensorflow_fits_into_the_same_box(height, width, size):
    assert tuple(preprocess.tf_content_box(height, width, size).numpy()) == preprocess.content_box(height, width, size)


def test_content_box_is_centered():
    assert preprocess.content_box(400, 300, 100) == (0, 12, 100, 75)
    assert preprocess.content_box(300, 400, 100) == (12, 0, 75, 100)


def test_small_films_are_stored_as_they_are():
    pixels = film(40, 60)
    np.testing.assert_array_equal(preprocess.to_storage(pixels, 60), pixels)
    np.testing.assert_array_equal(preprocess.tf_to_storage(pixels[..., None], 60)[..., 0], pixels)


def test_storage_of_an_even_film_is_even():
    assert set(np.unique(preprocess.to_storage(np.full((200, 100), 77, np.uint8), 64))) == {77}
    assert preprocess.to_storage(np.zeros((200, 100), np.uint8), 64).shape == (64, 32)


def test_shrinking_averages_the_whole_source():
    """Point sampling would give 0 or 255 for a fine checkerboard; a filter over the source gives gray."""
    board = np.indices((256, 256)).sum(0) % 2 * 255
    stored = preprocess.to_storage(board.astype(np.uint8), 64)
    assert stored[2:-2, 2:-2].min() > 100 and stored[2:-2, 2:-2].max() < 155


def test_shrinking_to_a_third_is_the_triangle_filter():
    """Weights 1/9, 2/9, 3/9, 2/9, 1/9 around the center of three pixels, worked out by hand."""
    row = np.zeros((1, 15), np.uint8)
    row[0, 7] = 90  # the center of the third of five
    stored = preprocess.to_storage(np.repeat(row, 15, axis=0), 5)
    np.testing.assert_array_equal(stored[2], [0, 0, 30, 0, 0])
    row[0] = 0
    row[0, 8] = 90  # one to the right: 2/9 in the third, 1/9 in the fourth
    np.testing.assert_array_equal(preprocess.to_storage(np.repeat(row, 15, axis=0), 5)[2], [0, 0, 20, 10, 0])


@given(SIDES, SIDES, SIZES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_storage_is_the_same_in_numpy_and_tensorflow(height, width, size, seed):
    pixels = film(height, width, seed)
    ours = preprocess.to_storage(pixels, size)
    theirs = preprocess.tf_to_storage(pixels[..., None], size).numpy()[..., 0]
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@given(SIDES, SIDES, SIZES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_input_is_the_same_in_numpy_and_tensorflow(height, width, size, seed):
    pixels = film(height, width, seed)
    ours = preprocess.to_input(pixels, size)
    theirs = preprocess.tf_to_input(pixels[..., None], size).numpy()
    assert ours.shape == theirs.shape == (size, size, 1) and ours.dtype == theirs.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-2)
    assert ours.min() >= 0 and ours.max() <= 255 + 1e-3


@given(SIDES, SIDES, SIZES, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_input_is_what_tensorflow_resizes(height, width, size, seed):
    """The pipeline resizes one axis after the other for speed: the plain call gives the same."""
    pixels = film(height, width, seed)[..., None]
    top, left, h, w = preprocess.content_box(height, width, size)
    plain = np.zeros((size, size, 1), np.float32)
    plain[top : top + h, left : left + w] = tf.image.resize(pixels, [h, w], antialias=True)
    np.testing.assert_allclose(preprocess.tf_to_input(pixels, size), plain, atol=1e-3)


def test_films_of_one_shape_may_be_fitted_together():
    for height, width in ((70, 52), (52, 70), (64, 64), (20, 33)):
        films = np.stack([film(height, width, seed) for seed in range(5)])[..., None]
        together = preprocess.tf_to_input(films, 64).numpy()
        for one, fitted in zip(films, together, strict=True):
            np.testing.assert_array_equal(preprocess.tf_to_input(one, 64), fitted)


@pytest.mark.parametrize(("height", "width"), [(701, 523), (523, 701), (512, 512), (300, 290)])
def test_the_whole_way_is_the_same_in_a_graph(height, width):
    """Both halves, with shapes that are unknown when the graph is built."""

    @tf.function(input_signature=[tf.TensorSpec([None, None, 1], tf.uint8)])
    def graph(pixels):
        return preprocess.tf_to_input(preprocess.tf_to_storage(pixels, 512), 320)

    pixels = film(height, width)
    ours = preprocess.to_input(preprocess.to_storage(pixels, 512), 320)
    theirs = graph(pixels[..., None])
    assert theirs.shape == (320, 320, 1)
    assert np.abs(ours - theirs).max() <= 1


@given(SIDES, SIDES, SIZES)
@settings(max_examples=40, deadline=None)
def test_what_is_not_film_is_black(height, width, size):
    top, left, h, w = preprocess.content_box(height, width, size)
    square = preprocess.to_input(np.full((height, width), 200, np.uint8), size)[..., 0]
    np.testing.assert_allclose(square[top : top + h, left : left + w], 200, atol=1e-3)
    square[top : top + h, left : left + w] = 0
    assert not square.any()


def test_input_of_the_right_size_is_the_film_itself():
    pixels = film(64, 64)
    np.testing.assert_array_equal(preprocess.to_input(pixels, 64)[..., 0], pixels)
    np.testing.assert_array_equal(preprocess.tf_to_input(pixels[..., None], 64)[..., 0], pixels)


@given(SIDES, SIDES, SIZES, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_masks_are_0_and_1_and_the_same_in_numpy_and_tensorflow(height, width, size, seed):
    mask = np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8)
    stored = preprocess.mask_to_storage(mask, size)
    assert stored.dtype == np.uint8 and set(np.unique(stored)) <= {0, 1}
    assert stored.shape == preprocess.to_storage(mask, size).shape
    ours = preprocess.mask_to_input(stored, size)
    theirs = preprocess.tf_mask_to_input(stored[..., None], size).numpy()
    assert ours.dtype == theirs.dtype == np.float32 and set(np.unique(ours)) <= {0.0, 1.0}
    close = np.abs(preprocess.to_input(stored, size) - 0.5) < 1e-4  # a tie may fall on either side
    np.testing.assert_array_equal(ours[~close], theirs[~close])


def test_masks_of_any_number_are_set_where_not_zero():
    mask = np.array([[0, 255], [3, 0]])
    np.testing.assert_array_equal(preprocess.mask_to_storage(mask, 2), [[0, 1], [1, 0]])
    np.testing.assert_array_equal(preprocess.mask_to_storage(mask.astype(bool), 2), [[0, 1], [1, 0]])


def test_a_mask_is_set_where_half_of_a_pixel_is():
    mask = np.zeros((300, 300), np.uint8)
    mask[90:210, 30:150] = 1
    stored = preprocess.mask_to_storage(mask, 100)
    expected = np.zeros((100, 100), np.uint8)
    expected[30:70, 10:50] = 1
    np.testing.assert_array_equal(stored, expected)


@given(st.integers(20, 400), st.integers(20, 400))
@settings(max_examples=40, deadline=None)
def test_a_map_comes_back_to_the_film(height, width):
    """Fit and way back, on a film without sharp edges: small differences, and no shift."""
    pixels = smooth_film(height, width)
    stored = preprocess.to_storage(pixels, 128)
    box = preprocess.content_box(*stored.shape, 96)
    back = preprocess.mask_to_original(preprocess.to_input(stored, 96), box, height, width)
    assert back.shape == (height, width) and back.dtype == np.float32
    assert np.abs(back - pixels).mean() < 2.0


def test_a_box_comes_back_where_it_was():
    mask = np.zeros((480, 360), np.uint8)
    mask[120:240, 60:180] = 1
    stored = preprocess.mask_to_storage(mask, 240)
    box = preprocess.content_box(*stored.shape, 96)
    back = preprocess.mask_to_original(preprocess.mask_to_input(stored, 96), box, 480, 360) >= 0.5
    assert (back & (mask > 0)).sum() / (back | (mask > 0)).sum() > 0.97


def test_padding_does_not_reach_the_way_back():
    square = np.full((96, 96), 7.0, np.float32)
    top, left, h, w = box = preprocess.content_box(300, 200, 96)
    square[top : top + h, left : left + w] = 1.0
    assert set(np.unique(preprocess.mask_to_original(square, box, 300, 200))) == {1.0}


def test_an_edge_device_needs_no_tensorflow():
    code = "import sys, cxr_tf.preprocess; sys.exit('tensorflow' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_films_agree_within_one_gray_level(cxr_data):
    from cxr_tf.data.radiograph import read_radiograph

    films = sorted((cxr_data / "images" / "hannover").glob("*.jpg"))
    for path in [*sorted((cxr_data / "dicom").glob("*.dcm"))[:2], *films[:3]]:
        pixels = read_radiograph(path)
        ours = preprocess.to_storage(pixels, 384)
        theirs = preprocess.tf_to_storage(pixels[..., None], 384)
        assert np.abs(ours.astype(int) - theirs.numpy()[..., 0].astype(int)).max() <= 1
        difference = preprocess.to_input(ours, 320) - preprocess.tf_to_input(theirs, 320)
        assert np.abs(difference).max() <= 1
