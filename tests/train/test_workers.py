"""Several workers: processes on loopback, through the command line and through `fit`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

keras = pytest.importorskip("keras")
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from cxr_tf.train import distribute  # noqa: E402
from cxr_tf.train.distribute import DistributionError  # noqa: E402
from cxr_tf.train.loop import read_metrics  # noqa: E402

# FOLDER STEPS PAUSE: `fit` with plain batch-norm and dropout; prints a hash of the weights, and whether replicas agree.
# The chief's callback makes a variable and sleeps: neither may disturb the others.
SCRIPT = """
import hashlib, pathlib, sys, time
import keras, numpy as np, tensorflow as tf
from cxr_tf import cli
from cxr_tf.train import distribute
from cxr_tf.train.loop import Every, fit

class Net(keras.Sequential):
    def train_step(self, data):
        super().train_step(data)
        loss = tf.reduce_mean((self(data[0], training=False) - data[1]) ** 2)
        return {"loss": tf.distribute.get_replica_context().all_reduce("MEAN", loss)}

@cli.app.command()
def run(folder: pathlib.Path, steps: int, pause: float) -> None:
    strategy = distribute.strategy()
    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()
    with distribute.workers_answer(strategy, folder):
        with strategy.scope():
            model = Net([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.BatchNormalization(),
                         keras.layers.Dropout(0.5, seed=3), keras.layers.Dense(1)])
            model.compile(keras.optimizers.AdamW(0.05), "mse")
        def batches(first, worker):
            i, n = worker
            def one(step):
                x = tf.random.stateless_normal([4, 8], tf.stack([7, step])) * tf.constant([[1.0], [1], [1], [5]])
                x = tf.reshape(x, [n, 4 // n, 8])[i]
                return x, tf.reduce_sum(x, 1, keepdims=True)
            return tf.data.Dataset.range(first, 1000).map(one)
        def slow(step):
            time.sleep(float(tf.Variable(pause)))
            return {"probe": 1.0}
        fit(model, batches, steps=steps, batch_size=4, folder=folder, checkpoint_every=5, log_every=2,
            callbacks=[Every(1, slow)])
    sums = hashlib.sha256()
    for v in model.variables:
        sums.update(np.asarray(v).tobytes())
    print("HASH", sums.hexdigest(), float(model.layers[1].moving_mean[0]), flush=True)

cli.main()
"""

# The command line, with a dump of the weights that training ended in on this worker: DUMP.npz ARGUMENTS...
DUMP = """
import sys
import numpy as np
from cxr_tf import cli
from cxr_tf.pretrain import recipe
from cxr_tf.train import finetune
fit, dump = finetune.fit, sys.argv.pop(1)
def fit_and_dump(model, *args, **kwargs):
    fit(model, *args, **kwargs)
    np.savez(dump, *[np.array(v) for v in model.weights])
finetune.fit = recipe.fit = fit_and_dump
cli.main()
"""


def _ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _start(*commands: list[object]) -> list[subprocess.Popen[str]]:
    """Starts a worker for each command: arguments of `python`."""
    hosts = [f"127.0.0.1:{port}" for port in _ports(len(commands))]
    started = []
    for index, command in enumerate(commands):
        config = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
        started.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"TF_CONFIG": json.dumps(config)},
            )
        )
    return started


def _finish(workers: list[subprocess.Popen[str]], timeout: float = 240) -> list[str]:
    """Waits for workers that must end well; their standard output."""
    try:
        said = [worker.communicate(timeout=timeout) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * len(workers), [err[-2000:] for _, err in said]
    return [out for out, _ in said]


def _wait_for_step(folder: Path, step: int, workers: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and all(worker.poll() is None for worker in workers):
        if any(row["step"] >= step for row in read_metrics(folder / "metrics.jsonl")):
            return
        time.sleep(0.05)
    for worker in workers:
        worker.kill()
    raise AssertionError(f"step {step} was not reached: {[worker.communicate()[1][-2000:] for worker in workers]}")


def _assert_lost(worker: subprocess.Popen[str], err: str, words: str) -> None:
    """That a worker ended with the message that another was lost."""
    assert worker.returncode == 1, err[-3000:]
    assert "Traceback" not in err
    assert words in err
    assert "Another worker stopped answering" in err
    assert "goes on from step" in err


def _fit(folder: Path, steps: int, pause: float = 0.0) -> list[subprocess.Popen[str]]:
    return _start(*[["-c", SCRIPT, "run", folder, steps, pause]] * 2)


@pytest.mark.slow
def test_a_frozen_chief_is_noticed_and_the_run_goes_on_to_the_same_weights(tmp_path):
    whole = _finish(_fit(tmp_path / "whole", 40))
    assert "HASH" in whole[0]
    assert whole[0] == whole[1]  # plain batch-norm's statistics too

    chief, other = workers = _fit(tmp_path / "frozen", 40, 0.2)
    _wait_for_step(tmp_path / "frozen", 12, workers)
    chief.send_signal(signal.SIGSTOP)
    since = time.monotonic()
    _, err = other.communicate(timeout=60)
    print(f"a frozen chief was noticed after {time.monotonic() - since:.1f} s")
    chief.kill()
    chief.communicate()
    _assert_lost(other, err, "this is worker 1 of workers 0 to 1")

    assert _finish(_fit(tmp_path / "frozen", 40)) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frozen", "whole"]


@pytest.mark.slow
def test_a_chief_that_validates_for_long_is_waited_for_and_sigterm_stops_all(tmp_path):
    workers = _fit(tmp_path, 4, 14.0)  # heartbeats are missed after ten seconds
    _wait_for_step(tmp_path, 2, workers)
    time.sleep(3)  # for both to have looked whether one was asked to end at that line; the chief validates for 14 s
    workers[1].send_signal(signal.SIGTERM)  # so that all end at step 4, the last
    assert len(set(_finish(workers))) == 1

    workers = _fit(tmp_path, 500, 0.1)
    _wait_for_step(tmp_path, 10, workers)
    workers[1].send_signal(signal.SIGTERM)
    for worker in workers:
        _, err = worker.communicate(timeout=60)
        assert worker.returncode == 1
        assert "is saved; the same command goes on from it" in err


# Both pretext tasks, with the discriminator's own optimizer and a queue that the batch does not divide.
PRETRAINING = """
name = "{method}"
method = "{method}"
[data]
shards = "{shards}"
validation = 0.2
[model]
encoder = "small_resnet"
size = 64
[moco]
queue = 13
dim = 16
momentum = 0.9
[inpainting]
adversarial = 0.1
decoder_channels = [8, 8, 8, 8, 8]
[train]
batch_size = 8
log_every = 2
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "joint", "moco"])
def test_two_workers_through_the_command_line_end_where_one_device_does(journey, tmp_path_factory, what):
    tmp_path = tmp_path_factory.mktemp("workers")
    experiment = journey / "experiment.toml"
    settings: dict[str, object] = {"model.normalization": '"group"'}
    if what != "train":
        experiment = tmp_path_factory.mktemp("experiment") / "pretraining.toml"
        experiment.write_text(PRETRAINING.format(method=what, shards=journey / "shards"), encoding="utf-8")
    if what == "moco":
        # As it is by default, keys shuffled: one device's batch in two parts is what two workers have.
        settings = {"moco.parts": 2}
    settings |= {
        "train.optimizer": '"sgd"',
        "train.learning_rate": 0.05,
        "train.steps": 6,
        "train.checkpoint_every": 3,
        "train.validate_every": 3,
    }
    command = ["train" if what == "train" else "pretrain", experiment]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]

    def dumping(name: str, *more: object) -> list[object]:
        return ["-c", DUMP, tmp_path / f"{name}.npz", *command, *more]

    alone = subprocess.run(
        [sys.executable, *map(str, dumping("alone", "--out", tmp_path / "alone"))], capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr[-2000:]
    run = tmp_path / "run"
    _finish(_start(dumping("chief", "--out", run), dumping("other", "--out", run)))
    weights = {}
    for name in ("alone", "chief", "other"):
        with np.load(tmp_path / f"{name}.npz") as saved:
            weights[name] = [saved[key] for key in saved.files]
    for one, two, three in zip(weights["alone"], weights["chief"], weights["other"], strict=True):
        np.testing.assert_array_equal(two, three)
        np.testing.assert_allclose(one, two, atol=1e-5)

    def files(folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    assert files(run) == files(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "run", "alone.npz", "chief.npz", "other.npz"}
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    assert steps == [row["step"] for row in read_metrics(tmp_path / "alone" / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "moco"])
def test_killed_on_the_command_line_and_given_again(journey, tmp_path, what):
    if what == "train":
        experiment = journey / "experiment.toml"
        settings = ['model.normalization="synchronized"', "model.segmentation=false", "train.validate_every=40"]
    else:
        experiment = tmp_path / "pretraining.toml"
        experiment.write_text(PRETRAINING.format(method=what, shards=journey / "shards"), encoding="utf-8")
        settings = ["train.log_every=1"]

    def train(folder: Path) -> list[subprocess.Popen[str]]:
        command = ["-m", "cxr_tf", "train" if what == "train" else "pretrain", experiment, "--out", folder]
        for setting in (*settings, "train.steps=80", "train.checkpoint_every=10"):
            command += ["--set", setting]
        return _start(command, command)

    chief, other = workers = train(tmp_path / "killed")
    _wait_for_step(tmp_path / "killed", 24, workers)
    other.kill()
    since = time.monotonic()
    _, err = chief.communicate(timeout=60)
    print(f"a killed worker was noticed after {time.monotonic() - since:.1f} s")
    other.communicate()
    _assert_lost(chief, err, "this is worker 0 of workers 0 to 1")
    for folder in ("killed", "whole"):
        _finish(train(tmp_path / folder))
    killed, whole = (
        tf.train.load_checkpoint(str(tmp_path / folder / "checkpoints" / "ckpt-80")) for folder in ("killed", "whole")
    )
    names = [name for name in whole.get_variable_to_shape_map() if name != "_CHECKPOINTABLE_OBJECT_GRAPH"]
    assert len(names) > 50
    for name in names:
        np.testing.assert_array_equal(killed.get_tensor(name), whole.get_tensor(name))
    kept = [
        [(row["step"], row["loss"]) for row in read_metrics(tmp_path / folder / "metrics.jsonl") if "loss" in row]
        for folder in ("killed", "whole")
    ]
    assert kept[0] == kept[1]


# Three logical CPUs: plain batch-norm before and after its statistics are averaged, and weights that do not differ.
AVERAGED = """
import json, sys
import keras, numpy as np, tensorflow as tf
from cxr_tf.train import distribute
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1", "CPU:2"])
with strategy.scope():
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(momentum=0.5),
                              keras.layers.Dense(64, trainable=False)])
def replica():
    number = tf.distribute.get_replica_context().replica_id_in_sync_group
    model(tf.fill([4, 2], 6.0 * tf.cast(number, tf.float32)), training=True)
tf.function(lambda: strategy.run(replica))()
def copies(variable):
    return [np.array(v).ravel().tolist() for v in strategy.experimental_local_results(variable.value)]
found = {}
for when in ("before", "after"):
    found[when] = {"mean": copies(model.layers[0].moving_mean), "frozen": copies(model.layers[1].kernel)}
    distribute.average_statistics(model)
print(json.dumps(found))
"""


def test_statistics_are_averaged_over_replicas():
    done = subprocess.run([sys.executable, "-c", AVERAGED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["before"]["mean"] == [[0.0, 0.0], [3.0, 3.0], [6.0, 6.0]]
    assert found["after"]["mean"] == [[3.0, 3.0]] * 3
    assert found["after"]["frozen"] == found["before"]["frozen"]


def test_on_one_device_statistics_are_left_alone():
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])
    before = model.get_weights()
    distribute.average_statistics(model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    strategy = tf.distribute.get_strategy()
    assert distribute.worker(strategy) == (0, 1)
    assert distribute.is_chief(strategy)
    assert distribute.gather(strategy, 7) == [7]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is no JSON"),
        ("[1]", "must be a JSON object"),
        ({"cluster": {"worker": "a:1"}}, "lists of addresses"),
        ({"cluster": {"worker": ["a:1"], "ps": ["b:1"]}}, "has ps in"),
        ({"cluster": {"chief": ["a:1", "b:1"]}}, 'more than one "chief"'),
        ({"cluster": {"worker": ["a:1", "b"]}}, "'b'.*host:port"),
        ({"cluster": {"worker": ["a:1", "a:1"]}}, "one address to several"),
        ({"cluster": {"worker": ["a:1", "b:1"]}}, "which worker this is"),
        ({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}, "no 'worker' number 2"),
        ({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "chief", "index": 0}}, "no 'chief' number 0"),
    ],
)
def test_a_tf_config_that_makes_no_sense_is_an_error(monkeypatch, config, words):
    monkeypatch.setenv("TF_CONFIG", config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(DistributionError, match=words) as raised:
        distribute.strategy()
    assert "It looks like" in str(raised.value)


@pytest.mark.parametrize("config", ["", "{}", '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}'])
def test_one_worker_trains_alone(monkeypatch, config):
    monkeypatch.setenv("TF_CONFIG", config)
    assert distribute.strategy() is tf.distribute.get_strategy()


def test_the_command_line_names_what_is_wrong_with_tf_config(journey, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cxr_tf", "train", str(journey / "experiment.toml"), "--out", str(tmp_path / "run")],
        env=os.environ | {"TF_CONFIG": "{"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: TF_CONFIG is no JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workers_that_cannot_train_together_say_so_and_write_nothing(journey, tmp_path):
    command = ["-m", "cxr_tf", "train", journey / "experiment.toml", "--out", tmp_path / "run", "--set"]
    for settings, words in (
        (["train.batch_size=7"] * 2, "multiple of their number, 2. Received: 7; 6 would do"),
        (["seed=1", "seed=2"], "the experiment is not the same on all workers"),
    ):
        for worker in _start(*[[*command, setting] for setting in settings]):
            _, err = worker.communicate(timeout=120)
            assert worker.returncode == 1
            assert words in err
            assert "Traceback" not in err
        assert not (tmp_path / "run").exists()


def test_slurm_tasks_in_the_order_of_their_ranks(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_NODELIST": "gpu[09-10,12],big",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x2)",
        "SLURM_PROCID": "4",
        "SLURM_JOB_ID": "4001007",
    }.items():
        monkeypatch.setenv(name, value)
    tasks, rank = distribute._workers()
    assert [address for _, address in tasks] == [
        "gpu09:20070",
        "gpu09:20071",
        "gpu10:20070",
        "gpu10:20071",
        "gpu12:20070",
        "big:20070",
    ]
    assert rank == 4
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    with pytest.raises(DistributionError, match="Start it by srun"):
        distribute.strategy()


def test_launch_files_can_be_read_by_what_takes_them():
    yaml = pytest.importorskip("yaml")
    launch = Path(__file__).parents[2] / "docs" / "launch"
    for script in ("two_hosts.sh", "slurm.sbatch"):
        done = subprocess.run(["bash", "-n", launch / script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    job = yaml.safe_load((launch / "tfjob.yaml").read_text())
    assert job["kind"] == "TFJob"
    container = job["spec"]["tfReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert container["name"] == "tensorflow"  # the operator sets TF_CONFIG in the container of this name
    assert container["command"][:2] == ["cxr-tf", "train"]
