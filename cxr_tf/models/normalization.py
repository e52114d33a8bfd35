"""Which normalization a model has: batch-norm with the fused kernel, synchronized over replicas, or GroupNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from cxr_tf.errors import nearest
from cxr_tf.models.layers import ModelError

NORMALIZATIONS = ("batch", "synchronized", "group")

MOST_MOMENTUM = 0.99  # of batch-norm's moving statistics

# The kernel silently raises a smaller epsilon to this.
_FUSED_EPSILON = 1.001e-5


@keras.saving.register_keras_serializable("cxr_tf")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' batch-norm, computed by TensorFlow's fused kernel while training.

    Outputs, gradients, moving statistics, names and weight paths are those of `keras.layers.BatchNormalization`, so
    weights load into either; a training step of DenseNet-121 is about a fifth faster on a CPU. The name of the class is
    Keras' own because `.weights.h5` files group weights by it. Where the kernel does not apply (other ranks or axes,
    masks, `synchronized=True`, `renorm=True`) and at inference, Keras' code runs.

    Attributes:
        parts: while training, each of so many consecutive parts of the batch is normalized by its own statistics, and
            the moving ones follow their mean: on one device, what batch-norm on so many devices does. It belongs to a
            way of training (`cxr_tf.MoCo` sets it), not to the weights: it is neither saved nor copied.

    Example:
        >>> layer = BatchNormalization(epsilon=1.001e-5)
        >>> layer(images, training=True)  # [batch, height, width, channels]
    """

    parts = 1

    def call(self, inputs, training=None, mask=None):  # noqa: D102
        fused = (
            training
            and self.trainable
            and mask is None
            and len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and self.epsilon >= _FUSED_EPSILON
            and not self.synchronized
            and not self.renorm
        )
        if not fused:
            return super().call(inputs, training=training, mask=mask)
        if self.parts == 1:
            outputs, mean, variance = self._fused(inputs)
        else:
            rows = tf.shape(inputs)[0]
            sizes = tf.fill([self.parts], rows // self.parts) + tf.cast(
                tf.range(self.parts) < rows % self.parts, tf.int32
            )
            each = [self._fused(part) for part in tf.split(inputs, sizes, num=self.parts)]
            outputs = tf.concat([part for part, _, _ in each], axis=0)
            mean = tf.add_n([m for _, m, _ in each]) / self.parts
            variance = tf.add_n([v for _, _, v in each]) / self.parts
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + tf.stop_gradient(batch) * (1.0 - self.momentum))
        return outputs

    def _fused(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Normalized inputs, and the mean and variance of each channel."""
        channels = inputs.shape[-1]
        shape = tf.shape(inputs)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            # On CPUs oneDNN walks rows of pixels two to six times as fast as images.
            inputs if tf.config.list_physical_devices("GPU") else tf.reshape(inputs, [-1, 1, 1, channels]),
            scale=tf.convert_to_tensor(self.gamma) if self.scale else tf.ones([channels]),
            offset=tf.convert_to_tensor(self.beta) if self.center else tf.zeros([channels]),
            epsilon=self.epsilon,
            is_training=True,
        )
        # The kernel divides by n - 1, Keras by n.
        n = tf.cast(tf.size(inputs) // channels, variance.dtype)
        return tf.reshape(outputs, shape), mean, variance * (tf.maximum(n - 1.0, 1.0) / n)


def normalization_layer(kind: str, channels: int, *, name: str, **settings: Any) -> keras.layers.Layer:
    """A new normalization layer.

    Args:
        kind: "batch" (Ioffe & Szegedy 2015; statistics of this replica's batch), "synchronized" (of all replicas'
            batches) or "group" (Wu & He 2018; of the image alone: up to 32 groups of at least four channels).
        channels: Number of channels that it will normalize.
        name: Of the layer.
        **settings: Passed to a batch-norm layer; GroupNorm ignores them.

    Raises:
        ModelError: For another kind.

    Example:
        >>> normalization_layer("group", 64, name="norm").groups
        16
    """
    if kind == "batch":
        return BatchNormalization(name=name, **settings)
    if kind == "synchronized":
        return keras.layers.BatchNormalization(name=name, synchronized=True, **settings)
    if kind == "group":
        return keras.layers.GroupNormalization(_groups(channels), epsilon=1e-5, name=name)
    accepted = ", ".join(f'"{known}"' for known in NORMALIZATIONS)
    raise ModelError(f"normalization is one of {accepted}.{nearest(str(kind), NORMALIZATIONS)} Received: {kind!r}")


def renormalized(layer: keras.layers.Layer, kind: str) -> keras.layers.Layer | None:
    """The layer that stands for a batch-norm layer under another kind of normalization; None for any other layer.

    Its momentum is at most 0.99.
    """
    if not isinstance(layer, keras.layers.BatchNormalization):
        return None
    settings = layer.get_config()
    for key in ("name", "synchronized"):
        del settings[key]
    # MobileNetV3's 0.999 leaves the moving statistics behind for thousands of steps.
    settings["momentum"] = min(settings["momentum"], MOST_MOMENTUM)
    return normalization_layer(kind, layer.output.shape[-1], name=layer.name, **settings)


def copy_model(
    model: keras.Model,
    replace: Callable[[keras.layers.Layer], keras.layers.Layer | None],
    image: keras.KerasTensor | None = None,
    first: keras.layers.Layer | None = None,
) -> keras.Model:
    """A copy of a flat functional model with some layers replaced, on another input, or behind one more first layer.

    Every layer is made anew from its configuration. Sharing the old ones would leave each with two outputs, and
    `layer.output` would still be that of the old graph.

    Args:
        model: Functional, with one input.
        replace: Layer -> the new layer in its place, or None to copy the layer.
        image: The new input; a copy of the old one by default.
        first: A layer to put between the input and all that reads it.

    Returns:
        The new model. A layer keeps its weights where their shapes did not change.
    """
    if image is None:
        image = keras.Input(model.input.shape[1:], dtype=model.input.dtype, name=model.input.name)
    x = image if first is None else first(image)

    def new(layer: keras.Operation) -> keras.Operation:
        return replace(layer) or layer.__class__.from_config(layer.get_config())

    def call(layer: keras.Operation, *args: Any, **kwargs: Any) -> Any:
        # A batch-norm layer records `mask=None`, which a GroupNorm layer does not take.
        given = {key: value for key, value in kwargs.items() if value is not None}
        return layer(*(x if arg is image else arg for arg in args), **given)

    copy = keras.models.clone_model(model, input_tensors=image, clone_function=new, call_function=call)
    for layer in copy.layers:
        if layer is not first and layer.weights:
            old = model.get_layer(layer.name)
            if [w.shape for w in old.weights] == [w.shape for w in layer.weights]:
                layer.set_weights(old.get_weights())
    return copy


def _groups(channels: int) -> int:
    return max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 4))
