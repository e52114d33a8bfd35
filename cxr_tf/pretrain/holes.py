"""Where films are holed for inpainting: over a lung, in the center, or in several blocks.

As in `cxr_tf.data.augment`, every draw is a function of (seed, position): replicas and workers make the holes that one
device would, and a run that is taken up again makes those it would have made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from cxr_tf.data.augment import uniforms
from cxr_tf.errors import CxrError, nearest

KINDS = ("lung", "center", "blocks")

# As parts of the side of the film.
_LUNG_SIDES = (68 / 256, 100 / 256)
_LUNG_TOP, _LUNG_BOTTOM = 0.15, 0.85  # the rows of the lung fields
_LUNG_LEFT, _MIDDLE, _LUNG_RIGHT = 0.1, 0.5, 0.9  # and the columns of either
_BLOCK_SIDES = (1 / 8, 1 / 4)

# The same seed and position draw a film's augmentation, whose flip must not tell the side of its hole.
_STREAM = 0x686F6C6573


class HoleError(CxrError):
    """Holes that cannot be made as asked."""


@dataclass(frozen=True)
class Holes:
    """Draws one hole, or several blocks, for each film.

    Attributes:
        kind: "lung": a rectangle over the lung field of the left or of the right half of the picture, by the toss of a
            coin; each side is 68 to 100 of 256 pixels, the top at 0.15 of the height or below, the left edge at 0.1
            or, in the right half, at 0.5 of the width or beyond, and the hole stays in its half and off the lower and
            outer border. "center": the central square of half the side (Belli et al. 2018, arXiv:1812.00964).
            "blocks": several rectangles anywhere, which may overlap, as the random blocks of Pathak et al. ("Context
            Encoders", CVPR 2016); each side is 1/8 to 1/4 of the film's.
        blocks: how many rectangles "blocks" draws; four cover a quarter of the film at most.

    Raises:
        HoleError: an unknown kind, or no block.

    Example:
        >>> holes = Holes("lung")
        >>> holes(0, tf.range(8, dtype=tf.int64), 64).shape
        TensorShape([8, 64, 64, 1])
    """

    kind: str = "lung"
    blocks: int = 4

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            accepted = ", ".join(f'"{kind}"' for kind in KINDS)
            raise HoleError(
                f"The kind of holes is one of {accepted}.{nearest(str(self.kind), KINDS)} Received: {self.kind!r}"
            )
        if self.blocks < 1:
            raise HoleError(f"The number of blocks is at least 1. Received: {self.blocks}")

    def __call__(self, seed: Any, positions: Any, size: int) -> Any:
        """The holes of a batch; works in graph.

        Args:
            seed: int64, of the run.
            positions: int64 `[batch]`, of the films in the run's sequence.
            size: side of the films in pixels, at least 8.

        Returns:
            float32 `[batch, size, size, 1]`: 1 in the hole, 0 elsewhere. No hole is empty, or all of the film.

        Raises:
            HoleError: when the films are too small.
        """
        if size < 8:
            raise HoleError(f"Films with holes have a side of at least 8 pixels. Received: {size}")
        seed = tf.bitwise.bitwise_xor(tf.cast(seed, tf.int64), tf.constant(_STREAM, tf.int64))
        if self.kind == "center":
            start, side = (size - size // 2) // 2, size // 2
            edges = tf.fill([tf.size(positions), 1], tf.constant(start, tf.float64))
            hole = _rectangles(edges, edges, edges + side, edges + side, size)
        elif self.kind == "lung":
            side, height, width, top, left = tf.split(uniforms(seed, positions, 5), 5, axis=1)
            height, width = (_pixels(_LUNG_SIDES, draw, size) for draw in (height, width))
            on_left = side < 0.5
            first = tf.where(on_left, _column(_LUNG_LEFT, size), _column(_MIDDLE, size))
            last = tf.where(on_left, _column(_MIDDLE, size), _column(_LUNG_RIGHT, size))
            top = _place(_column(_LUNG_TOP, size), _column(_LUNG_BOTTOM, size), height, top)
            left = _place(first, last, width, left)
            hole = _rectangles(top, left, top + height, left + width, size)
        else:
            height, width, top, left = tf.split(uniforms(seed, positions, 4 * self.blocks), 4, axis=1)
            height, width = (_pixels(_BLOCK_SIDES, draw, size) for draw in (height, width))
            whole = tf.constant(size, tf.float64)
            top, left = (_place(tf.zeros_like(whole), whole, *of) for of in ((height, top), (width, left)))
            hole = _rectangles(top, left, top + height, left + width, size)
        return tf.ensure_shape(hole, [positions.shape[0], size, size, 1])


def _pixels(part: tuple[float, float], draw: Any, size: int) -> Any:
    """A side between two parts of the film's, in whole pixels."""
    return tf.round((part[0] + (part[1] - part[0]) * draw) * size)


def _column(part: float, size: int) -> Any:
    return tf.constant(round(part * size), tf.float64)


def _place(first: Any, last: Any, length: Any, draw: Any) -> Any:
    """Where a stretch begins that lies between two pixels, each place as likely as the next."""
    return first + tf.floor(draw * tf.maximum(last - first - length + 1, 1))


def _rectangles(top: Any, left: Any, bottom: Any, right: Any, size: int) -> Any:
    """The union of rectangles: float64 `[batch, rectangles]` each -> float32 `[batch, size, size, 1]`."""
    line = tf.range(size, dtype=tf.float64)
    rows = (line >= top[..., None]) & (line < bottom[..., None])
    columns = (line >= left[..., None]) & (line < right[..., None])
    inside = tf.reduce_any(rows[:, :, :, None] & columns[:, :, None, :], axis=1)
    return tf.cast(inside, tf.float32)[..., None]
