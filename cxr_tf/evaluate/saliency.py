"""Where on a film the evidence for a class lies (Grad-CAM), and the same network without what it learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cxr_tf.models.encoders import pyramid
from cxr_tf.models.layers import ModelError
from cxr_tf.models.multitask import MultiTask
from cxr_tf.models.normalization import copy_model
from cxr_tf.models.outputs import float32_model

TOP = -1  # stands where a class number would: the class with the highest logit

_PROBE = 256  # pixels
_NORMALIZATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
)


def grad_cam(model: MultiTask) -> Callable[[Any, Any], Any]:
    """A compiled function from films and classes to saliency maps (Selvaraju et al., "Grad-CAM: Visual explanations
    from deep networks via gradient-based localization", ICCV 2017).

    The channels of the encoder's deepest level are summed, each weighted by the mean of the class's gradient over that
    channel; what speaks against the class is cut off at 0; and the map is enlarged bilinearly to the film, on which a
    place of that level is 32 pixels wide. With a linear head on the pooled features it equals the class activation map
    (Zhou et al., "Learning deep features for discriminative localization", CVPR 2016) divided by the number of places,
    without what is negative; hidden layers count with their gradient at that film.

    Where strided convolutions pad on one side only, as TensorFlow's do, a place looks up to half its width below and to
    the right of where it lies (Keras' ResNets: above and to the left). That is measured on the architecture, and the
    map is moved to where the network looks.

    The gradient is that of the logit, so neither task nor temperature changes anything but the scale.

    Make it once for many batches. One forward pass, and one backward pass through the classification head alone.

    Args:
        model: with a classification head.

    Returns:
        `(images, class_index) -> saliency`: images float32 `[batch, height, width, 1]`, 0-255; class_index integers
        `[batch]`, the class that is explained on each film, or `TOP` for the one with the highest logit; saliency
        float32 `[batch, height, width]`, 0 or more, on no fixed scale (`normalized` gives 0-1). It takes batches of any
        size, and can be called in another `tf.function` and exported with it.

    Raises:
        ModelError: for a model without a classification head.

    Example:
        >>> explain = grad_cam(model)  # doctest: +SKIP
        >>> explain(images, [1, 1, 0, TOP]).shape  # doctest: +SKIP
        TensorShape([4, 320, 320])
    """
    if "logits" not in model.heads:
        raise ModelError(
            "Grad-CAM explains classes, so it takes a model with a classification head. Received: a model that only "
            "segments"
        )
    levels = pyramid(model.encoder)
    shift = _shift(model.encoder)
    inner = keras.Model(model.input, {"level": levels[max(levels)], "logits": model.output["logits"]})

    @tf.function(input_signature=[tf.TensorSpec(model.input.shape, tf.float32), tf.TensorSpec([None], tf.int32)])
    def saliency(images: Any, class_index: Any) -> Any:
        found = inner(images, training=False)
        level, logits = found["level"], found["logits"]
        top = tf.argmax(logits, axis=1, output_type=tf.int32)
        chosen = tf.gather(logits, tf.where(class_index == TOP, top, class_index), axis=1, batch_dims=1)
        # Not a GradientTape: it records nothing of an encoder that is frozen. A film's logits depend on no other film.
        (gradient,) = tf.gradients(tf.reduce_sum(chosen), level)
        weights = tf.reduce_mean(tf.cast(gradient, tf.float32), axis=[1, 2], keepdims=True)
        evidence = tf.nn.relu(tf.reduce_sum(weights * tf.cast(level, tf.float32), axis=-1, keepdims=True))
        large = tf.image.resize(evidence, tf.shape(images)[1:3])[..., 0]
        for axis in (1, 2):
            side = tf.shape(large)[axis]
            large = tf.gather(large, tf.clip_by_value(tf.range(side) - shift, 0, side - 1), axis=axis)
        return large

    traced = saliency.get_concrete_function()  # now, so that several models are no "frequent retracing" to TensorFlow
    return lambda images, class_index: traced(tf.cast(images, tf.float32), tf.cast(class_index, tf.int32))


def _shift(encoder: keras.Model) -> int:
    """How far below and to the right of where they lie the places of the deepest level look, in pixels.

    Measured on the same architecture with kernels that average: the gradient of its central places is how much each
    pixel counts for them, and they lie around the center of the image. Where shortcuts look elsewhere than the
    convolutions beside them, as in "small_resnet", it is the mean of both: which of the two counts, training decides.
    """

    def without_normalization(layer: keras.layers.Layer) -> keras.layers.Layer | None:
        return keras.layers.Identity(name=layer.name) if isinstance(layer, _NORMALIZATIONS) else None

    probe = copy_model(float32_model(encoder), without_normalization, image=keras.Input((None, None, 1), name="image"))
    for layer in probe.layers:
        for weight in layer.weights:
            kernel = weight.name == "kernel"
            averaged = 2 if isinstance(layer, keras.layers.DepthwiseConv2D) else len(weight.shape) - 1
            weight.assign(tf.fill(weight.shape, 1 / np.prod(weight.shape[:averaged]) if kernel else 0.0))
    levels = pyramid(probe)
    inner = keras.Model(probe.input, levels[max(levels)])
    image = tf.fill([1, _PROBE, _PROBE, 1], 255.0)
    with tf.GradientTape() as tape:
        tape.watch(image)
        level = inner(image, training=False)
        middle = level.shape[1] // 2
        center = tf.reduce_sum(tf.cast(level[:, middle - 1 : middle + 1, middle - 1 : middle + 1], tf.float32))
    counts = tape.gradient(center, image)[0, ..., 0].numpy().astype(np.float64)
    counts = np.maximum(counts - np.median(counts), 0)  # squeeze-and-excitation looks everywhere alike
    if not counts.any():  # layers of another kind, which do not pass an average on: nothing is known
        return 0
    looks_at = counts.sum(axis=1) @ np.arange(_PROBE) / counts.sum()
    return round(looks_at - (_PROBE - 1) / 2 + 1e-3)  # halves go up, whatever their last bits


def normalized(saliency: Any) -> Any:
    """Maps with a maximum of 1, each scaled by itself; a map without any evidence stays 0 all over. Works in graph.

    Args:
        saliency: float32 `[batch, height, width]`, 0 or more.

    Returns:
        float32 of the same shape, 0-1.
    """
    return tf.math.divide_no_nan(saliency, tf.reduce_max(saliency, axis=[1, 2], keepdims=True))


def saliency_of(
    model: MultiTask, images: np.ndarray, class_index: Sequence[int] | np.ndarray | None = None, *, batch_size: int = 16
) -> np.ndarray:
    """Saliency maps of some films, to be drawn over them.

    Args:
        model: with a classification head.
        images: float32 `[n, height, width, 1]`, 0-255.
        class_index: which class to explain on each film, `[n]`; by default the one with the highest logit.
        batch_size: films at a time.

    Returns:
        float32 `[n, height, width]`, 0-1, as `normalized` makes them: how strong the evidence is, compared with the
        strongest on the same film. Maps of two films cannot be compared.

    Raises:
        ModelError: for a model without a classification head.

    Example:
        >>> saliency_of(model, images, [1, 1, 0]).max(axis=(1, 2))  # doctest: +SKIP
        array([1., 1., 1.], dtype=float32)
    """
    explain = grad_cam(model)
    wanted = np.full(len(images), TOP) if class_index is None else np.asarray(class_index)
    maps = [np.zeros((0, *images.shape[1:3]), np.float32)]
    for start in range(0, len(images), batch_size):
        batch = slice(start, start + batch_size)
        maps.append(normalized(explain(images[batch], wanted[batch])).numpy())
    return np.concatenate(maps)


def randomized(model: MultiTask, seed: int, *, top: int | None = None) -> MultiTask:
    """A copy of a model whose weights are drawn anew, as before any training.

    A map that stays as it was explains the film's edges, not what the model learned (Adebayo et al., "Sanity checks for
    saliency maps", NeurIPS 2018).

    Args:
        model: is left as it is.
        seed: of the new weights.
        top: how many layers with weights are drawn anew, counted from the logits towards the film ("cascading
            randomization"); by default all layers are, those of the decoder too.

    Returns:
        The copy, not compiled. Batch-norm that is drawn anew is the identity.

    Raises:
        ModelError: for `top` with a model without a classification head.

    Example:
        >>> untrained = randomized(model, seed=0)  # doctest: +SKIP
        >>> other_head = randomized(model, seed=0, top=1)  # doctest: +SKIP
    """
    copy = type(model).from_config(_seeded(model.get_config(), np.random.default_rng(seed)))
    if top is None:
        return copy
    if "logits" not in copy.heads:
        raise ModelError(f"`top` counts layers from the logits. Received: top={top} for a model that only segments")
    upwards = [layer for layer in keras.Model(copy.input, copy.output["logits"]).layers if layer.weights]
    anew = {layer.name for layer in upwards[max(len(upwards) - top, 0) :]}
    for layer in copy.layers:
        if layer.name not in anew:
            layer.set_weights(model.get_layer(layer.name).get_weights())
    return copy


def _seeded(config: Any, rng: np.random.Generator) -> Any:
    """A copy of a Keras config in which every initializer has a seed, so that no global state is read."""
    if isinstance(config, dict):
        if config.get("module") == "keras.initializers" and "seed" in config.get("config", {}):
            return config | {"config": config["config"] | {"seed": int(rng.integers(2**31))}}
        return {key: _seeded(value, rng) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(_seeded(value, rng) for value in config)
    return config
