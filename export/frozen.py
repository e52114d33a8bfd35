"""A model as one frozen graph: intensities in, logits, calibrated probabilities and mask out; no variables."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from cxr_tf.models.multitask import MultiTask
from cxr_tf.models.outputs import calibrated


class Frozen(tf.Module):
    """A float32 model with its calibration, frozen.

    Converters read variables from a graph in ways of their own (LiteRT leaves some in, and int8 fails then): here every
    weight is a constant before they see it. `predict` is a `tf.function` from "image", float32 `[batch, S, S, 1]`,
    0-255, to a dictionary of

    - "logits" and "probabilities" `[batch, classes]`, before and after temperature scaling;
    - "mask" `[batch, S, S, 1]`, 0-1;

    those of the heads that the model has.

    Args:
        model: that computes in float32 (`cxr_tf.models.outputs.float32_model`).
        operating: the run's `operating.json`.
        batch: films at a time; any number by default.

    Example:
        >>> tf.saved_model.save(frozen, folder, signatures={"predict": frozen.predict})  # doctest: +SKIP
    """

    def __init__(self, model: MultiTask, operating: dict[str, Any], batch: int | None = None):
        super().__init__()
        self.batch, self.size = batch, operating["size"]
        image_in = tf.TensorSpec([batch, self.size, self.size, 1], tf.float32, name="image")

        @tf.function(input_signature=[image_in])
        def whole(image: Any) -> dict[str, Any]:
            raw = model(image, training=False)
            return calibrated(raw, operating) | ({"logits": raw["logits"]} if "logits" in raw else {})

        concrete = whole.get_concrete_function()
        # The frozen function gives a list, in the order in which TensorFlow flattens a dictionary: by key.
        names = sorted(concrete.structured_outputs)
        self._frozen = convert_variables_to_constants_v2(concrete)

        # It closes over the frozen function; its first argument is not `self`, so no method is needed.
        @tf.function(input_signature=[image_in])
        def predict(image: Any) -> dict[str, Any]:
            return dict(zip(names, tf.nest.flatten(self._frozen(image)), strict=True))

        self.predict = predict
