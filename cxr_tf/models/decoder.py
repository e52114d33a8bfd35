"""The U-Net decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import keras

from cxr_tf.models.layers import ModelError
from cxr_tf.models.normalization import normalization_layer

CHANNELS = (256, 128, 64, 32, 16)


def unet_decoder(
    pyramid: Mapping[int, keras.KerasTensor],
    channels: Sequence[int] = CHANNELS,
    *,
    skips: bool = True,
    normalization: str = "batch",
    name: str = "decoder",
) -> keras.KerasTensor:
    """From a feature pyramid back to full resolution (Ronneberger et al., "U-Net", MICCAI 2015).

    At every step the features are enlarged twofold (bilinear, which every export format has as one op), joined with the
    encoder's features of that stride, and go through two 3 × 3 convolutions, each with normalization and ReLU. Where
    the pyramid has no such stride, and at stride 1, there is nothing to join.

    Args:
        pyramid: Stride -> features `[batch, size / stride, size / stride, channels]`; the largest is where it starts.
        channels: After each step, from half the largest stride down to stride 1.
        skips: False joins nothing: all goes through the deepest features.
        normalization: As in `normalization_layer`.
        name: First part of the name of every layer; the second is the stride.

    Returns:
        Features `[batch, size, size, channels[-1]]`.

    Raises:
        ModelError: When the number of channels is not the number of steps.

    Example:
        >>> features = unet_decoder({32: deepest, 16: before}, (256, 128, 64, 32, 16))
    """
    stride = max(pyramid)
    x = pyramid[stride]
    steps = stride.bit_length() - 1
    if len(channels) != steps:
        raise ModelError(
            f"A decoder that starts at stride {stride} takes {steps} channel numbers, from stride {stride // 2} to 1. "
            f"Received: {tuple(channels)}"
        )
    for filters in channels:
        stride //= 2
        prefix = f"{name}_{stride}"
        x = keras.layers.UpSampling2D(2, interpolation="bilinear", name=f"{prefix}_up")(x)
        if skips and stride in pyramid:
            x = keras.layers.Concatenate(name=f"{prefix}_skip")([x, pyramid[stride]])
        for i in (1, 2):
            x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"{prefix}_{i}_conv")(x)
            x = normalization_layer(normalization, filters, name=f"{prefix}_{i}_norm")(x)
            x = keras.layers.ReLU(name=f"{prefix}_{i}_relu")(x)
    return x
