from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from cxr_tf.models.decoder import unet_decoder
from cxr_tf.models.layers import ModelError


def levels(*strides: int) -> dict[int, keras.KerasTensor]:
    return {stride: keras.Input((64 // stride, 96 // stride, 2 * stride)) for stride in strides}


@pytest.mark.parametrize("strides", [(2, 4, 8, 16, 32), (4, 8, 16, 32), (32,)])
@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_it_ends_at_full_resolution(strides, normalization):
    features = unet_decoder(levels(*strides), (20, 16, 12, 8, 4), normalization=normalization)
    assert features.shape == (None, 64, 96, 4)


def test_every_level_is_used_with_skips_and_only_the_last_without():
    pyramid = levels(2, 4, 8, 16, 32)
    images = [np.random.default_rng(i).normal(size=(1, *level.shape[1:])) for i, level in enumerate(pyramid.values())]
    for skips, used in ((True, [True] * 5), (False, [False] * 4 + [True])):
        model = keras.Model(list(pyramid.values()), unet_decoder(pyramid, (8, 8, 8, 8, 4), skips=skips))
        inputs = [tf.constant(image, tf.float32) for image in images]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            total = tf.reduce_sum(model(inputs) ** 2)
        gradients = tape.gradient(total, inputs)
        assert [g is not None and bool(np.any(g)) for g in gradients] == used


def test_another_number_of_channels_is_refused():
    with pytest.raises(ModelError, match=r"starts at stride 32 takes 5 channel numbers.*Received: \(8, 4\)"):
        unet_decoder(levels(16, 32), (8, 4))
