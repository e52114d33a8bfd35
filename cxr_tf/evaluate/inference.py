"""A model over films of shards: logits, and what each predicted mask has in common with the truth."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

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
