"""A model over films of shards: logits, and what each predicted mask has in common with the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cxr_tf.data.pipeline import batches
from cxr_tf.data.shards import ShardFolder
from cxr_tf.progress import Update, silent


@dataclass(frozen=True)
class Predictions:
    """What a model said of n films, in the order of the keys that were asked for.

    Attributes:
        logits: float32 `[n, classes]`, or `None` without a classification head.
        labels: float32 `[n, classes]`, NaN = unknown.
        mask_known: bool `[n]`, whether the film is annotated; the next two are NaN where it is not.
        mask_area: part of the film that the annotation covers.
        dice, iou: overlap of prediction and annotation, NaN where either is undefined (no annotation, or an empty one).
        predicted_area: part of the film that the prediction covers; `None` for all four without a segmentation head.
    """

    logits: np.ndarray | None
    labels: np.ndarray
    mask_known: np.ndarray
    mask_area: np.ndarray | None
    dice: np.ndarray | None
    iou: np.ndarray | None
    predicted_area: np.ndarray | None


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
        `Predictions` for the films of `keys`, in their order. Masks are compared in the model's square; there the
        padding around a film is black and holds no annotation.
    """

    @tf.function(reduce_retracing=True)
    def run(images: Any) -> dict[str, Any]:
        return model(images, training=False)

    columns: dict[str, list[np.ndarray]] = {}
    cut = float(np.log(mask_threshold / (1 - mask_threshold)))
    done = 0
    for images, truth in batches(shards, keys, size=size, batch_size=batch_size, shuffle=False, classes=classes):
        outputs = run(images)
        row = {"labels": truth["logits"].numpy()}
        if "logits" in outputs:
            row["logits"] = outputs["logits"].numpy()
        mask = truth["mask_logits"].numpy()[..., 0]
        row["mask_known"] = ~np.isnan(mask[:, 0, 0])
        if "mask_logits" in outputs:
            row |= _overlap(outputs["mask_logits"].numpy()[..., 0] > cut, mask)
        for name, values in row.items():
            columns.setdefault(name, []).append(values)
        done += len(images)
        update(done, len(keys))
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    return Predictions(**{field: joined.get(field) for field in Predictions.__dataclass_fields__})  # type: ignore[arg-type]


def _overlap(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Per film, from bool `[n, S, S]` and 0/1/NaN `[n, S, S]`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        area = truth.sum((1, 2))  # NaN where unknown
        both = np.where(np.isnan(area), np.nan, (predicted & (truth == 1)).sum((1, 2)))
        said = predicted.sum((1, 2)).astype(float)
        annotated = area > 0
        dice = np.where(annotated, 2 * both / (said + area), np.nan)
        iou = np.where(annotated, both / (said + area - both), np.nan)
    pixels = truth.shape[1] * truth.shape[2]
    return {"mask_area": area / pixels, "dice": dice, "iou": iou, "predicted_area": said / pixels}
