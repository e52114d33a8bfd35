"""The training step: unknown items, loss scaling, learned weights, and two replicas against one device.

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
from cxr_tf.models.layers import Standardize
from cxr_tf.models.normalization import normalization_layer
from cxr_tf.train import losses
from cxr_tf.train.distillation import Distillation

NAN = float("nan")


def make(normalization: str = "group", **settings) -> cxr_tf.MultiTask:
    """One convolution a level: what takes time in these tests is tracing."""
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 1), name="image")
    x, levels = Standardize(128.0, 64.0, multiple=32, name="standardize")(image), {}
    for stride in (2, 4, 8, 16, 32):
        x = keras.layers.Conv2D(8, 3, 2, padding="same", name=f"conv{stride}")(x)
        x = keras.layers.ReLU(name=f"relu{stride}")(normalization_layer(normalization, 8, name=f"norm{stride}")(x))
        levels[f"stride_{stride}"] = x
    settings = {"hidden": 16, "decoder_channels": (8, 8, 4, 4, 4), "normalization": normalization} | settings
    return cxr_tf.multitask(keras.Model(image, levels, name="tiny"), (32, 32, 1), 3, **settings)


def batch(items: int = 8, seed: int = 0):
    """Every known mask in the first half, most known labels in the second."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 255, (items, 32, 32, 1)).astype("float32")
    labels = np.eye(3, dtype="float32")[rng.integers(3, size=items)]
    masks = rng.integers(0, 2, (items, 32, 32, 1)).astype("float32")
    labels[: items // 2 - 1] = NAN
    masks[items // 2 :] = NAN
    return images, {"logits": labels, "mask_logits": masks}


def constants(data):
    return tf.nest.map_structure(tf.constant, data)


def some(optimizer: str) -> keras.optimizers.Optimizer:
    return {
        # With batch-norm and a tenfold rate, rounding alone (the rows in another order) grows to 1e-3 in five steps.
        "sgd": lambda: keras.optimizers.SGD(0.01),
        "clipped and averaged": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.05, use_ema=True),
    }[optimizer]()


# One device


def test_a_step_is_the_update_by_the_means_over_known_items():
    model = make(dropout=0.0)
    model.compile(keras.optimizers.SGD(0.1), head_weights=(0.7, 0.3), class_weights=[1.0, 2.0, 3.0])
    images, targets = batch()
    with tf.GradientTape() as tape:
        outputs = model(images, training=True)
        loss, known = losses.softmax_cross_entropy(targets["logits"], outputs["logits"], class_weights=[1, 2, 3])
        other, mask_known = losses.dice_cross_entropy(targets["mask_logits"], outputs["mask_logits"])
        assert (int(sum(known)), int(sum(mask_known))) == (5, 4)
        total = 0.7 * tf.reduce_sum(loss) / 5 + 0.3 * tf.reduce_sum(other) / 4
    gradients = tape.gradient(total, model.trainable_variables)
    expected = [v - 0.1 * g for v, g in zip(model.trainable_variables, gradients, strict=True)]
    logs = model.train_step(constants((images, targets)))
    for found, value in zip(model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(logs["loss"], total, rtol=1e-6)
    np.testing.assert_allclose(logs["classification_loss"], tf.reduce_sum(loss) / 5, rtol=1e-6)
    np.testing.assert_allclose(logs["segmentation_loss"], tf.reduce_sum(other) / 4, rtol=1e-6)


@pytest.mark.parametrize("head_weights", [(0.6, 0.4), "uncertainty"])
def test_nothing_known_is_a_loss_of_zero_and_no_update(head_weights):
    model = make()
    model.compile(keras.optimizers.SGD(0.1), head_weights=head_weights)
    images, targets = batch()
    before = [np.array(v) for v in model.trainable_variables]
    logs = model.train_step(constants((images, {k: np.full_like(v, NAN) for k, v in targets.items()})))
    assert {float(v) for v in logs.values()} == {0.0}
    for a, b in zip(before, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_multilabel_counts_every_known_label():
    model = make(segmentation=False, dropout=0.0)
    model.compile(keras.optimizers.SGD(0.1), task="multilabel")
    images, labels = batch()[0], np.random.default_rng(0).choice([0.0, 1.0, NAN], (8, 3)).astype("float32")
    logits = model(images)["logits"].numpy()
    known = ~np.isnan(labels)
    by_hand = np.log1p(np.exp(logits)) - np.where(known, labels, 0) * logits
    logs = model.test_step(constants((images, {"logits": labels})))
    np.testing.assert_allclose(logs["classification_loss"], by_hand[known].mean(), rtol=1e-5)


def test_uncertainty_weights_are_learned_and_follow_the_formula():
    model = make(dropout=0.0)
    model.compile(keras.optimizers.SGD(0.1), head_weights="uncertainty")
    s = np.array([0.5, -0.25], "float32")
    model.uncertainty.log_variance.assign(s)
    logs = model.train_step(constants(batch()))
    each = np.array([logs["classification_loss"], logs["segmentation_loss"]])
    np.testing.assert_allclose(logs["loss"], np.sum(np.exp(-s) * each + s / 2), rtol=1e-6)
    np.testing.assert_allclose(model.uncertainty.log_variance, s - 0.1 * (0.5 - np.exp(-s) * each), rtol=1e-5)
    model.compile(keras.optimizers.SGD(0.1))
    assert not any("log_variance" in v.path for v in model.trainable_variables)


@pytest.fixture
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"], indirect=True)
def test_mixed_precision_takes_almost_the_step_of_float32(policy):
    model = make("batch", dropout=0.0)
    assert model.get_layer("conv2").compute_dtype == policy.removeprefix("mixed_")
    assert {v.dtype for v in model.output.values()} == {"float32"}
    keras.config.set_dtype_policy("float32")
    exact = make("batch", dropout=0.0)
    steps = []
    for each in (exact, model):
        each.compile(keras.optimizers.SGD(0.1))
        before = np.array(each.get_layer("logits").kernel)
        logs = each.train_step(constants(batch()))
        steps.append((float(logs["loss"]), np.array(each.get_layer("logits").kernel) - before))
    assert steps[1][0] == pytest.approx(steps[0][0], rel=0.02)
    np.testing.assert_allclose(steps[1][1], steps[0][1], atol=0.1 * np.abs(steps[0][1]).max())


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_an_overflow_in_float16_skips_the_update_and_halves_the_scale(policy, tmp_path):
    model = make(dropout=0.0)
    model.compile(keras.optimizers.SGD(0.1))
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.dynamic_scale.assign(2.0**40)
    before = [np.array(v) for v in model.trainable_variables]
    logs = model.train_step(constants(batch()))
    assert np.isfinite(logs["loss"]), "what is logged is not scaled"
    for a, b in zip(before, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(model.optimizer.dynamic_scale) == 2.0**39
    assert int(model.optimizer.iterations) == 0

    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert float(loaded.optimizer.dynamic_scale) == 2.0**39


# Two replicas


@functools.cache  # a second strategy would number its collectives as the first did
def two_cpus() -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def one_device(normalization: str, optimizer: str, settings: dict) -> tuple[list, list]:
    model = make(normalization)
    model.compile(some(optimizer), **with_teacher(settings))
    step = tf.function(model.train_step)
    logs = [step(constants(batch(seed=i))) for i in range(5)]
    return [{k: float(v) for k, v in log.items()} for log in logs], state(model)


def two_replicas(normalization: str, optimizer: str, settings: dict) -> tuple[list, list]:
    strategy = two_cpus()
    with strategy.scope():
        model = make(normalization)
        model.compile(some(optimizer), **with_teacher(settings))
        model.optimizer.build(model.trainable_variables)
    step = tf.function(lambda data: strategy.run(model.train_step, args=(data,)))
    logs = [step(halves(strategy, batch(seed=i))) for i in range(5)]
    for log in logs:
        for value in log.values():
            first, second = strategy.experimental_local_results(value)
            assert float(first) == float(second)
    return [{k: float(strategy.experimental_local_results(v)[0]) for k, v in log.items()} for log in logs], state(model)


def with_teacher(settings: dict) -> dict:
    """Settings of `compile` in which `teacher=True` has become one; call it in the strategy's scope."""
    settings = dict(settings)
    if settings.pop("teacher", False):
        teacher = make("group")
        for variable in teacher.trainable_variables:
            variable.assign(1.5 * variable)
        settings["distillation"] = Distillation(teacher)
    return settings


def halves(strategy: tf.distribute.Strategy, data):
    half = len(data[0]) // 2

    def part(context):
        first = context.replica_id_in_sync_group * half
        return tf.nest.map_structure(lambda x: tf.constant(x[first : first + half]), data)

    return strategy.experimental_distribute_values_from_function(part)


def state(model: cxr_tf.MultiTask) -> list[np.ndarray]:
    """Running averages of the weights where the optimizer keeps some, and the weights."""
    averages = model.optimizer._model_variables_moving_average if model.compiled and model.optimizer.use_ema else []
    return [keras.ops.convert_to_numpy(v) for v in (*averages, *model.weights)]


CASES: dict[str, tuple[str, str, dict]] = {
    "synchronized batch-norm": ("synchronized", "sgd", {"head_weights": (0.6, 0.4)}),
    "group norm": ("group", "sgd", {"head_weights": (0.6, 0.4)}),
    "clipping, running averages, learned weights": (
        "group",
        "clipped and averaged",
        {"head_weights": "uncertainty"},
    ),
    "many labels, focal, smoothed, weighted": (
        "group",
        "sgd",
        {"task": "multilabel", "focal_gamma": 2.0, "label_smoothing": 0.1, "class_weights": [1.0, 2.0, 3.0]},
    ),
    "a teacher": ("group", "sgd", {"teacher": True}),
    "one label, focal, smoothed, weighted": (
        "group",
        "sgd",
        {"focal_gamma": 2.0, "label_smoothing": 0.1, "class_weights": [1.0, 2.0, 3.0]},
    ),
}


def compare(case: str) -> dict[str, float]:
    (logs, expected), (found_logs, found) = one_device(*CASES[case]), two_replicas(*CASES[case])
    return {
        "weights": max(float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True)),
        "logs": max(abs(a[k] - b[k]) for a, b in zip(logs, found_logs, strict=True) for k in a),
        "moved": float(np.abs(expected[-1] - state(make(CASES[case][0]))[-1]).max()),
    }


def overflow_on_one_replica() -> dict[str, list | bool]:
    """An infinite pixel in the second half: its gradients are not finite on the second replica alone."""
    keras.config.set_dtype_policy("mixed_float16")
    strategy = two_cpus()
    with strategy.scope():
        model = make()
        model.compile(keras.optimizers.SGD(0.1))
        model.optimizer.build(model.trainable_variables)
    keras.config.set_dtype_policy("float32")
    images, targets = batch()
    images[-1] = np.inf
    before = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    scales = [float(model.optimizer.dynamic_scale.numpy())]
    step = tf.function(lambda data: strategy.run(model.train_step, args=(data,)))
    unchanged = []
    for data in ((images, targets), batch()):
        step(halves(strategy, data))
        scales.append(float(model.optimizer.dynamic_scale.numpy()))
        after = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
        unchanged.append(all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)))
    return {"unchanged": unchanged, "scales": scales, "finite": all(np.isfinite(v).all() for v in after)}


def fit_and_evaluate() -> dict[str, float]:
    """Keras' own loop under the strategy; the last batch has one film fewer than the replicas' share."""
    strategy = two_cpus()
    images, targets = batch(11)
    dataset = tf.data.Dataset.from_tensor_slices((images, targets))
    with strategy.scope():
        model = make("synchronized")
        model.compile(keras.optimizers.SGD(0.1))
    history = model.fit(dataset.batch(8, drop_remainder=True), epochs=2, verbose=0).history
    found = model.evaluate(dataset.batch(4), return_dict=True, verbose=0)
    plain = make("synchronized")
    plain.compile(keras.optimizers.SGD(0.1))
    plain.set_weights(model.get_weights())
    expected = plain.evaluate(dataset.batch(11), return_dict=True, verbose=0)
    predicted = model.predict(dataset.batch(4), verbose=0)["logits"]
    return {
        "learned": history["loss"][0] - history["loss"][1],
        "classification": abs(found["classification_loss"] - expected["classification_loss"]),
        "segmentation": abs(found["segmentation_loss"] - expected["segmentation_loss"]),
        "predictions": float(np.abs(predicted - plain.predict(images, verbose=0)["logits"]).max()),
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
    """Five steps, dropout included, with every known mask of a batch on one replica."""
    found = on_two_replicas[case]
    assert found["moved"] > 1e-4
    assert found["weights"] < 1e-5
    assert found["logs"] < 1e-5


@pytest.mark.slow
def test_an_overflow_on_one_replica_skips_the_update_on_both(on_two_replicas):
    found = on_two_replicas["overflow"]
    assert found["unchanged"] == [True, False]
    assert found["scales"] == [2.0**15, 2.0**14, 2.0**14]
    assert found["finite"]


@pytest.mark.slow
def test_keras_own_loop_works_under_a_strategy(on_two_replicas):
    found = on_two_replicas["fit"]
    assert found["learned"] > 0
    assert max(found["classification"], found["segmentation"], found["predictions"]) < 1e-5


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    results = {case: compare(case) for case in CASES}
    print(json.dumps(results | {"overflow": overflow_on_one_replica(), "fit": fit_and_evaluate()}))
