"""What a model sees, over the radiograph it sees it in. NumPy and Pillow alone, so that edge devices draw it too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from cxr_tf.errors import CxrError

PREDICTED = (255, 140, 0)  # orange: what the model says
TRUE = (0, 220, 255)  # cyan: what the annotators say


class FigureError(CxrError):
    """A picture that cannot be drawn from what was given."""


def overlay(
    pixels: np.ndarray,
    mask: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    boxes: Sequence[Sequence[float]] = (),
    *,
    threshold: float = 0.5,
) -> np.ndarray:
    """A radiograph with what the model sees in it, and what annotators said.

    Args:
        pixels: uint8 `[h, w]`, the film in display polarity.
        mask: float `[h, w]`, 0-1: probability of the finding. Drawn in orange where it is at least half the threshold,
            stronger with the probability, with a contour at the threshold.
        truth: `[h, w]`, not zero = finding: outlined in cyan.
        boxes: `[x, y, width, height]` in pixels: outlined in cyan.
        threshold: of the contour.

    Returns:
        uint8 RGB `[h, w, 3]`.

    Raises:
        FigureError: when shapes differ or the mask is not in 0-1.

    Example:
        >>> overlay(np.zeros((4, 4), np.uint8), np.ones((4, 4), np.float32)).shape
        (4, 4, 3)
    """
    film = np.asarray(pixels)
    if film.ndim != 2 or film.dtype != np.uint8 or not film.size:
        raise FigureError(f"A film must be uint8 [h, w]. Received: {film.dtype} {film.shape}.")
    picture = np.repeat(film[:, :, None], 3, axis=2).astype(np.float32)
    thick = max(1, round(max(film.shape) / 300))
    if mask is not None:
        probability = np.asarray(mask, np.float32)
        if probability.shape != film.shape:
            raise FigureError(f"The mask must have the film's shape, {film.shape}. Received: {probability.shape}.")
        if not ((probability >= 0) & (probability <= 1)).all():
            raise FigureError("The mask must lie in 0-1. Received: values outside (logits?).")
        # From nothing at half the threshold up to 35 %: the film's own structures stay readable beneath.
        alpha = 0.35 * np.clip((probability - threshold / 2) / (1 - threshold / 2), 0, 1)[:, :, None]
        picture = picture * (1 - alpha) + np.asarray(PREDICTED, np.float32) * alpha
        picture[outline(probability >= threshold, thick)] = PREDICTED
    if truth is not None:
        if np.shape(truth) != film.shape:
            raise FigureError(f"The true mask must have the film's shape, {film.shape}. Received: {np.shape(truth)}.")
        picture[outline(np.asarray(truth) != 0, thick)] = TRUE
    image = Image.fromarray(np.rint(picture).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x, y, width, height in boxes:
        draw.rectangle([x, y, x + max(width, 1) - 1, y + max(height, 1) - 1], outline=TRUE, width=thick)
    return np.asarray(image)


def outline(region: np.ndarray, thick: int) -> np.ndarray:
    """The inner rim of a region; where it meets the edge of the film too.

    Args:
        region: bool `[h, w]`.
        thick: width of the rim, in pixels.

    Returns:
        bool `[h, w]`.
    """
    core = np.pad(region, 1)
    for _ in range(thick):
        core[1:-1, 1:-1] &= core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    return region & ~core[1:-1, 1:-1]
