"""Inpainting: its losses and figures, its step, saving, what the segmentation decoder takes, and two replicas.

TensorFlow fixes its devices when it starts, so what needs two replicas runs in a process of its own: this file as a
script, which prints what it found as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import cxr_tf
from cxr_tf.data.phantom import CLASSES, phantom
from cxr_tf.models.layers import ModelError, Standardize
from cxr_tf.models.normalization import normalization_layer
from cxr_tf.pretrain.filling import evaluate_baselines, evaluate_filling
from cxr_tf.pretrain.holes import Holes
from cxr_tf.pretrain.inpainting import Inpainting

MEAN = 100.0
CHANNELS = (8, 8, 4, 4, 4)


def tiny_encoder(normalization: str = "group", filters: int = 8) -> keras.Model:
    """One convolution a level: what takes time in these tests is tracing."""
    image = keras.Input((None, None, 1), name="image")
    x, levels = Standardize(MEAN, 64.0, multiple=32, name="standardize")(image), {}
    for stride in (2, 4, 8, 16, 32):
        x = keras.layers.Conv2D(filters, 3, 2, padding="same", name=f"conv{stride}")(x)
        x = keras.layers.ReLU(name=f"relu{stride}")(
            normalization_layer(normalization, filters, name=f"norm{stride}")(x)
        )
        levels[f"stride_{stride}"] = x
    return keras.Model(image, levels, name="tiny")


def make(normalization: str = "group", **settings) -> Inpainting:
    keras.utils.set_random_seed(0)
    encoder = tiny_encoder(normalization)
    return Inpainting(encoder, **{"decoder_channels": CHANNELS, "normalization": normalization} | settings)


def batch(items: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Every hole is in the first half."""
    images = np.random.default_rng(seed).uniform(0, 255, (items, 32, 32, 1)).astype("float32")
    holes = Holes()(seed, tf.range(items, dtype=tf.int64), 32).numpy()
    holes[items // 2 :] = 0.0
    return {"image": images, "hole": holes}


def constants(data):
    return tf.nest.map_structure(tf.constant, data)


def numbers(logs) -> dict[str, float]:
    return {name: float(value) for name, value in logs.items()}


def arrays(variables) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(v) for v in variables]


def assert_equal(first, second) -> None:
    for a, b in zip(arrays(first), arrays(second), strict=True):
        np.testing.assert_array_equal(a, b)


# One device


@pytest.mark.parametrize("whole_image", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_a_step_is_the_update_by_the_mean_over_holes(whole_image, skips):
    model = make(whole_image=whole_image, skips=skips)
    model.compile(keras.optimizers.SGD(0.1))
    data = batch()
    x, hole = data["image"], data["hole"]
    with tf.GradientTape() as tape:
        seen = np.where(hole > 0, np.float32(MEAN), x)
        errors = tf.square(model.reconstruction(seen, training=True) - x / 255)
        each = [tf.reduce_mean(errors[i][hole[i] > 0]) for i in range(4)]
        mse = tf.add_n(each) / 4
        loss = tf.reduce_mean(errors) if whole_image else mse
    variables = model.trainable_variables
    expected = [v - 0.1 * g for v, g in zip(variables, tape.gradient(loss, variables), strict=True)]
    logs = model.train_step(constants(data))
    assert set(logs) == {"loss", "mse", "psnr"}
    for found, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(logs["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(logs["mse"], mse, rtol=1e-6)
    np.testing.assert_allclose(logs["psnr"], np.mean([-10 * np.log10(e) for e in each]), rtol=1e-5)


def test_an_adversarial_step_updates_both_networks_by_their_losses():
    model = make(adversarial=0.25)
    model.compile(keras.optimizers.SGD(0.1), discriminator_optimizer=keras.optimizers.SGD(0.2))
    data = batch()
    x, hole = data["image"] / 255, data["hole"]

    def logit(films):
        return model.discriminator(2 * films[:4] - 1)[:, 0]

    bce = keras.losses.BinaryCrossentropy(from_logits=True)
    with tf.GradientTape(persistent=True) as tape:
        reconstructed = model(constants(data), training=True)
        filled = tf.where(hole > 0, reconstructed, x)
        errors = tf.square(reconstructed - x)
        mse = tf.add_n([tf.reduce_mean(errors[i][hole[i] > 0]) for i in range(4)]) / 4
        taken = bce(tf.ones(4), logit(filled))
        loss = 0.75 * mse + 0.25 * taken
        frozen = tf.stop_gradient(filled)
        told = (bce(tf.ones(4), logit(x)) + bce(tf.zeros(4), logit(frozen))) / 2
    mine, theirs = model.trainable_variables, model.discriminator.trainable_variables
    assert not {id(v) for v in mine} & {id(v) for v in theirs}
    assert len(mine) == len(model.reconstruction.trainable_variables)
    expected = [v - 0.1 * g for v, g in zip(mine, tape.gradient(loss, mine), strict=True)]
    expected += [v - 0.2 * g for v, g in zip(theirs, tape.gradient(told, theirs), strict=True)]
    logs = model.train_step(constants(data))
    for found, value in zip([*mine, *theirs], expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-6)
    by_hand = {"loss": loss, "mse": mse, "adversarial_loss": taken, "discriminator_loss": told}
    for name, value in by_hand.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-5)
    assert float(told) == pytest.approx(np.log(2), abs=0.1), "it starts undecided"


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_films_without_a_hole_are_a_loss_of_zero_and_no_update(adversarial):
    model = make(adversarial=adversarial)
    model.compile(keras.optimizers.SGD(0.1), **({"discriminator_optimizer": "sgd"} if adversarial else {}))
    before = arrays(model.weights)
    logs = numbers(model.train_step(constants(batch() | {"hole": np.zeros([8, 32, 32, 1], "float32")})))
    assert set(logs.values()) == {0.0}
    assert_equal(before, model.weights)


def test_the_model_cannot_see_what_is_in_the_hole():
    model = make()
    data = batch()
    other = data | {"image": np.where(data["hole"] > 0, 7.0, data["image"]).astype("float32")}
    np.testing.assert_array_equal(model(constants(data)), model(constants(other)))
    seen = model.cut(data["image"], data["hole"]).numpy()
    assert (seen[data["hole"] > 0] == MEAN).all()
    np.testing.assert_array_equal(model(seen), model(constants(data)))
    standardized = model.encoder.get_layer("standardize")(seen).numpy()
    assert np.abs(standardized[data["hole"] > 0]).max() < 1e-6


def test_filling_leaves_the_film_outside_of_the_hole():
    model = make()
    data = batch()
    filled = model.fill(data["image"], data["hole"]).numpy()
    inside = data["hole"] > 0
    np.testing.assert_array_equal(filled[~inside], data["image"][~inside])
    np.testing.assert_allclose(filled[inside], 255 * model(constants(data)).numpy()[inside], rtol=1e-6)
    assert filled.min() >= 0 and filled.max() <= 255


def test_the_very_encoder_is_trained():
    model = make()
    encoder = model.encoder
    model.compile(keras.optimizers.SGD(0.1))
    before = np.array(encoder.get_layer("conv2").kernel)
    model.fit(tf.data.Dataset.from_tensors(batch()).repeat(2), verbose=0)
    assert np.abs(before - encoder.get_layer("conv2").kernel).max() > 0
    assert model.reconstruction.get_layer("conv2") is encoder.get_layer("conv2")
    evaluated = model.evaluate(tf.data.Dataset.from_tensors(batch()), return_dict=True, verbose=0)
    assert set(evaluated) == {"loss", "mse", "psnr"}


def test_what_cannot_be_built_is_said():
    encoder = tiny_encoder()
    for setting, message in (
        ({"adversarial": 1.0}, "below 1. Received: 1.0"),
        ({"decoder_channels": (8, 4)}, "takes 5 channel numbers"),
        ({"normalization": "layer"}, "normalization is one of"),
    ):
        with pytest.raises(ModelError, match=message):
            Inpainting(encoder, **setting)
    with pytest.raises(ModelError, match=r"make one with `cxr_tf\.encoder`"):
        Inpainting(keras.Sequential([keras.Input((32, 32, 1)), keras.layers.Conv2D(1, 1)]))
    image = keras.Input((32, 32, 1))
    with pytest.raises(ModelError, match="standardizes its images in its first layer"):
        Inpainting(keras.Model(image, {"stride_2": keras.layers.MaxPooling2D(2)(image)}, name="bare"))
    for layer in encoder.layers:
        layer.trainable = False
    with pytest.raises(ModelError, match="all layers of the encoder are frozen"):
        Inpainting(encoder)
    model = make()
    with pytest.raises(ModelError, match=r"adversarial=0\.0, discriminator_optimizer='sgd'"):
        model.compile("sgd", discriminator_optimizer="sgd")
    with pytest.raises(ModelError, match=r'"image" and "hole"\. Received: .+image'):
        model.test_step({"image": tf.zeros([2, 32, 32, 1])})
    with pytest.raises(ModelError, match="A hole has the shape of its image"):
        model.test_step({"image": tf.zeros([2, 32, 32, 1]), "hole": tf.zeros([2, 32, 32])})


# Saving


def test_a_saved_model_is_the_same_and_goes_on_the_same(tmp_path):
    model = make("batch", adversarial=0.1, skips=True, seed=3)
    model.compile(keras.optimizers.Adam(1e-2), discriminator_optimizer=keras.optimizers.Adam(1e-2))
    model.train_step(constants(batch()))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected, found = model.get_config(), loaded.get_config()
    assert [layer.name for layer in loaded.encoder.layers] == [layer.name for layer in model.encoder.layers]
    del expected["encoder"], found["encoder"]
    assert type(loaded) is Inpainting and found == expected
    assert_equal(model.weights, loaded.weights)
    data = constants(batch(seed=1))
    np.testing.assert_allclose(loaded(data), model(data), atol=1e-6)
    assert numbers(loaded.train_step(data)) == pytest.approx(numbers(model.train_step(data)), rel=1e-4)
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_checkpoint_has_both_optimizers(tmp_path):
    def compiled() -> Inpainting:
        model = make(adversarial=0.1)
        model.compile(keras.optimizers.Adam(1e-2), discriminator_optimizer=keras.optimizers.Adam(1e-2))
        model.optimizer.build(model.trainable_variables)
        return model

    model = compiled()
    model.train_step(constants(batch()))
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "c"))
    model.train_step(constants(batch(seed=1)))
    resumed = compiled()
    tf.train.Checkpoint(model=resumed).restore(path).assert_consumed()
    assert int(resumed.discriminator_optimizer.iterations) == 1
    resumed.train_step(constants(batch(seed=1)))
    assert_equal(model.weights, resumed.weights)
    assert_equal(model.discriminator_optimizer.variables, resumed.discriminator_optimizer.variables)


def test_the_reconstruction_stands_alone(tmp_path):
    model = make("batch")
    model.reconstruction.save(tmp_path / "reconstruction.keras")
    loaded = keras.saving.load_model(tmp_path / "reconstruction.keras")
    seen = model.cut(**{f"{k}s": v for k, v in batch().items()})
    np.testing.assert_allclose(loaded(seen), model(seen), atol=1e-6)


# The segmentation decoder


def multitask(normalization: str = "group", filters: int = 8, **settings) -> cxr_tf.MultiTask:
    keras.utils.set_random_seed(1)
    settings = {"hidden": 0, "decoder_channels": CHANNELS, "normalization": normalization} | settings
    return cxr_tf.multitask(tiny_encoder(normalization, filters), (32, 32, 1), 3, **settings)


@pytest.mark.parametrize(("mine", "theirs"), [("group", "group"), ("batch", "synchronized")])
def test_the_decoder_starts_the_segmentation_decoder_and_nothing_else_changes(tmp_path, mine, theirs):
    model = make(mine, skips=True)
    for variable in model.reconstruction.variables:
        variable.assign(variable + 0.5)
    model.reconstruction.save(tmp_path / "reconstruction.keras")
    plain, found = multitask(theirs), multitask(theirs, decoder_weights=tmp_path / "reconstruction.keras")
    copied = 0
    for layer in found.layers:
        from_decoder = layer.name.startswith("decoder_")
        copied += len(layer.weights) if from_decoder else 0
        source = model.reconstruction if from_decoder else plain
        assert_equal(source.get_layer(layer.name).weights, layer.weights)
    assert copied == 5 * 2 * (3 if mine == "group" else 5)


def test_a_decoder_that_does_not_fit_is_refused_with_the_reason(tmp_path):
    paths = {}
    for name, model in {
        "skips": make(skips=True),
        "none": make(),
        "batch": make("batch", skips=True),
        "thin": make(skips=True, decoder_channels=(8, 8, 4, 4, 2)),
    }.items():
        paths[name] = tmp_path / f"{name}.keras"
        model.reconstruction.save(paths[name])
    make().encoder.save(tmp_path / "encoder.keras")
    (tmp_path / "broken.keras").write_text("nothing")
    for path, settings, message in (
        (tmp_path / "missing.keras", {}, "does not exist; a reconstruction"),
        (tmp_path / "broken.keras", {}, "is cut off, or no Keras model"),
        (tmp_path / "encoder.keras", {}, "not the `reconstruction` of an `Inpainting`"),
        (paths["none"], {}, r"without skip connections.*Inpainting\(..., skips=True\)"),
        (paths["thin"], {}, r"decoder_channels=\(8, 8, 4, 4, 2\)`. Received: \(8, 8, 4, 4, 4\)"),
        (paths["batch"], {}, "another normalization.*GroupNormalization for a decoder with BatchNormalization"),
        (paths["skips"], {"filters": 12}, "another encoder: the weights of decoder_16_1_conv"),
        (paths["skips"], {"segmentation": False}, "for a model with a decoder"),
    ):
        with pytest.raises(ModelError, match=message):
            multitask(decoder_weights=path, **settings)


# Mixed precision


@pytest.fixture
def float16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)


def test_float16_takes_almost_the_step_of_float32(float16):
    model = make("batch", adversarial=0.1)
    keras.config.set_dtype_policy("float32")
    exact = make("batch", adversarial=0.1)
    assert model.reconstruction.get_layer("decoder_2_1_conv").compute_dtype == "float16"
    assert {layer.compute_dtype for layer in model.discriminator.layers if layer.weights} == {"float32"}
    logs = []
    for each in (exact, model):
        each.compile(keras.optimizers.SGD(0.1), discriminator_optimizer=keras.optimizers.SGD(0.1))
        step = each.train_step(constants(batch()))
        assert {value.dtype for value in step.values()} == {tf.float32}
        logs.append(numbers(step))
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert logs[1] == pytest.approx(logs[0], rel=0.02)
    for a, b in zip(exact.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-3)


def test_a_film_that_is_not_finite_updates_neither_network_in_float16(float16):
    model = make(adversarial=0.1)
    model.compile(keras.optimizers.SGD(0.1))
    data = batch()
    data["image"][0] = np.inf
    before = arrays(model.trainable_variables + model.discriminator.trainable_variables)
    model.train_step(constants(data))
    assert_equal(before, model.trainable_variables + model.discriminator.trainable_variables)


# Learning


def films(count: int, size: int = 32) -> np.ndarray:
    rng = np.random.default_rng(0)
    pixels = [phantom(CLASSES[0], rng, 2 * size).pixels.astype("float32") / 4095 * 255 for _ in range(count)]
    return np.stack(pixels).reshape(count, size, 2, size, 2, 1).mean((2, 4))


@pytest.mark.slow
def test_it_learns_to_fill_generated_films_better_than_their_mean():
    images = films(40)
    holes = Holes("center")(0, tf.range(40, dtype=tf.int64), 32)
    data = tf.data.Dataset.from_tensor_slices({"image": images, "hole": holes})
    model = make(decoder_channels=(16, 16, 8, 8, 8))
    model.compile(keras.optimizers.Adam(1e-2))
    step = tf.function(model.train_step)
    logs = [step(each) for each in data.take(32).repeat(40).batch(32)]
    assert logs[-1]["mse"] < 0.5 * logs[0]["mse"]
    unseen = data.skip(32).batch(8)
    found = evaluate_filling(model, unseen) | evaluate_baselines(unseen)
    assert found["psnr"] > found["mean_psnr"] + 2, found
    assert found["ssim"] > found["mean_ssim"] + 0.1, found


# Two replicas


@functools.cache  # a second strategy would number its collectives as the first did
def two_cpus() -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def compiled(normalization: str, optimizer: str, settings: dict) -> Inpainting:
    model = make(normalization, **settings)
    # With batch-norm and a larger rate, rounding alone (the rows in another order) grows from step to step.
    some = {"sgd": lambda: keras.optimizers.SGD(0.01), "adam": lambda: keras.optimizers.Adam(1e-3)}[optimizer]
    model.compile(some(), **({"discriminator_optimizer": some()} if model.adversarial else {}))
    model.optimizer.build(model.trainable_variables)
    return model


def state(model: Inpainting) -> list[np.ndarray]:
    """The weights; and Adam's first moments, which after one step are a tenth of the gradients."""
    found = arrays(model.weights)
    for optimizer in (model.optimizer, model.discriminator_optimizer):
        if isinstance(optimizer, keras.optimizers.Adam):
            found += arrays(optimizer._momentums)
    return found


def halves(strategy: tf.distribute.Strategy, data):
    def part(context):
        first = context.replica_id_in_sync_group * 4
        return tf.nest.map_structure(lambda x: tf.constant(x[first : first + 4]), data)

    return strategy.experimental_distribute_values_from_function(part)


CASES = {
    "group norm": ("group", "sgd", {}, 5),
    "skips, whole image": ("group", "sgd", {"skips": True, "whole_image": True}, 5),
    "adversarial": ("group", "sgd", {"adversarial": 0.2}, 5),
    "synchronized batch-norm": ("synchronized", "sgd", {}, 5),
    "gradients for Adam": ("group", "adam", {"adversarial": 0.2}, 1),
}


def compare(case: str) -> dict[str, float]:
    normalization, optimizer, settings, steps = CASES[case]
    model = compiled(normalization, optimizer, settings)
    start = arrays(model.weights)
    step = tf.function(model.train_step)
    logs = [numbers(step(constants(batch(seed=i)))) for i in range(steps)]
    expected = state(model)

    strategy = two_cpus()
    with strategy.scope():
        other = compiled(normalization, optimizer, settings)
    both = tf.function(lambda data: strategy.run(other.train_step, args=(data,)))
    found_logs = []
    for i in range(steps):
        values = both(halves(strategy, batch(seed=i)))
        each = [[float(v) for v in strategy.experimental_local_results(value)] for value in values.values()]
        assert all(first == second for first, second in each)
        found_logs.append(dict(zip(values, (first for first, _ in each), strict=True)))
    first_moments = len(expected) - len(start)
    compared = list(zip(expected, state(other), strict=True))
    # Adam's first update is the sign of the gradient, whatever its size: its moments are compared, not the weights.
    compared = compared[len(start) :] if first_moments else compared
    data = batch(seed=9)
    return {
        "state": max(float(np.abs(a - b).max()) for a, b in compared),
        # Relative, where a figure is above 1: decibels are.
        "logs": max(abs(a[k] - b[k]) / max(1.0, abs(a[k])) for a, b in zip(logs, found_logs, strict=True) for k in a),
        "moved": min(float(np.abs(a - b).max()) for a, b in moved(model, start)),
        "filled": float(np.abs(model.fill(**plural(data)) - other.fill(**plural(data))).max()),
        "steps": int(np.max(other.discriminator_optimizer.iterations.numpy())) if other.adversarial else steps,
    }


def plural(data: dict) -> dict:
    return {f"{key}s": value for key, value in data.items()}


def moved(model: Inpainting, start: list[np.ndarray]):
    """Before and after, of the first kernel of each network and the last."""
    names = ("conv2/kernel", "reconstruction/kernel", "conv1/kernel", "logit/kernel")
    pairs = zip(model.weights, start, strict=True)
    return [(before, keras.ops.convert_to_numpy(v)) for v, before in pairs if v.path in names]


def fit_and_evaluate() -> dict[str, float]:
    """Keras' own loop under the strategy, the default discriminator's optimizer, and figures under it."""
    strategy = two_cpus()
    data = batch(12)
    data["hole"] = Holes()(0, tf.range(12, dtype=tf.int64), 32).numpy()
    dataset = tf.data.Dataset.from_tensor_slices(data)
    with strategy.scope():
        model = make("synchronized", adversarial=0.1)
        model.compile(keras.optimizers.SGD(0.1))
    history = model.fit(dataset.batch(4), epochs=3, verbose=0).history
    plain = make("synchronized", adversarial=0.1)
    plain.set_weights(model.get_weights())
    expected, found = (evaluate_filling(each, dataset.batch(5)) for each in (plain, model))
    return {
        "learned": history["mse"][0] - history["mse"][-1],
        "iterations": int(model.discriminator_optimizer.iterations.numpy()),
        "figures": max(abs(found[name] - expected[name]) for name in expected),
    }


@pytest.fixture(scope="module")
def on_two_replicas() -> dict:
    process = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=600, env=os.environ, check=False
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_replicas_take_the_steps_of_one_device(on_two_replicas, case):
    """With every hole of a batch on one replica."""
    found = on_two_replicas[case]
    assert found["moved"] > 1e-5
    assert found["state"] < 1e-5
    assert found["logs"] < 1e-5
    assert found["filled"] < 0.1
    assert found["steps"] == CASES[case][3]


@pytest.mark.slow
def test_keras_own_loop_works_under_a_strategy(on_two_replicas):
    found = on_two_replicas["fit"]
    assert found["learned"] > 0
    assert found["iterations"] == 9
    assert found["figures"] < 1e-3


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    print(json.dumps({case: compare(case) for case in CASES} | {"fit": fit_and_evaluate()}))
