"""Requests that TensorFlow Serving replays while it loads a model, so that the first real one is not the slow one.

TensorFlow optimizes a graph when it first runs with a signature, and again plans its memory for each new batch size:
so there is a record for each signature and each size that batching may form (`BATCH_SIZES`). The films in them are
black; what is warmed up does not depend on what they show.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.serving.protocol import constant_tensor, message, predict_request

BATCH_SIZES = (1, 2, 4, 8, 16)
PLACE = Path("assets.extra") / "tf_serving_warmup_requests"


def write_warmup(folder: Path, signatures: Sequence[str], size: int, storage_size: int) -> None:
    """Writes `assets.extra/tf_serving_warmup_requests` into a SavedModel's folder: a TFRecord of PredictionLog.

    Args:
        folder: of the SavedModel.
        signatures: which of our signatures it has.
        size: side of the model's input in pixels.
        storage_size: films in bytes are larger than that, so that shrinking them is warmed up too.

    Example:
        >>> write_warmup(Path("dist/savedmodel/1"), ["predict"], 320, 512)  # doctest: +SKIP
    """
    import tensorflow as tf

    path = folder / PLACE
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature in signatures:
            for count in BATCH_SIZES:
                for name, tensor in _inputs(signature, count, size, storage_size):
                    log = message("PredictionLog")()
                    log.predict_log.request.CopyFrom(predict_request("", signature, {name: tensor}))
                    writer.write(log.SerializeToString())


def _inputs(signature: str, count: int, size: int, storage_size: int) -> list[tuple[str, Any]]:
    """The inputs of the records of one signature and batch size: both formats where it decodes files."""
    if signature == "about":
        return [("request", constant_tensor(b"", (count,)))]
    if signature != "serving_default":
        return [("image", constant_tensor(0.0, (count, size, size, 1)))]
    import tensorflow as tf

    film = tf.zeros([storage_size + storage_size // 4, storage_size, 1], tf.uint8)
    files = (tf.io.encode_png(film).numpy(), tf.io.encode_jpeg(film).numpy())
    return [("image_bytes", constant_tensor(file, (count,))) for file in files]
