from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

keras = pytest.importorskip("keras")
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from cxr_tf.files import WriteError  # noqa: E402
from cxr_tf.train.loop import (  # noqa: E402
    CheckpointError,
    Every,
    MetricsLog,
    NotFiniteError,
    averaged_weights,
    fit,
    read_metrics,
)
from cxr_tf.train.schedule import optimizer, warmup_cosine  # noqa: E402

BATCH = 4

# A run in a process of its own, OPTIMIZER FOLDER STEPS PAUSE: trains with dropout, and prints a hash of all its state.
SCRIPT = """
import hashlib, pathlib, sys, time
import keras, numpy as np, tensorflow as tf
from cxr_tf.train.loop import Every, fit
from cxr_tf.train.schedule import optimizer
name, folder, steps, pause = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
keras.utils.set_random_seed(1)
tf.config.experimental.enable_op_determinism()
class Net(keras.Sequential):
    def train_step(self, data):
        super().train_step(data)
        return {"loss": tf.reduce_mean((self(data[0], training=False) - data[1]) ** 2)}  # Keras' own is a running mean
model = Net([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.BatchNormalization(),
             keras.layers.Dropout(0.5, seed=3), keras.layers.Dense(1)])
made = optimizer(name, 0.05, 60, warmup_steps=5, weight_decay=1e-3, clip_norm=1.0, ema=0.9)
model.compile(made, "mse")
def one(step):
    x = tf.random.stateless_normal([4, 8], tf.stack([7, step]))
    return x, tf.reduce_sum(x, 1, keepdims=True)
def batches(first, worker):
    return tf.data.Dataset.range(first, 60).map(one)
def slow(step):
    time.sleep(pause)
    return {}
fit(model, batches, steps=steps, batch_size=4, folder=folder, checkpoint_every=7, log_every=5,
    callbacks=[Every(1, slow)])
sums = hashlib.sha256()
for v in [*model.variables, *model.optimizer.variables]:
    sums.update(np.asarray(v).tobytes())
print("HASH", sums.hexdigest())
"""


def _start(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _hash(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert "HASH" in out, err[-2000:]
    return out.split("HASH ")[1].strip()


def _wait_for_step(folder, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        rows = read_metrics(folder / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1][-2000:]}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_killed_and_started_again_ends_in_the_same_weights(tmp_path, name):
    undisturbed = _start(name, tmp_path / "whole", 60, 0)
    expected = _hash(undisturbed)
    process = _start(name, tmp_path / "killed", 60, 0.05)
    _wait_for_step(tmp_path / "killed", 25, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert _hash(_start(name, tmp_path / "killed", 60, 0)) == expected
    whole, killed = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("whole", "killed"))
    assert [(r["step"], r["loss"]) for r in whole] == [(r["step"], r["loss"]) for r in killed]


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    process = _start("adamw", tmp_path, 60, 0.1)
    _wait_for_step(tmp_path, 5, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "PreemptedError" in err
    assert "goes on from it" in err
    assert _hash(_start("adamw", tmp_path, 60, 0))


def _model(loss: str = "mse", **settings: object) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(1)])
    model.compile(optimizer("adamw", 0.01, 100, **settings), loss)
    return model


def _batches(first: int, worker: tuple[int, int], bad_from: int = 10**9) -> tf.data.Dataset:
    def one(step):
        x = tf.random.stateless_normal([BATCH, 2], tf.stack([1, step]))
        return x, tf.where(step >= bad_from, tf.fill([BATCH, 1], np.nan), tf.reduce_sum(x, 1, keepdims=True))

    return tf.data.Dataset.range(first, 1000).map(one)


def test_figures_and_callbacks_come_at_their_intervals(tmp_path):
    seen = []
    fit(
        _model(),
        _batches,
        steps=11,
        batch_size=BATCH,
        folder=tmp_path,
        log_every=4,
        callbacks=[Every(5, lambda step: seen.append(step) or {"probe": step * 1.0})],
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == [4, 8, 11]
    assert [r["probe"] for r in rows if "probe" in r] == [5.0, 10.0, 11.0]
    assert seen == [5, 10, 11]


def test_a_finished_run_is_not_trained_again(tmp_path):
    model = _model()
    fit(model, _batches, steps=5, batch_size=BATCH, folder=tmp_path)
    again = _model()
    fit(again, _batches, steps=5, batch_size=BATCH, folder=tmp_path)
    for before, after in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


class TwoOptimizers(keras.Sequential):
    """Its second optimizer, an attribute, trains the last layer."""

    def train_step(self, data):
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean((self(data[0]) - data[1]) ** 2)
        first, last = self.layers[0].trainable_variables, self.layers[-1].trainable_variables
        self.optimizer.apply([*tape.gradient(loss, first), *map(tf.zeros_like, last)], [*first, *last])
        self.other_optimizer.apply(tape.gradient(loss, last), last)
        return {"loss": loss}


def test_an_optimizer_that_is_an_attribute_of_the_model_is_resumed(tmp_path):
    def train(folder, *stops):
        for steps in stops:
            keras.utils.set_random_seed(0)
            model = TwoOptimizers([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(1)])
            model.compile(keras.optimizers.SGD(0.1))
            model.other_optimizer = keras.optimizers.Adam(0.1)
            model.other_optimizer.build(model.layers[-1].trainable_variables)
            fit(model, _batches, steps=steps, batch_size=BATCH, folder=tmp_path / folder)
        return [np.array(v) for v in (*model.weights, *model.other_optimizer.variables)]

    for whole, resumed in zip(train("whole", 8), train("resumed", 4, 8), strict=True):
        np.testing.assert_array_equal(whole, resumed)


def test_a_check_sees_each_logged_line_and_may_end_the_run(tmp_path):
    seen = {}

    def check(step, figures):
        seen[step] = figures
        if step == 6:
            raise RuntimeError("collapse")

    with pytest.raises(RuntimeError, match="collapse"):
        fit(_model(), _batches, steps=20, batch_size=BATCH, folder=tmp_path, log_every=2, check=check)
    assert [{"step": step} | figures for step, figures in seen.items()] == read_metrics(tmp_path / "metrics.jsonl")
    assert list(seen) == [2, 4, 6]


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(NotFiniteError, match=r"step 8 .*nan.*ckpt-6"):
        fit(
            _model(),
            lambda first, worker: _batches(first, worker, bad_from=7),
            steps=50,
            batch_size=BATCH,
            folder=tmp_path,
            checkpoint_every=3,
        )
    restored = _model()
    fit(restored, _batches, steps=6, batch_size=BATCH, folder=tmp_path)
    assert all(np.isfinite(w).all() for w in restored.get_weights())


def test_checkpoint_of_another_model_is_an_error(tmp_path):
    fit(_model(), _batches, steps=3, batch_size=BATCH, folder=tmp_path)
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4), keras.layers.Dense(1), keras.layers.Dense(1)])
    other.compile("adam", "mse")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        fit(other, _batches, steps=6, batch_size=BATCH, folder=tmp_path)


def test_too_little_room_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and type("U", (), {"free": 10})())
    with pytest.raises(WriteError, match="are free"):
        fit(_model(), _batches, steps=3, batch_size=BATCH, folder=tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_disk_that_fills_later_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    real = tf.train.CheckpointManager.save

    def save(self, checkpoint_number):
        if checkpoint_number > 3:
            raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")
        return real(self, checkpoint_number=checkpoint_number)

    monkeypatch.setattr(tf.train.CheckpointManager, "save", save)
    with pytest.raises(CheckpointError, match=r"step 6 .*No space left.*ckpt-3"):
        fit(_model(), _batches, steps=9, batch_size=BATCH, folder=tmp_path, checkpoint_every=3)
    monkeypatch.undo()
    fit(_model(), _batches, steps=9, batch_size=BATCH, folder=tmp_path, checkpoint_every=3)
    assert tf.train.latest_checkpoint(str(tmp_path / "checkpoints")).endswith("ckpt-9")


def test_averaged_weights_are_the_running_average_and_go_away_again(tmp_path):
    model = _model(ema=0.5)
    history = [model.layers[0].get_weights()[0]]
    fit(
        model,
        _batches,
        steps=3,
        batch_size=BATCH,
        folder=tmp_path,
        callbacks=[Every(1, lambda _: history.append(model.layers[0].get_weights()[0]) or {})],
    )
    average = history[1]  # Keras starts the average from the first step's weights
    for weights in history[2:]:
        average = 0.5 * average + 0.5 * weights
    now = model.layers[0].get_weights()[0]
    with averaged_weights(model):
        np.testing.assert_allclose(model.layers[0].get_weights()[0], average, atol=1e-6)
    np.testing.assert_array_equal(model.layers[0].get_weights()[0], now)


def test_metrics_after_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": 0.1}) + "\n" for s in (5, 10, 15)) + '{"step": 20, "lo')
    MetricsLog(path, 10).write(11, {"loss": 0.2})
    assert [row["step"] for row in read_metrics(path)] == [5, 10, 11]


def test_warmup_and_cosine():
    schedule = warmup_cosine(0.1, steps=110, warmup_steps=10)
    assert float(schedule(0)) == pytest.approx(0.01)
    assert float(schedule(5)) == pytest.approx(0.055)
    assert float(schedule(10)) == pytest.approx(0.1)
    assert float(schedule(60)) == pytest.approx(0.05)
    assert float(schedule(110)) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_weight_decay_spares_bias_and_normalization(name):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
    made = optimizer(name, 0.5, 10**6, weight_decay=0.1)
    made.build(model.trainable_variables)
    before = [np.array(v) + 1.0 for v in model.trainable_variables]
    for variable, value in zip(model.trainable_variables, before, strict=True):
        variable.assign(value)
    made.apply([tf.zeros(v.shape) for v in model.trainable_variables])
    moved = {
        v.path.split("/")[-1]: not np.allclose(np.array(v), b)
        for v, b in zip(model.trainable_variables, before, strict=True)
    }
    assert moved == {"kernel": True, "bias": False, "gamma": False, "beta": False}


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="Received: 'adan'"):
        optimizer("adan", 0.1, 10)


# `DEVICES FOLDER STEPS`: a multi-task model on one device, or on two logical CPUs under MirroredStrategy.
MIRRORED = """
import pathlib, sys
import keras, numpy as np, tensorflow as tf
devices, folder, steps = int(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import cxr_tf
from cxr_tf.train import distribute
from cxr_tf.train.loop import fit
keras.utils.set_random_seed(1)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) if devices == 2 else tf.distribute.get_strategy()
def one(step):
    x = 255 * tf.random.stateless_uniform([4, 32, 32, 1], tf.stack([7, step]))
    y = tf.one_hot(tf.random.stateless_uniform([4], tf.stack([8, step]), maxval=2, dtype=tf.int32), 2)
    mask = tf.where(tf.reshape(tf.range(4) < 2, [4, 1, 1, 1]), tf.cast(x > 128, tf.float32), float("nan"))
    return x, {"logits": y, "mask_logits": mask}  # all known masks are on the first replica
with strategy.scope():
    model = cxr_tf.multitask("small_resnet", (32, 32, 1), 2, hidden=8, dropout=0.5, decoder_channels=(8, 8, 8, 8, 8),
                             normalization="group")
    model.compile(keras.optimizers.SGD(0.05))
def batches(first, worker):
    return tf.data.Dataset.range(first, steps).map(one)
if devices == 2:
    try:
        fit(model, batches, steps=steps, batch_size=3, folder=folder)
    except distribute.DistributionError as error:
        assert "multiple of their number, 2. Received: 3; 2 would do" in str(error)
    assert steps == 6 or not folder.exists()
fit(model, batches, steps=steps, batch_size=4, folder=folder, checkpoint_every=2, log_every=1)
np.savez(folder / "weights.npz", *[np.array(w) for w in model.weights])
"""


@pytest.mark.slow
def test_two_replicas_end_where_one_device_does_also_after_a_restart(tmp_path):
    weights = []
    for devices, stops in ((1, [6]), (2, [3, 6])):
        folder = tmp_path / str(devices)
        for steps in stops:
            command = [sys.executable, "-c", MIRRORED, str(devices), str(folder), str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, done.stderr[-3000:]
        with np.load(folder / "weights.npz") as saved:
            weights.append([saved[name] for name in saved.files])
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    losses = [[row["loss"] for row in read_metrics(tmp_path / d / "metrics.jsonl")] for d in ("1", "2")]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
