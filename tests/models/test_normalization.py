"""The fused batch-norm is Keras' own, only faster; kinds of normalization can be exchanged."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import cxr_tf
from cxr_tf.models.layers import ModelError
from cxr_tf.models.normalization import BatchNormalization, copy_model, normalization_layer, renormalized

SETTINGS = [
    {"epsilon": 1.001e-5, "momentum": 0.9},
    {"scale": False},
    {"center": False},
    {"epsilon": 1e-6},  # below what the kernel takes
    {"axis": 1},
]


def pair(shape, **settings):
    rng = np.random.default_rng(0)
    layers = keras.layers.BatchNormalization(**settings), BatchNormalization(**settings)
    for layer in layers:
        layer.build(shape)
    weights = [rng.uniform(0.5, 2.0, w.shape) for w in layers[0].weights]
    for layer in layers:
        layer.set_weights(weights)
    return layers


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (1, 1, 2, 3), (1, 1, 1, 3)])
def test_outputs_gradients_and_moving_statistics_are_those_of_keras(shape, settings):
    x = tf.constant(np.random.default_rng(1).normal(3, 2, shape), tf.float32)
    upstream = tf.constant(np.random.default_rng(2).normal(size=shape), tf.float32)
    results = []
    for layer in pair(shape, **settings):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y * upstream)
        results.append([y, *tape.gradient(loss, [x, *layer.trainable_variables]), *layer.non_trainable_variables])
    for keras_own, ours in zip(*results, strict=True):
        # One value a channel: Keras' own subtracts two numbers of the size of 1 / sqrt(epsilon).
        np.testing.assert_allclose(ours, keras_own, rtol=1e-5, atol=1e-4 if shape[:3] == (1, 1, 1) else 1e-5)


def test_other_ranks_inference_and_frozen_layers_are_keras_own():
    for shape, options, trainable in (
        ((8, 3), {"training": True}, True),
        ((2, 4, 4, 3), {"training": False}, True),
        ((2, 4, 4, 3), {"training": True}, False),
    ):
        x = np.random.default_rng(1).normal(size=shape).astype("float32")
        layers = pair(shape)
        for layer in layers:
            layer.trainable = trainable
        np.testing.assert_array_equal(*(layer(x, **options) for layer in layers))
        for a, b in zip(layers[0].weights, layers[1].weights, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_masked_input_is_normalized_by_keras_own_code():
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype("float32")
    mask = np.random.default_rng(2).integers(0, 2, (2, 4, 4)).astype(bool)
    found = [layer(x, training=True, mask=mask) for layer in pair(x.shape)]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_keeps_statistics_in_float32(policy):
    x = np.random.default_rng(1).normal(3, 2, (4, 6, 6, 3)).astype("float32")
    layer, exact = BatchNormalization(dtype=policy), BatchNormalization()
    y = layer(x, training=True)
    assert y.dtype == layer.compute_dtype
    assert all(w.dtype == "float32" for w in layer.weights)
    np.testing.assert_allclose(tf.cast(y, tf.float32), exact(x, training=True), atol=0.05)
    np.testing.assert_allclose(layer.moving_mean, exact.moving_mean, rtol=1e-2, atol=1e-3)


def small_model(normalization: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Conv2D(8, 3, padding="same", name="conv")(image)
    x = normalization_layer(normalization, 8, name="norm")(x)
    return keras.Model(image, {"out": keras.layers.ReLU(name="out")(x)})


def test_weights_files_go_both_ways_between_fused_and_plain(tmp_path):
    fused = small_model("batch")
    fused.get_layer("norm").set_weights(np.random.default_rng(0).uniform(0.5, 1.5, (4, 8)))
    plain = keras.models.clone_model(
        fused,
        clone_function=lambda layer: (keras.layers.BatchNormalization if layer.name == "norm" else type(layer))
        .from_config(layer.get_config()),
    )  # fmt: skip
    x = np.random.default_rng(1).uniform(size=(2, 8, 8, 1)).astype("float32")
    fused.save_weights(tmp_path / "fused.weights.h5")
    plain.load_weights(tmp_path / "fused.weights.h5")
    np.testing.assert_array_equal(plain(x)["out"], fused(x)["out"])
    plain.save_weights(tmp_path / "plain.weights.h5")
    fused.load_weights(tmp_path / "plain.weights.h5")
    assert [w.path for w in plain.weights] == [w.path for w in fused.weights]


def test_exported_it_needs_no_code_of_ours(tmp_path):
    fused = small_model("batch")
    x = np.random.default_rng(1).uniform(size=(2, 8, 8, 1)).astype("float32")
    fused.export(tmp_path / "saved", verbose=False)
    saved = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(saved.serve(x)["out"], fused(x)["out"], atol=1e-6)


def exchanged(model, kind):
    return copy_model(model, lambda layer: renormalized(layer, kind))


def test_kinds_are_exchanged_under_the_old_names_with_the_weights_they_share():
    batch = small_model("batch")
    synchronized = exchanged(batch, "synchronized")
    assert synchronized.get_layer("norm").synchronized
    x = np.random.default_rng(1).uniform(size=(2, 8, 8, 1)).astype("float32")
    np.testing.assert_array_equal(synchronized(x)["out"], batch(x)["out"])
    back = exchanged(synchronized, "batch")
    assert type(back.get_layer("norm")) is BatchNormalization
    group = exchanged(batch, "group")
    assert isinstance(group.get_layer("norm"), keras.layers.GroupNormalization)
    np.testing.assert_array_equal(group.get_layer("conv").kernel, batch.get_layer("conv").kernel)
    assert group.get_layer("norm").output is group.get_layer("out").input, "one graph: get_layer(...).output is its own"


@pytest.mark.parametrize("given, kept", [(0.9, 0.9), (0.999, 0.99)])
def test_moving_statistics_follow_within_hundreds_of_steps(given, kept):
    image = keras.Input((8, 8, 4))
    norm = keras.layers.BatchNormalization(momentum=given, name="norm")
    assert exchanged(keras.Model(image, norm(image)), "batch").get_layer("norm").momentum == kept


@pytest.mark.parametrize("channels, groups", [(1, 1), (3, 1), (4, 1), (16, 4), (24, 6), (64, 16), (128, 32), (256, 32)])
def test_groups_have_at_least_four_channels(channels, groups):
    assert normalization_layer("group", channels, name="norm").groups == groups


@pytest.mark.parametrize("kind", ["batch", "synchronized", "group"])
def test_an_encoder_has_the_kind_that_was_asked_for(kind):
    encoder = cxr_tf.encoder("mobilenetv3small", (32, 32, 1), normalization=kind)
    norms = [layer for layer in encoder.layers if layer.name.endswith("bn")]
    expected = {
        "batch": BatchNormalization,
        "synchronized": keras.layers.BatchNormalization,
        "group": keras.layers.GroupNormalization,
    }[kind]
    assert len(norms) == 34
    assert all(type(norm) is expected for norm in norms)


def test_another_kind_is_refused():
    with pytest.raises(ModelError, match=r'"batch", "synchronized", "group". Did you mean "synchronized"'):
        normalization_layer("synchronised", 4, name="norm")
