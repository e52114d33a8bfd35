"""MoCo: the loss against closed forms, the queue, the key network, batch-norm, and two replicas against one device.

TensorFlow fixes its devices when it starts, so what needs two replicas runs in a process of its own: this file as a
script, which prints what it found as JSON.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_tf.models.layers import ModelError, Standardize
from cxr_tf.models.normalization import normalization_layer
from cxr_tf.pretrain.moco import MoCo, info_nce


def encoder(normalization: str = "group") -> keras.Model:
    """One convolution a level: what takes time in these tests is tracing."""
    image = keras.Input((32, 32, 1), name="image")
    x, levels = Standardize(128.0, 64.0, multiple=32, name="standardize")(image), {}
    for stride in (2, 4, 8, 16, 32):
        x = keras.layers.Conv2D(8, 3, 2, padding="same", name=f"conv{stride}")(x)
        x = keras.layers.ReLU(name=f"relu{stride}")(normalization_layer(normalization, 8, name=f"norm{stride}")(x))
        levels[f"stride_{stride}"] = x
    return keras.Model(image, levels, name="tiny")


def make(normalization: str = "group", optimizer: object = None, **changes) -> MoCo:
    keras.utils.set_random_seed(0)
    moco = MoCo(encoder(normalization), **({"dim": 8, "queue_size": 20, "momentum": 0.9} | changes))
    # With batch-norm and a tenfold rate, rounding alone (the rows in another order) grows beyond 1e-5 in five steps.
    moco.compile(optimizer or keras.optimizers.SGD(0.01 if normalization == "batch" else 0.1))
    moco.optimizer.build(moco.trainable_variables)
    return moco


def views(step: int = 0, items: int = 8) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    films = random.uniform(0, 255, (2, items, 32, 32, 1)).astype("float32")
    return {"query": films[0], "key": films[1]}


def constants(data):
    return tf.nest.map_structure(tf.constant, data)


def unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    x = random.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype("float32")


# The loss


@pytest.mark.parametrize("queue_size", [1, 2, 511, 4096])
def test_equal_similarities_cost_log_of_queue_and_key(queue_size):
    one = tf.fill([3, 4], 0.5)
    loss, hits = info_nce(one, one, tf.fill([queue_size, 4], 0.5), 0.2)
    np.testing.assert_allclose(loss, math.log(queue_size + 1), rtol=1e-6)
    np.testing.assert_array_equal(hits, 0.0)  # a tie is no hit


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_a_perfect_key_among_orthogonal_ones(temperature):
    queries = tf.constant([[1.0, 0.0, 0.0]])
    queue = tf.constant([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]] * 8)
    loss, hits = info_nce(queries, queries, queue, temperature)
    np.testing.assert_allclose(loss, math.log(1 + 16 * math.exp(-1 / temperature)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hits, 1.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.integers(2, 16), st.floats(0.05, 2.0), st.integers(0, 1000))
def test_loss_equals_a_loop_written_by_hand(batch, queue_size, dim, temperature, seed):
    random = np.random.default_rng(seed)
    queries, keys, queue = (unit(random, n, dim) for n in (batch, batch, queue_size))
    loss, hits = info_nce(tf.constant(queries), tf.constant(keys), tf.constant(queue), temperature)
    for i in range(batch):
        positive = math.exp(float(queries[i].astype("float64") @ keys[i]) / temperature)
        negative = [math.exp(float(queries[i].astype("float64") @ key) / temperature) for key in queue]
        assert float(loss[i]) == pytest.approx(-math.log(positive / (positive + sum(negative))), rel=1e-4, abs=1e-4)
        assert float(hits[i]) == float(positive > max(negative)) or positive == pytest.approx(max(negative))


# The queue


@pytest.mark.parametrize("queue_size", [15, 16, 17, 7, 8, 9, 100])
def test_the_queue_holds_the_latest_keys_in_a_ring(queue_size):
    moco = make(queue_size=queue_size)
    ring = np.array(moco.queue)
    pointer = 0
    for step in range(3):
        data = constants(views(step))
        keys = moco.prepare(data, training=True)[1].numpy()
        moco.finish(data, (None, tf.constant(keys)), None)
        for key in keys:
            ring[pointer] = key
            pointer = (pointer + 1) % queue_size
        if queue_size >= len(keys):
            np.testing.assert_array_equal(np.array(moco.queue), ring)
            assert int(moco.pointer.numpy()) == pointer
        else:  # the batch is longer than the queue: its last keys are in it
            np.testing.assert_array_equal(
                np.unique(np.array(moco.queue), axis=0), np.unique(keys[-queue_size:], axis=0)
            )


def test_a_queue_starts_with_random_unit_vectors_of_its_seed():
    queues = [np.array(make(seed=seed).queue) for seed in (0, 0, 1)]
    np.testing.assert_allclose(np.linalg.norm(queues[0], axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(queues[0], queues[1])
    assert not np.allclose(queues[0], queues[2])


@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_a_saved_model_goes_on_where_it_was(tmp_path, normalization):
    moco = make(normalization, keras.optimizers.AdamW(1e-2), symmetric=True, momentum_steps=5)
    for step in range(2):
        moco.train_step(constants(views(step)))
    moco.save(tmp_path / "moco.keras")
    loaded = keras.saving.load_model(tmp_path / "moco.keras", safe_mode=True)
    configs = [{k: v for k, v in model.get_config().items() if k != "encoder"} for model in (moco, loaded)]
    assert configs[0] == configs[1]
    assert int(loaded.pointer.numpy()) == 12  # twice two views of eight films, in a queue of 20
    for model in (moco, loaded):
        model.logs = model.train_step(constants(views(2)))
    for name, value in moco.logs.items():
        np.testing.assert_allclose(loaded.logs[name], value, rtol=1e-5, err_msg=name)
    for a, b in zip(moco.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-6, err_msg=a.path)


# The key network


@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_key_equals_query_at_the_start_and_a_query_then_matches_its_key(normalization):
    moco = make(normalization)
    for mine, theirs in zip(moco.key.weights, moco.query.weights, strict=True):
        np.testing.assert_array_equal(np.array(mine), np.array(theirs))
    film = views()["query"]
    np.testing.assert_array_equal(moco.key(film), moco.query(film))


def test_the_key_network_moves_by_the_momentum_alone():
    moco = make("batch", keras.optimizers.SGD(1.0), momentum=0.75)
    start = [np.array(v) for v in moco.query.trainable_variables]
    moco.train_step(constants(views(0)))
    moved = [np.array(v) for v in moco.query.trainable_variables]
    for old, query, key in zip(start, moved, (mine for mine, _ in moco._pairs), strict=True):
        np.testing.assert_array_equal(np.array(key), old)  # at step 0 both were one, and the update came after
        assert not np.array_equal(old, query)
    moco.train_step(constants(views(1)))
    for old, query, key in zip(start, moved, (mine for mine, _ in moco._pairs), strict=True):
        np.testing.assert_allclose(np.array(key), 0.75 * old + 0.25 * query, rtol=1e-5, atol=1e-7)


def test_the_key_networks_moving_statistics_are_of_its_own_forward_pass():
    moco = make("batch", shuffle=False, parts=1)
    norms = [model.get_layer("norm2") for model in (moco.key, moco.query)]
    data = views()
    conv = keras.Model(moco.query.input, moco.query.get_layer("conv2").output)
    expected = [0.99 * np.zeros(8) + 0.01 * conv(data[name]).numpy().mean(axis=(0, 1, 2)) for name in ("key", "query")]
    moco.train_step(constants(data))
    for norm, mean in zip(norms, expected, strict=True):
        np.testing.assert_allclose(np.array(norm.moving_mean), mean, rtol=1e-4, atol=1e-7)
    assert not np.allclose(*expected)


def test_momentum_rises_to_one_along_a_cosine():
    moco = make(momentum=0.5, momentum_steps=4)
    for step in range(6):
        gap = [np.array(theirs) - np.array(mine) for mine, theirs in moco._pairs]
        before = [np.array(mine) for mine, _ in moco._pairs]
        moco._follow()
        rate = 0.5 * (math.cos(math.pi * min(step / 4, 1.0)) + 1) / 2
        for (mine, _), old, wide in zip(moco._pairs, before, gap, strict=True):
            np.testing.assert_allclose(np.array(mine), old + rate * wide, rtol=1e-5, atol=1e-7)
        for _, theirs in moco._pairs:
            theirs.assign(theirs + 1.0)
        moco.step.assign(step + 1)


def test_gradients_reach_encoder_and_head_and_nothing_else():
    moco = make("batch")
    assert {id(v) for v in moco.trainable_variables} == {id(v) for v in moco.query.trainable_variables}
    assert not {id(v) for v in moco.trainable_variables} & {id(v) for v in moco.key.variables}
    assert all(v.trainable is False for v in (moco.queue, moco.pointer, moco.step))


# Batch-norm


def test_both_networks_are_normalized_over_four_parts_and_keys_come_back_in_order():
    moco = make("batch", seed=3)
    data = views()
    queries, keys = moco.prepare(constants(data), training=True)
    order = tf.random.experimental.index_shuffle(tf.range(8), tf.constant([3, 0], tf.int64), 7).numpy()
    assert not np.array_equal(order, np.arange(8))
    plain = make("batch", parts=1, seed=3)  # each part by itself is what a device of its own would do
    expected = np.empty((8, 8), "float32")
    for part in np.split(order, 4):
        expected[part] = plain.key(data["key"][part], training=True)
    np.testing.assert_allclose(keys, expected, atol=1e-5)
    embedded = moco.query(queries, training=True)
    for part in np.split(np.arange(8), 4):
        np.testing.assert_allclose(embedded.numpy()[part], plain.query(data["query"][part], training=True), atol=1e-5)


def test_moving_statistics_follow_the_mean_over_the_parts():
    layer = normalization_layer("batch", 3, name="norm", momentum=0.9)
    x = np.random.default_rng(0).normal(size=(10, 4, 4, 3)).astype("float32") + np.arange(10)[:, None, None, None]
    x = x.astype("float32")
    layer.build(x.shape)
    layer.parts = 4
    out = layer(x, training=True).numpy()
    sizes = np.split(np.arange(10), np.cumsum([3, 3, 2]))
    assert [len(rows) for rows in sizes] == [3, 3, 2, 2]
    for rows in sizes:
        np.testing.assert_allclose(out[rows].mean(axis=(0, 1, 2)), 0.0, atol=1e-4)
        np.testing.assert_allclose(out[rows].std(axis=(0, 1, 2)), 1.0, atol=1e-2)
    mean = np.mean([x[rows].mean(axis=(0, 1, 2)) for rows in sizes], axis=0)
    variance = np.mean([x[rows].var(axis=(0, 1, 2)) for rows in sizes], axis=0)
    np.testing.assert_allclose(np.array(layer.moving_mean), 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(np.array(layer.moving_variance), 0.9 + 0.1 * variance, rtol=1e-4)


def test_parts_are_not_copied_with_the_encoder():
    base = encoder("batch")
    MoCo(base, dim=8, queue_size=8)
    assert base.get_layer("norm2").parts == 4
    assert keras.models.clone_model(base).get_layer("norm2").parts == 1


# One step


def test_a_step_is_the_update_by_the_mean_loss():
    moco = make(momentum=1.0)
    data = views()
    queue, keys = np.array(moco.queue), moco.key(data["key"])
    with tf.GradientTape() as tape:
        queries = moco.query(data["query"], training=True)
        loss = tf.reduce_mean(info_nce(queries, keys, tf.constant(queue), 0.2)[0])
    gradients = tape.gradient(loss, moco.query.trainable_variables)
    expected = [v - 0.1 * g for v, g in zip(moco.query.trainable_variables, gradients, strict=True)]
    logs = moco.train_step(constants(data))
    for found, value in zip(moco.query.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-6)
    assert float(logs["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(logs["relative_loss"]) == pytest.approx(float(loss) / math.log(21), rel=1e-5)
    spread = math.sqrt(8) * queries.numpy().std(axis=0).mean()
    assert float(logs["spread"]) == pytest.approx(spread, rel=1e-4)
    np.testing.assert_array_equal(np.array(moco.queue)[:8], keys)


def test_spread_is_nought_when_all_embeddings_are_one():
    moco = make()
    data = views(items=1)
    repeated = {name: np.repeat(films, 8, axis=0) for name, films in data.items()}
    assert float(moco.test_step(constants(repeated))["spread"]) == pytest.approx(0.0, abs=1e-3)


def test_symmetric_is_the_mean_of_both_directions():
    data = views()
    swapped = {"query": data["key"], "key": data["query"]}
    one = make()
    losses = [float(one.test_step(constants(each))["loss"]) for each in (data, swapped)]
    both = make(symmetric=True)
    assert float(both.test_step(constants(data))["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    both.train_step(constants(data))
    assert int(both.pointer.numpy()) == 16


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_the_two_views_of_a_film_are_never_normalized_together(parts):
    moco = make("batch", symmetric=True, parts=parts)
    assert moco.query.get_layer("norm2").parts >= parts
    data = constants(views(items=10))
    queries, _ = moco.prepare(data, training=True)
    whole = moco.query(queries, training=True).numpy()
    changed = {"query": data["query"], "key": 255.0 - data["key"]}
    other = moco.query(moco.prepare(changed, training=True)[0], training=True).numpy()
    np.testing.assert_allclose(other[:10], whole[:10], atol=1e-5)  # nothing of the other view reaches a query
    assert not np.allclose(other[10:], whole[10:], atol=1e-2)


def test_evaluating_changes_nothing():
    moco = make("batch")
    before = [np.array(v) for v in moco.weights]
    moco.test_step(constants(views()))
    for v, old in zip(moco.weights, before, strict=True):
        np.testing.assert_array_equal(np.array(v), old)


def test_version_1_has_one_layer():
    layers = [[layer.name for layer in make(head=head).query.layers][-3:] for head in ("v1", "v2")]
    assert layers == [["pooled", "projection", "embedding"], ["projection_hidden", "projection", "embedding"]]


def test_compile_and_fit_and_the_encoder_that_was_given_is_trained():
    base = encoder("batch")
    moco = MoCo(base, dim=8, queue_size=32)
    before = base.get_layer("conv2").get_weights()[0]
    moco.compile(keras.optimizers.Adam(1e-3))
    dataset = tf.data.Dataset.range(4).map(
        lambda i: {
            name: 255 * tf.random.stateless_uniform([8, 32, 32, 1], tf.stack([j, i]))
            for j, name in enumerate(("query", "key"))
        }
    )
    history = moco.fit(dataset, epochs=2, verbose=0).history
    assert set(history) == {"loss", "relative_loss", "top1", "spread"}
    assert len(history["loss"]) == 2 and all(map(math.isfinite, history["loss"]))
    assert moco.encoder is base
    assert not np.array_equal(base.get_layer("conv2").get_weights()[0], before)
    np.testing.assert_allclose(np.linalg.norm(moco.predict(views()["query"], verbose=0), axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_keeps_losses_in_float32_and_skips_overflows(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        moco = make("batch")
    finally:
        keras.config.set_dtype_policy(before)
    assert moco.query.get_layer("conv2").compute_dtype == policy.removeprefix("mixed_")
    assert moco.query.output.dtype == "float32"
    share, figures, _ = moco.pretext_loss(
        constants(views()), moco.prepare(constants(views()), training=True), training=True
    )
    assert {t.dtype for t in (share, *figures.values())} == {tf.float32}
    exact = make("batch")
    found, wanted = (float(m.train_step(constants(views(1)))["loss"]) for m in (moco, exact))
    assert found == pytest.approx(wanted, rel=0.05)
    if policy == "mixed_float16":
        moco.optimizer.dynamic_scale.assign(2.0**60)  # gradients overflow: nothing may change
        weights = [np.array(v) for v in moco.trainable_variables]
        moco.train_step(constants(views(2)))
        for v, old in zip(moco.trainable_variables, weights, strict=True):
            np.testing.assert_array_equal(np.array(v), old)
        assert float(moco.optimizer.dynamic_scale.numpy()) < 2.0**60


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"momentum": 1.5}, "momentum is at least 0"),
        ({"queue_size": 0}, "queue_size is at least 1"),
        ({"dim": 0}, "dim is at least 1"),
        ({"parts": 0}, "parts is at least 1"),
        ({"momentum_steps": 0}, "momentum_steps is at least 1"),
        ({"head": "v3"}, 'head is "v1" or "v2"'),
    ],
)
def test_settings_out_of_range(changes, words):
    with pytest.raises(ModelError, match=words):
        MoCo(encoder(), **changes)


def test_synchronized_batch_norm_is_refused():
    with pytest.raises(ModelError, match="normalized together"):
        MoCo(encoder("synchronized"))


def test_what_is_no_encoder_is_refused():
    with pytest.raises(ModelError, match=r"cxr_tf\.encoder"):
        MoCo(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))


def test_a_batch_too_small_for_its_parts_is_refused():
    with pytest.raises(ModelError, match=r"8 films or more on each device.*Received: 6"):
        make("batch").train_step(constants(views(items=6)))


def test_data_of_another_kind_are_refused():
    with pytest.raises(ModelError, match='"query" and "key"'):
        make().train_step((tf.zeros([4, 32, 32, 1]), tf.zeros([4, 1])))


# Two replicas


def _five_steps(moco: MoCo, strategy: tf.distribute.Strategy) -> dict[str, object]:
    data = [views(step) for step in range(5)]
    dataset = tf.data.Dataset.from_tensor_slices({k: np.concatenate([d[k] for d in data]) for k in data[0]}).batch(8)
    step = tf.function(lambda batch: strategy.run(moco.train_step, args=(batch,)))
    logs = [
        {name: np.array(strategy.experimental_local_results(value)).tolist() for name, value in step(batch).items()}
        for batch in strategy.experimental_distribute_dataset(dataset)
    ]

    def copies(variable: keras.Variable) -> list:
        return [np.array(v).tolist() for v in strategy.experimental_local_results(variable.value)]

    return {
        "logs": logs,
        "queue": copies(moco.queue),
        "pointer": copies(moco.pointer),
        "query": [copies(v) for v in moco.query.trainable_variables],
        "key": [copies(mine) for mine, _ in moco._pairs],
        "gradient_sums": [float(tf.reduce_sum(tf.abs(v))) for v in moco.query.trainable_variables],
    }


CASES: dict[str, dict] = {
    "group": {"normalization": "group", "shuffle": False},
    "group, symmetric, a queue that the batch does not divide": {
        "normalization": "group",
        "symmetric": True,
        "queue_size": 13,
    },
    "batch-norm by replica, shuffled": {"normalization": "batch", "parts": 2},
}


@functools.cache
def _two_replicas() -> dict[str, dict]:
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_replicas_are_one_device_with_the_joint_batch(case):
    two = _two_replicas()[case]
    one = json.loads(json.dumps(_five_steps(make(**CASES[case]), tf.distribute.get_strategy())))
    for a, b in zip(one["logs"], two["logs"], strict=True):
        for name, value in a.items():
            assert b[name][0] == b[name][1]  # the same on both replicas
            np.testing.assert_allclose(value[0], b[name][0], atol=1e-5, err_msg=name)
    assert two["queue"][0] == two["queue"][1]
    assert two["pointer"][0] == two["pointer"][1] == one["pointer"][0]
    np.testing.assert_allclose(one["queue"][0], two["queue"][0], atol=1e-5)
    for part in ("query", "key"):
        for a, b in zip(one[part], two[part], strict=True):
            assert b[0] == b[1]
            np.testing.assert_allclose(a[0], b[0], atol=1e-5)


@pytest.mark.slow
def test_adams_gradients_on_two_replicas_are_those_of_one_device():
    """Adam hides a wrong scale of the gradients, so they are compared themselves: its first moments."""
    two = _two_replicas()["adam"]
    moco = make("group", keras.optimizers.Adam(1e-3), shuffle=False)
    moco.train_step(constants(views()))
    for a, b in zip(moco.optimizer._momentums, two, strict=True):
        np.testing.assert_allclose(np.array(a), b, rtol=1e-4, atol=1e-7)
        assert np.abs(b).max() > 0


def main() -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    found: dict[str, object] = {}
    with strategy.scope():
        for case, changes in CASES.items():
            found[case] = _five_steps(make(**changes), strategy)
        moco = make("group", keras.optimizers.Adam(1e-3), shuffle=False)
        dataset = tf.data.Dataset.from_tensor_slices(views()).batch(8)
        batch = next(iter(strategy.experimental_distribute_dataset(dataset)))
        tf.function(lambda data: strategy.run(moco.train_step, args=(data,)))(batch)
        found["adam"] = [np.array(v).tolist() for v in moco.optimizer._momentums]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
