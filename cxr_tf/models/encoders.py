"""Encoders: a name, or a keras-cv or keras-hub backbone, becomes a feature pyramid over one-channel radiographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from cxr_tf.errors import nearest
from cxr_tf.models.layers import Dropout, ModelError, Standardize, check_sides
from cxr_tf.models.normalization import copy_model, normalization_layer, renormalized
from cxr_tf.models.saved import read_keras

# Mean and standard deviation of CheXpert films, from MoCo-CXR (Sowrirajan et al., MIDL 2021), on the scale 0-255.
MEAN, STD = 0.5020 * 255, 0.0856 * 255

# What the ImageNet weights of keras.applications were trained with, on the scale 0-255: (mean, std) of R, G and B.
_TORCH = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_TF = (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)


@dataclass(frozen=True)
class _Application:
    """A network of keras.applications: its function, its layers at strides 2 to 16, its ImageNet constants."""

    function: str
    levels: tuple[str, str, str, str]
    imagenet: tuple[tuple[float, ...], tuple[float, ...]]
    has_preprocessing: bool = False


# The activations of MobileNetV3 are named by a counter that runs on with every model of the process: never by them.
_APPLICATIONS = {
    "densenet121": _Application("DenseNet121", ("conv1_relu", "pool2_relu", "pool3_relu", "pool4_relu"), _TORCH),
    "resnet50v2": _Application(
        "ResNet50V2",
        ("conv1_conv", "conv2_block3_preact_relu", "conv3_block4_preact_relu", "conv4_block6_preact_relu"),
        _TF,
    ),
    "efficientnetv2b0": _Application(
        "EfficientNetV2B0", ("block1a_project_activation", "block2b_add", "block3b_add", "block5e_add"), _TORCH, True
    ),
    "mobilenetv3small": _Application(
        "MobileNetV3Small",
        ("conv_bn", "expanded_conv_project_bn", "expanded_conv_2_add", "expanded_conv_7_add"),
        _TF,
        True,
    ),
    "mobilenetv3large": _Application(
        "MobileNetV3Large",
        ("expanded_conv_add", "expanded_conv_2_add", "expanded_conv_5_add", "expanded_conv_11_add"),
        _TF,
        True,
    ),
}

ENCODERS = (*_APPLICATIONS, "small_resnet")


def encoder(
    name: str | keras.Model,
    input_shape: Sequence[int | None] = (None, None, 1),
    *,
    weights: str | Path | None = None,
    normalization: str = "batch",
    seed: int = 0,
) -> keras.Model:
    """A network that turns radiographs into features at strides 2 to 32.

    Args:
        name: One of `ENCODERS`: "densenet121" (Huang et al. 2017), "resnet50v2" (He et al. 2016), "efficientnetv2b0"
            (Tan & Le 2021), "mobilenetv3small" and "mobilenetv3large" (Howard et al. 2019), all from
            keras.applications, or "small_resnet", a residual network of 0.8 M parameters for demonstrations and tests.
            Or a keras-cv or keras-hub backbone for one-channel images, whose weights are kept.
        input_shape: Height, width, 1. Known sides must be multiples of 32.
        weights: None for random ones; "imagenet" (downloaded by keras.applications, first kernel folded to one
            channel); or the path of an encoder saved by us (`encoder.keras`).
        normalization: "batch", "synchronized" or "group", as in `normalization_layer`.
        seed: Of the stochastic depth of "efficientnetv2b0". Weights are drawn from Keras' global seed
            (`keras.utils.set_random_seed`).

    Returns:
        A flat functional `keras.Model` from "image" `[batch, height, width, 1]`, intensities 0–255, to a dictionary
        "stride_2", "stride_4", … "stride_32" of features `[batch, height / stride, width / stride, channels]`. Its
        first layer standardizes, with the constants that the weights were trained with. Keras-cv and keras-hub
        backbones may lack "stride_2".

    Raises:
        ModelError: For an unknown name, a side that is not a multiple of 32, more than one channel, or weights that
            are not those of this encoder.

    Example:
        >>> model = cxr_tf.encoder("densenet121", (320, 320, 1), weights="imagenet")
        >>> model(images)["stride_32"].shape
        TensorShape([8, 10, 10, 1024])
    """
    shape = checked_shape(input_shape)
    if isinstance(name, keras.Model):
        if weights is not None:
            raise ModelError(f"A backbone brings its own weights: leave `weights` out. Received: weights={weights!r}")
        return _from_backbone(name, shape, normalization, seed)
    if name not in ENCODERS:
        raise ModelError(
            f"There is no such encoder. Accepted: {', '.join(ENCODERS)}.{nearest(str(name), ENCODERS)} "
            f"Received: {name!r}"
        )
    if weights is None:
        return _build(name, shape, normalization, seed)
    if weights == "imagenet":
        return _from_imagenet(name, shape, normalization, seed)
    return _from_file(name, shape, Path(weights), normalization, seed)


def pyramid(model: keras.Model) -> dict[int, keras.KerasTensor]:
    """Stride -> symbolic features of an encoder.

    Raises:
        ModelError: When the model is not an encoder of ours.

    Example:
        >>> sorted(pyramid(cxr_tf.encoder("small_resnet")))
        [2, 4, 8, 16, 32]
    """
    outputs = model.output if isinstance(model, keras.Model) and hasattr(model, "output") else None
    if not isinstance(outputs, dict) or not all(key.removeprefix("stride_").isdigit() for key in outputs):
        raise ModelError(
            'An encoder has a dictionary of outputs "stride_4" … "stride_32"; make one with `cxr_tf.encoder`. '
            f"Received: {outputs if isinstance(outputs, dict) else model!r}"
        )
    return {int(key.removeprefix("stride_")): value for key, value in sorted(outputs.items())}


def checked_shape(input_shape: Sequence[int | None]) -> tuple[int | None, int | None, int]:
    """(height, width, 1), or ModelError where the channels are not one or a side is not a multiple of 32."""
    shape = tuple(input_shape)
    if len(shape) != 3 or shape[2] != 1:
        raise ModelError(f"Radiographs have one channel: input_shape is (height, width, 1). Received: {input_shape}")
    check_sides(shape[:2], 32)
    return shape[0], shape[1], 1


def _build(
    name: str, shape: tuple[int | None, ...], normalization: str, seed: int, mean: float = MEAN, std: float = STD
) -> keras.Model:
    image = keras.Input(shape, name="image")
    x = Standardize(mean, std, multiple=32, name="standardize")(image)
    if name == "small_resnet":
        return keras.Model(image, _outputs(_small_resnet(x, normalization)), name=name)
    application = _APPLICATIONS[name]
    whole = _application(name, input_tensor=x)
    levels = {2 ** (i + 1): whole.get_layer(level).output for i, level in enumerate(application.levels)}
    model = keras.Model(image, _outputs(levels | {32: whole.output}), name=name)
    return copy_model(model, lambda layer: renormalized(layer, normalization) or _repeatable(layer, seed))


def _application(name: str, **settings: object) -> keras.Model:
    application = _APPLICATIONS[name]
    if application.has_preprocessing:
        settings["include_preprocessing"] = False
    return getattr(keras.applications, application.function)(include_top=False, **({"weights": None} | settings))


def _outputs(levels: dict[int, keras.KerasTensor]) -> dict[str, keras.KerasTensor]:
    return {f"stride_{stride}": tensor for stride, tensor in levels.items()}


def _repeatable(layer: keras.layers.Layer, seed: int) -> keras.layers.Layer | None:
    if not isinstance(layer, keras.layers.Dropout):
        return None
    return Dropout(layer.rate, layer.noise_shape, seed, name=layer.name)


def _small_resnet(x: keras.KerasTensor, normalization: str) -> dict[int, keras.KerasTensor]:
    """Residual blocks of two convolutions (He et al. 2016), one or two a stage."""

    def conv(x: keras.KerasTensor, filters: int, size: int, stride: int, name: str) -> keras.KerasTensor:
        x = keras.layers.Conv2D(
            filters, size, stride, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv"
        )(x)
        return normalization_layer(normalization, filters, name=f"{name}_norm")(x)

    def block(x: keras.KerasTensor, filters: int, stride: int, name: str) -> keras.KerasTensor:
        shortcut = x if stride == 1 else conv(x, filters, 1, stride, f"{name}_shortcut")
        x = keras.layers.ReLU(name=f"{name}_1_relu")(conv(x, filters, 3, stride, f"{name}_1"))
        x = keras.layers.Add(name=f"{name}_add")([conv(x, filters, 3, 1, f"{name}_2"), shortcut])
        return keras.layers.ReLU(name=f"{name}_relu")(x)

    x = keras.layers.ReLU(name="stem_relu")(conv(x, 16, 3, 2, "stem"))
    levels = {2: x}
    for stage, (filters, blocks) in enumerate(((24, 1), (48, 1), (96, 1), (128, 2)), start=1):
        for i in range(blocks):
            x = block(x, filters, 2 if i == 0 else 1, f"stage{stage}_block{i + 1}")
        levels[2 ** (stage + 1)] = x
    return levels


def _from_imagenet(name: str, shape: tuple[int | None, ...], normalization: str, seed: int) -> keras.Model:
    if name not in _APPLICATIONS:
        raise ModelError(f"There are ImageNet weights for {', '.join(_APPLICATIONS)}. Received: {name!r}")
    if normalization == "group":
        raise ModelError('ImageNet weights were trained with batch-norm. Received: normalization="group"')
    try:
        rgb = _application(name, weights="imagenet", input_shape=(224, 224, 3))
    except Exception as error:  # no network, a cut-off download, no room: keras.utils.get_file raises them all bare
        raise ModelError(f"The ImageNet weights of {name} could not be fetched: {error}") from error
    means, stds = _APPLICATIONS[name].imagenet
    gray = _build(name, shape, normalization, seed, mean=float(np.mean(means)), std=float(np.mean(stds)))
    fold_rgb(rgb, gray, means, stds)
    return gray


def fold_rgb(rgb: keras.Model, gray: keras.Model, means: Sequence[float], stds: Sequence[float]) -> None:
    """Copies the weights of a three-channel network into the same network for one channel.

    A gray image gives the same features in both: the kernels of the channels are summed, each scaled by its channel's
    standard deviation, and what is left of the channels' different means is a constant that goes into the bias, or
    into the moving mean of the batch-norm behind it. In the border only, where the two pad with slightly different
    grays (0 after standardization), networks trained with different means a channel differ a little.

    Args:
        rgb: For images standardized by `means` and `stds`.
        gray: An encoder, with constants of its own.
        means: Of R, G and B.
        stds: Of R, G and B.
    """
    source = [layer for layer in rgb.layers if layer.weights]
    target = [layer for layer in gray.layers if layer.weights and not isinstance(layer, Dropout)]
    for old, new in zip(source, target, strict=True):
        if old is not source[0]:
            new.set_weights(old.get_weights())
    standardize = next(layer for layer in gray.layers if isinstance(layer, Standardize))
    kernel, *bias = source[0].get_weights()
    scaled = kernel / np.reshape(stds, (1, 1, 3, 1))
    offset = np.sum(scaled * (standardize.mean - np.reshape(means, (1, 1, 3, 1))), axis=(0, 1, 2))
    folded = np.sum(scaled, axis=2, keepdims=True) * standardize.std
    target[0].set_weights([folded, *(b + offset for b in bias)])
    if not bias:
        moving_mean = target[1].moving_mean
        moving_mean.assign(moving_mean - offset)


def _from_file(name: str, shape: tuple[int | None, ...], path: Path, normalization: str, seed: int) -> keras.Model:
    saved = read_keras(path, "an encoder saved by us (encoder.keras)")
    try:
        pyramid(saved)
    except ModelError as error:
        raise ModelError(f"{path} holds a Keras model, but no encoder of ours. {error}") from error
    if saved.name != name:
        raise ModelError(f'{path} holds the encoder "{saved.name}". Received: encoder "{name}"')
    standardize = next(layer for layer in saved.layers if isinstance(layer, Standardize))
    model = _build(name, shape, normalization, seed, mean=standardize.mean, std=standardize.std)
    try:
        model.set_weights(saved.get_weights())
    except ValueError as error:
        raise ModelError(
            f"{path} does not fit: GroupNorm and batch-norm cannot stand in for each other. Received: normalization="
            f'"{normalization}"'
        ) from error
    return model


def _from_backbone(backbone: keras.Model, shape: tuple[int | None, ...], normalization: str, seed: int) -> keras.Model:
    if hasattr(backbone, "pyramid_outputs"):  # keras-hub
        levels = dict(backbone.pyramid_outputs)
    elif hasattr(backbone, "pyramid_level_inputs"):  # keras-cv
        levels = {key: backbone.get_layer(layer).output for key, layer in backbone.pyramid_level_inputs.items()}
    else:
        raise ModelError(
            "A backbone names its feature pyramid in `pyramid_level_inputs` (keras-cv) or `pyramid_outputs` "
            f"(keras-hub). Received: {backbone!r}"
        )
    if backbone.input_shape[-1] != 1:
        raise ModelError(
            "Radiographs have one channel: make the backbone with input_shape=(None, None, 1). "
            f"Received: a backbone for {backbone.input_shape[-1]} channels"
        )
    if any(isinstance(layer, keras.layers.Rescaling) for layer in backbone.layers):
        raise ModelError(
            "Intensities are standardized before the backbone: make it with include_rescaling=False. "
            f"Received: {backbone.name} with a Rescaling layer"
        )
    tensors = {2 ** int(key[1:]): tensor for key, tensor in levels.items()}
    # keras-cv's last level can stand before the network's last normalization, which is its output.
    if backbone.output.shape == tensors[max(tensors)].shape:
        tensors[max(tensors)] = backbone.output
    model = keras.Model(backbone.input, _outputs(tensors), name=backbone.name)
    return copy_model(
        model,
        lambda layer: renormalized(layer, normalization) or _repeatable(layer, seed),
        image=keras.Input(shape, name="image"),
        first=Standardize(MEAN, STD, multiple=32, name="standardize"),
    )
