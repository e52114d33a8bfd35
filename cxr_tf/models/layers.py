"""Layers that Keras does not have: standardization by constants, and dropout that replicas and restarts agree on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from cxr_tf.errors import CxrError


class ModelError(CxrError):
    """A model that cannot be built, loaded or trained as asked."""


@keras.saving.register_keras_serializable("cxr_tf")
class Standardize(keras.layers.Layer):
    """`(x - mean) / std` with constants: the first layer of every encoder, holding what its weights were trained with.

    Computed in float32 under every dtype policy, because float16 and bfloat16 cannot tell neighboring intensities near
    255 apart; the result has the policy's compute dtype.

    Args:
        mean: Intensity, on the scale of the input (0–255).
        std: Intensities, on the same scale.
        multiple: The sides of the images must be multiples of this.

    Raises:
        ModelError: When it is called on images whose sides are not multiples of `multiple`.

    Example:
        >>> Standardize(mean=128.0, std=64.0)(np.full([1, 2, 2, 1], 192.0)).numpy().ravel().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, mean: float, std: float, multiple: int = 1, **kwargs: Any):
        super().__init__(**kwargs)
        self.mean, self.std, self.multiple = float(mean), float(std), int(multiple)
        self.autocast = False

    def call(self, images):  # noqa: D102
        check_sides(images.shape[1:3], self.multiple)
        # One multiplication and one addition, which converters fold into the first convolution.
        standardized = keras.ops.cast(images, "float32") * (1.0 / self.std) - self.mean / self.std
        return keras.ops.cast(standardized, self.compute_dtype)

    def compute_output_shape(self, input_shape):  # noqa: D102
        return input_shape

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().get_config(), "mean": self.mean, "std": self.std, "multiple": self.multiple}


def check_sides(sides: Sequence[int | None], multiple: int) -> None:
    """Raises ModelError unless each side is unknown (None) or a positive multiple of `multiple`."""
    for side in sides:
        if side is not None and (side < multiple or side % multiple):
            below = max(side // multiple, 1) * multiple
            near = f"{below} or {below + multiple}" if side > multiple else f"{multiple}"
            raise ModelError(
                f"The sides of an image must be multiples of {multiple}, so that each level of the feature pyramid is "
                f"half the one before. The nearest accepted: {near}. Received: {side}"
            )


@keras.saving.register_keras_serializable("cxr_tf")
class Dropout(keras.layers.Layer):
    """Dropout whose draws are a function of (seed, step, row of the global batch).

    Keras' own draws differ between one device and several replicas, and their state is missed by `tf.train.Checkpoint`.
    Here every replica draws for the whole global batch and takes its own rows, so that replicas with equal batches drop
    what one device would; the step is a weight, saved and restored with the others. A frozen layer
    (`trainable = False`) drops nothing.

    Args:
        rate: Share of the units that is set to zero, in [0, 1); the rest is scaled up by `1 / (1 - rate)`.
        noise_shape: Shape of the mask where it is not that of the input; its first entry is the batch. For instance
            `(None, 1, 1, 1)` drops whole images (stochastic depth).
        seed: Any integer. Layers of one model draw differently because their names take part.

    Example:
        >>> Dropout(0.5, seed=1)(np.ones([4, 8], "float32"), training=True)
    """

    def __init__(self, rate: float, noise_shape: Sequence[int | None] | None = None, seed: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        if not 0.0 <= rate < 1.0:
            raise ModelError(f"A dropout rate is at least 0 and below 1. Received: {rate}")
        self.rate, self.seed = float(rate), int(seed)
        self.noise_shape = None if noise_shape is None else tuple(noise_shape)

    def build(self, input_shape):  # noqa: D102
        self.step = self.add_weight(
            name="step", shape=(), dtype="int64", initializer="zeros", trainable=False, aggregation="only_first_replica"
        )

    def call(self, inputs, training=False):  # noqa: D102
        if not training or not self.trainable or self.rate == 0.0:
            return inputs
        shape = tf.shape(inputs)
        rows = shape[0]
        tail = shape[1:]
        if self.noise_shape is not None:
            tail = tf.stack([shape[i] if n is None else n for i, n in enumerate(self.noise_shape)][1:])
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync if context else 1
        replica = context.replica_id_in_sync_group if context else 0
        step = tf.convert_to_tensor(self.step)
        seed = tf.stack([tf.constant((self.seed % 2**31 << 32) + zlib.crc32(self.name.encode()), tf.int64), step])
        uniform = tf.random.stateless_uniform(tf.concat([[replicas * rows], tail], 0), seed)
        kept = uniform[replica * rows : (replica + 1) * rows] >= self.rate
        self.step.assign(step + 1)
        return tf.where(kept, inputs / (1.0 - self.rate), tf.zeros_like(inputs))

    def compute_output_shape(self, input_shape):  # noqa: D102
        return input_shape

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().get_config(), "rate": self.rate, "noise_shape": self.noise_shape, "seed": self.seed}
