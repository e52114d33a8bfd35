"""Holes: where they may be, and that each is a function of (seed, position) alone."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_tf.data.augment import uniforms
from cxr_tf.pretrain.holes import KINDS, HoleError, Holes


def draw(kind: str, seed: int, positions, size: int, **options) -> np.ndarray:
    holes = Holes(kind, **options)(seed, tf.constant(positions, tf.int64), size)
    assert (holes.dtype, holes.shape) == (tf.float32, (len(positions), size, size, 1))
    return holes.numpy()[..., 0]


def extents(hole: np.ndarray) -> tuple[int, int, int, int]:
    """(top, bottom, left, right), the second of each pair outside; the hole must be one rectangle."""
    rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    assert hole[top:bottom, left:right].all() and hole.sum() == (bottom - top) * (right - left)
    return top, bottom, left, right


any_seed = st.integers(-(2**63), 2**63 - 1)
sizes = st.sampled_from([8, 31, 32, 96, 256])


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=any_seed, first=st.integers(0, 2**62), size=sizes)
def test_holes_are_zeros_and_ones_and_neither_empty_nor_everything(kind, seed, first, size):
    holes = draw(kind, seed, [first, first + 1, first + 7], size)
    assert set(np.unique(holes)) == {0.0, 1.0}
    parts = holes.mean((1, 2))
    assert (parts > 0).all() and (parts <= 0.26).all()


@settings(max_examples=40, deadline=None)
@given(seed=any_seed, position=st.integers(0, 2**62), size=st.sampled_from([32, 96, 256]))
def test_a_lung_hole_is_one_rectangle_in_its_half(seed, position, size):
    top, bottom, left, right = extents(draw("lung", seed, [position], size)[0])
    for side in (bottom - top, right - left):
        assert 68 / 256 * size - 0.5 <= side <= 100 / 256 * size + 0.5
    assert top >= 0.15 * size - 0.5 and bottom <= 0.85 * size + 0.5
    if right <= size / 2:
        assert left >= 0.1 * size - 0.5
    else:
        assert left >= size / 2 and right <= 0.9 * size + 0.5


def test_lung_holes_fall_on_both_sides_alike_and_reach_everywhere_they_may():
    holes = draw("lung", 0, range(1000), 256)
    boxes = np.array([extents(hole) for hole in holes])
    on_left = boxes[:, 3] <= 128
    assert abs(on_left.mean() - 0.5) < 0.05
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    assert (heights.min(), heights.max(), widths.min(), widths.max()) == (68, 100, 68, 100)
    assert (boxes[:, 0].min(), boxes[:, 1].max()) == (38, 218)
    assert (boxes[on_left, 2].min(), boxes[on_left, 3].max()) == (26, 128)
    assert (boxes[~on_left, 2].min(), boxes[~on_left, 3].max()) == (128, 230)
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.1


@pytest.mark.parametrize(("size", "inside"), [(8, (2, 6)), (9, (2, 6)), (128, (32, 96))])
def test_the_center_is_the_square_of_half_the_side(size, inside):
    first, last = inside
    for hole in draw("center", 3, [0, 5], size):
        assert extents(hole) == (first, last, first, last)


@pytest.mark.parametrize("blocks", [1, 4])
def test_blocks_cover_at_most_their_areas(blocks):
    holes = draw("blocks", 0, range(500), 64, blocks=blocks)
    parts = holes.mean((1, 2))
    assert parts.min() >= 1 / 64
    assert parts.max() <= blocks / 16
    assert holes[:, 0].any() and holes[:, -1].any() and holes[:, :, 0].any() and holes[:, :, -1].any()
    if blocks == 1:
        for hole in holes:
            extents(hole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_holes_however_films_are_batched_and_in_a_pipeline(kind):
    together = draw(kind, 7, range(12), 32)
    one_by_one = np.concatenate([draw(kind, 7, [i], 32) for i in range(12)])
    np.testing.assert_array_equal(together, one_by_one)
    positions = tf.data.Dataset.range(12).batch(5)
    mapped = positions.map(lambda position: Holes(kind)(tf.constant(7, tf.int64), position, 32))
    np.testing.assert_array_equal(together, np.concatenate([holes.numpy()[..., 0] for holes in mapped]))


@pytest.mark.parametrize("kind", ["lung", "blocks"])
def test_another_seed_or_position_is_another_hole(kind):
    holes = np.concatenate([draw(kind, seed, range(50), 128) for seed in (0, 1)])
    assert len(np.unique(holes.reshape(100, -1), axis=0)) > 95


def test_the_side_of_a_hole_tells_nothing_of_the_augmentation_of_its_film():
    positions = tf.range(4000, dtype=tf.int64)
    on_left = draw("lung", 0, range(4000), 32)[:, :, :16].any((1, 2))
    flips = uniforms(0, positions, 1).numpy()[:, 0] < 0.5
    assert abs(np.corrcoef(on_left, flips)[0, 1]) < 0.05


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(HoleError, match=r'"lung", "center", "blocks".* Did you mean "center"'):
        Holes("centre")
    with pytest.raises(HoleError, match=r"at least 1\. Received: 0"):
        Holes("blocks", blocks=0)
    with pytest.raises(HoleError, match=r"at least 8 pixels\. Received: 4"):
        Holes()(0, tf.range(2, dtype=tf.int64), 4)
