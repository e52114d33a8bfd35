"""From a trained model to what is shipped: loading, float32, pooled features, calibrated outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from cxr_tf.models.encoders import pyramid
from cxr_tf.models.layers import ModelError
from cxr_tf.models.multitask import MultiTask
from cxr_tf.models.saved import read_keras


def load_model(path: str | Path) -> MultiTask:
    """Loads a `model.keras` of a run, in safe mode: nothing in the file is executed.

    Raises:
        ModelError: when the file is missing, cut off, or no multi-task model.
    """
    model = read_keras(Path(path), "the model of a run (model.keras)")
    if not isinstance(model, MultiTask):
        raise ModelError(f"{path}: is a Keras model, but no multi-task model of ours.")
    return model


def float32_model(model: keras.Model) -> keras.Model:
    """A copy of a functional model, with its weights, that computes in float32; not compiled.

    Mixed precision is for training: its graphs export, and then fail where float16 has no kernel.
    """
    copy = type(model).from_config(_in_float32(model.get_config()))
    for layer in copy.layers:
        layer.set_weights(model.get_layer(layer.name).get_weights())
    return copy


def pooled_features(encoder: keras.Model) -> keras.Model:
    """Image -> "features", float32 `[batch, channels]`: the mean of an encoder's deepest level, which classes are read
    from.

    Args:
        encoder: from `cxr_tf.encoder`, or that of a `MultiTask`.
    """
    levels = pyramid(encoder)
    pooled = keras.layers.GlobalAveragePooling2D(dtype="float32", name="features")(levels[max(levels)])
    return keras.Model(encoder.input, {"features": pooled})


def calibrated(outputs: dict[str, Any], operating: dict[str, Any]) -> dict[str, Any]:
    """Model outputs -> what users see.

    Args:
        outputs: "logits" `[batch, classes]` and/or "mask_logits" `[batch, S, S, 1]`, float32.
        operating: a run's `operating.json`: its temperature and task.

    Returns:
        "probabilities" `[batch, classes]`, softmax or sigmoid of logits / temperature, and/or "mask" in 0-1.
    """
    made = {}
    if "logits" in outputs:
        logits = outputs["logits"] / operating["temperature"]
        made["probabilities"] = tf.nn.softmax(logits) if operating["task"] == "multiclass" else tf.sigmoid(logits)
    if "mask_logits" in outputs:
        made["mask"] = tf.sigmoid(outputs["mask_logits"])
    return made


def _in_float32(config: Any) -> Any:
    """A copy of a Keras config in which every mixed or low-precision dtype policy is float32."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return config | {"config": {"name": "float32"}}
        return {key: _in_float32(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(_in_float32(value) for value in config)
    return "float32" if config in ("mixed_float16", "mixed_bfloat16") else config
