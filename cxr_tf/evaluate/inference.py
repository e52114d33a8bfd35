"""A model over films of shards: logits, and what each predicted mask has in common with the truth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from cxr_tf.data.pipeline import batches, read_batches
from cxr_tf.data.shards import ShardFolder
from cxr_tf.evaluate.metrics import MaskScores, mask_scores
from cxr_tf.progress import Update, silent


@dataclass(frozen=True)
class Predictions:
    """What a model said of n films, in the order of the keys that were asked for.

    Attributes:
        labels: float32 `[n, classes]`, NaN = unknown.
        logits: float32 `[n, classes]`, or `None` without a classification head.
        masks: how the predicted masks fit, or `None` without a segmentation head.
    """

    labels: np.ndarray
    logits: np.ndarray | None
    masks: MaskScores | None


def predict_films(
    model: keras.Model,
    shards: ShardFolder,
    keys: np.ndarray,
    *,
    classes: list[str],
    size: int,
    batch_size: int,
    mask_threshold: float = 0.5,
    update: Update = silent,
) -> Predictions:
    """Runs a model over films without augmentation.

    Args:
        model: with outputs "logits" and/or "mask_logits".
        shards: where the films are.
        keys: integer `[n]`, which films.
        classes: the model's classes, in its order.
        size: side of the model's input.
        batch_size: films at a time.
        mask_threshold: probability from which a pixel counts as predicted.
        update: shows progress.

    Returns:
        `Predictions` for the films of `keys`, in their order. Masks are compared in the model's square, without the
        padding around the film.
    """

    run = _forward(model)
    cut = float(np.log(mask_threshold / (1 - mask_threshold)))
    labels, logits, masks = [], [], []
    dataset = batches(
        shards, keys, size=size, batch_size=batch_size, shuffle=False, classes=classes, content_boxes=True
    )
    for images, truth in read_batches(dataset):
        outputs = run(images)
        labels.append(truth["logits"].numpy())
        if "logits" in outputs:
            logits.append(outputs["logits"].numpy())
        if "mask_logits" in outputs:
            predicted = outputs["mask_logits"].numpy() >= cut
            content = _content(truth["content_box"].numpy(), size)
            masks.append(mask_scores(predicted, truth["mask_logits"].numpy(), content))
        update(sum(map(len, labels)), len(keys))
    return Predictions(
        np.concatenate(labels), np.concatenate(logits) if logits else None, MaskScores.join(masks) if masks else None
    )


class Films(NamedTuple):
    """A batch of films as `predict_changed` hands it to a change; all NumPy, rows in one order.

    Attributes:
        images: float32 `[batch, size, size, 1]`, 0-255, padded with black to a square.
        rows: int64 `[batch]`, which of the given keys each film is (0 to n - 1).
        content: bool `[batch, size, size, 1]`, True on the film, False on its padding.
        truth: float32 `[batch, size, size, 1]`, the annotated mask, 0 and 1; NaN all over = no annotation.
    """

    images: np.ndarray
    rows: np.ndarray
    content: np.ndarray
    truth: np.ndarray


Change = Callable[[Films], np.ndarray]  # the films' images, changed: float32, same shape and range


def predict_changed(
    model: keras.Model,
    shards: ShardFolder,
    keys: np.ndarray,
    changes: Mapping[str, Change],
    *,
    classes: list[str],
    size: int,
    batch_size: int,
    output: str = "logits",
    update: Update = silent,
) -> dict[str, np.ndarray]:
    """What a model says of the same films, changed in several ways; each film is read once.

    Args:
        model: with the output.
        shards: where the films are.
        keys: integer `[n]`, which films.
        changes: name -> a function of `Films` that gives changed images. It should depend on the films and their rows
            alone, so that batches of any size give the same.
        classes: the model's classes, in its order.
        size: side of the model's input.
        batch_size: films at a time.
        output: which of the model's outputs.
        update: shows progress.

    Returns:
        name -> float32 `[n, ...]`, in the order of the keys.

    Example:
        >>> said = predict_changed(model, shards, keys, {"as it is": lambda films: films.images})  # doctest: +SKIP
        >>> said["as it is"].shape  # doctest: +SKIP
        (203, 2)
    """
    if list(model.output) != [output]:  # classes cost much less without the decoder
        model = keras.Model(model.input, {output: model.output[output]})
    run = _forward(model)
    said: dict[str, list[np.ndarray]] = {name: [] for name in changes}
    dataset = batches(
        shards, keys, size=size, batch_size=batch_size, shuffle=False, classes=classes, content_boxes=True
    )
    done = 0
    for images, truth in read_batches(dataset):
        films = Films(
            images.numpy(),
            np.arange(done, done + len(images)),
            _content(truth["content_box"].numpy(), size),
            truth["mask_logits"].numpy(),
        )
        for name, change in changes.items():
            said[name].append(run(tf.constant(change(films), tf.float32))[output].numpy())
        done += len(images)
        update(done, len(keys))
    return {name: np.concatenate(parts) for name, parts in said.items()}


@functools.lru_cache(maxsize=1)  # a model that is validated again and again while it trains is traced once
def _forward(model: keras.Model) -> Any:
    shape = tf.TensorSpec(model.input.shape, tf.float32)  # any batch: one trace serves the last, shorter one, too
    return tf.function(lambda images: model(images, training=False), input_signature=[shape])


def _content(boxes: np.ndarray, size: int) -> np.ndarray:
    """Content boxes `[n, 4]` -> bool `[n, size, size, 1]`, True on the film."""
    top, left, height, width = (boxes[:, i, None] for i in range(4))
    line = np.arange(size)[None]
    rows = (line >= top) & (line < top + height)
    columns = (line >= left) & (line < left + width)
    return (rows[:, :, None] & columns[:, None, :])[..., None]
