"""The one definition of how pixels become model input.

A film is first fitted to the storage size (aspect kept, triangle filter over the whole source area, never enlarged)
and rounded to 8 bits: this is what shards hold. It is then fitted to the model's square and padded with black. Training
does the first half when it prepares and the second when it reads; every predictor does both, so that they see the same
numbers. Each step has a NumPy form, for edge devices and clients, and a TensorFlow form, for pipelines and exported
graphs; tests hold the two together within one grey level.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def fitted_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after the longer side has become `size`, aspect kept, neither below 1.

    Whole-number arithmetic (halves go up), so that every implementation agrees.

    Example:
        >>> fitted_size(400, 300, 100)
        (100, 75)
    """
    longer = max(height, width)
    return (
        max(1, (2 * height * size + longer) // (2 * longer)),
        max(1, (2 * width * size + longer) // (2 * longer)),
    )


def content_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Where a film of `height` x `width` lies in the padded square: (top, left, height, width) in input pixels."""
    fitted_height, fitted_width = fitted_size(height, width, size)
    return (size - fitted_height) // 2, (size - fitted_width) // 2, fitted_height, fitted_width


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Triangle filter whose support grows with the shrinking factor, in float32; `tf.image.resize(antialias=True)`."""
    if pixels.shape == (height, width):
        return pixels.astype(np.float32)
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def to_storage(pixels: np.ndarray, storage_size: int) -> np.ndarray:
    """Shrinks a film until its longer side is at most `storage_size`, and rounds to 8 bits.

    Args:
        pixels: uint8 `[height, width]`, 0-255.
        storage_size: the longer side to shrink to, in pixels. Smaller films stay as they are.

    Returns:
        uint8 `[h, w]`.
    """
    height, width = pixels.shape
    if max(height, width) <= storage_size:
        return pixels
    return np.rint(_resize(pixels, *fitted_size(height, width, storage_size))).clip(0, 255).astype(np.uint8)


def mask_to_storage(mask: np.ndarray, storage_size: int) -> np.ndarray:
    """Shrinks a mask as `to_storage` shrinks its film: a pixel is set where at least half of it was covered.

    Args:
        mask: `[height, width]`, bool or any number; not zero is set.
        storage_size: the longer side to shrink to, in pixels.

    Returns:
        uint8 `[h, w]` of 0 and 1.
    """
    covered = (np.asarray(mask) != 0).astype(np.uint8)
    height, width = covered.shape
    if max(height, width) <= storage_size:
        return covered
    return (_resize(covered, *fitted_size(height, width, storage_size)) >= 0.5).astype(np.uint8)


def to_input(stored: np.ndarray, size: int) -> np.ndarray:
    """Fits a stored film into the model's square, centered, and pads with black.

    Args:
        stored: uint8 `[h, w]`, from `to_storage`.
        size: side of the model's input in pixels.

    Returns:
        float32 `[size, size, 1]`, 0-255.
    """
    top, left, height, width = content_box(stored.shape[0], stored.shape[1], size)
    square = np.zeros((size, size, 1), np.float32)
    square[top : top + height, left : left + width, 0] = _resize(stored, height, width)
    return square


def mask_to_input(stored: np.ndarray, size: int) -> np.ndarray:
    """Fits a stored 0/1 mask into the model's square as `to_input` fits its film.

    Returns:
        float32 `[size, size, 1]` of 0 and 1.
    """
    return (to_input(stored, size) >= 0.5).astype(np.float32)


def mask_to_original(mask: np.ndarray, box: tuple[int, int, int, int], height: int, width: int) -> np.ndarray:
    """Brings a map in the model's square back to the film's own pixels: the padding cut off, then resized.

    Args:
        mask: `[size, size]` or `[size, size, 1]`, for example mask probabilities.
        box: where the film lies in the square: `content_box` of the stored film. (That of the original may be a pixel
            off: the stored size is already rounded.)
        height: rows of the original film.
        width: columns of the original film.

    Returns:
        float32 `[height, width]`.
    """
    top, left, fitted_height, fitted_width = box
    square = np.asarray(mask, np.float32).reshape(mask.shape[:2])
    return _resize(square[top : top + fitted_height, left : left + fitted_width], height, width)


def tf_fitted_size(height: Any, width: Any, size: int) -> tuple[Any, Any]:
    """`fitted_size` on int32 scalar tensors."""
    import tensorflow as tf

    longer = tf.maximum(height, width)
    return (
        tf.maximum(1, (2 * height * size + longer) // (2 * longer)),
        tf.maximum(1, (2 * width * size + longer) // (2 * longer)),
    )


def tf_content_box(height: Any, width: Any, size: int) -> Any:
    """`content_box` on int32 scalar tensors: int32 `[4]`, (top, left, height, width)."""
    import tensorflow as tf

    fitted_height, fitted_width = tf_fitted_size(height, width, size)
    return tf.stack([(size - fitted_height) // 2, (size - fitted_width) // 2, fitted_height, fitted_width])


def _tf_resize(pixels: Any, height: Any, width: Any) -> Any:
    """`_resize` in TensorFlow: `[batch, h, w, 1]` -> float32 `[batch, height, width, 1]`.

    One axis at a time with the other as channels, which the kernel vectorizes over: the same numbers as
    `tf.image.resize(pixels, [height, width], antialias=True)` in half the time.
    """
    import tensorflow as tf

    shape = tf.shape(pixels)
    rows = tf.reshape(pixels, [shape[0], shape[1], 1, shape[2]])
    rows = tf.image.resize(rows, tf.stack([height, 1]), antialias=True)
    columns = tf.image.resize(tf.transpose(rows, [0, 3, 2, 1]), tf.stack([width, 1]), antialias=True)
    return tf.transpose(columns, [0, 3, 1, 2])


def tf_to_storage(pixels: Any, storage_size: int) -> Any:
    """`to_storage` in TensorFlow: uint8 `[height, width, 1]` -> uint8 `[h, w, 1]`."""
    import tensorflow as tf

    shape = tf.shape(pixels)

    def shrink() -> Any:
        resized = _tf_resize(pixels[None], *tf_fitted_size(shape[0], shape[1], storage_size))[0]
        return tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)

    return tf.cond(tf.maximum(shape[0], shape[1]) <= storage_size, lambda: tf.identity(pixels), shrink)


def tf_to_input(stored: Any, size: int) -> Any:
    """`to_input` in TensorFlow: uint8 `[h, w, 1]` -> float32 `[size, size, 1]`, 0-255; also a batch of one shape."""
    import tensorflow as tf

    stored = tf.convert_to_tensor(stored)
    if stored.shape.rank != 4:
        return tf_to_input(stored[None], size)[0]
    shape = tf.shape(stored)[1:3]
    box = tf_content_box(shape[0], shape[1], size)
    fitted = tf.cond(
        tf.reduce_all(tf.equal(box[2:], shape)),
        lambda: tf.cast(stored, tf.float32),
        lambda: _tf_resize(stored, box[2], box[3]),
    )
    after = size - box[:2] - box[2:]
    square = tf.pad(fitted, [[0, 0], [box[0], after[0]], [box[1], after[1]], [0, 0]])
    return tf.ensure_shape(square, [None, size, size, 1])


def tf_mask_to_input(stored: Any, size: int) -> Any:
    """`mask_to_input` in TensorFlow: 0/1 `[h, w, 1]` -> float32 `[size, size, 1]` of 0 and 1."""
    import tensorflow as tf

    return tf.cast(tf_to_input(stored, size) >= 0.5, tf.float32)
