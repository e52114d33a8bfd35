"""Pre-training through the command line: run folders, resume, what goes on from them, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from cxr_tf.config import ConfigError, Pretraining, load_experiment, parse_experiment
from cxr_tf.data.shards import open_shards
from cxr_tf.errors import CxrError
from cxr_tf.pretrain.probe import _judged
from cxr_tf.pretrain.recipe import CollapseError, PretrainingWarning, _collapse_guard, build, pretrain
from cxr_tf.run import RunError, open_run
from cxr_tf.train.loop import read_metrics
from cxr_tf.train.parts import choose_unlabeled

SETTINGS = """
name = "tiny"
seed = 3
method = "{method}"

[data]
shards = "{shards}"
validation = 0.2
holdout = {{ sex = ["F"] }}

[model]
encoder = "small_resnet"
size = 64

[moco]
dim = 16
queue = 30
momentum = 0.9

[inpainting]
skips = true
adversarial = 0.01
decoder_channels = [16, 16, 8, 8, 8]

[probe]
classes = ["Negative for Pneumonia", "Typical Appearance"]

[train]
steps = {steps}
batch_size = 8
learning_rate = 1e-3
checkpoint_every = 3
validate_every = 4
log_every = 2
ema = 0.9
"""


def write(journey: Path, folder: Path, method: str, steps: int = 8) -> Path:
    path = folder / f"{method}.toml"
    path.write_text(SETTINGS.format(method=method, shards=journey / "shards", steps=steps), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(journey, run_cli, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    for method in ("moco", "joint"):
        done = run_cli("pretrain", write(journey, folder, method), "--out", folder / method)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"model.weights={folder / method / 'encoder.keras'}" in done.stdout
    return folder


@pytest.mark.slow
def test_a_run_folder_has_what_goes_on_from_it_and_figures(runs):
    for method in ("moco", "joint"):
        folder = runs / method
        encoder = keras.saving.load_model(folder / "encoder.keras", safe_mode=True)
        assert encoder.name == "small_resnet"
        assert json.loads((folder / "pretraining.json").read_text())["method"] == method
        rows = read_metrics(folder / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8]
        assert all("images_per_second" in row for row in rows if "loss" in row)
        assert all(0 <= row["val_neighbors_auroc"] <= 1 for row in rows if row["step"] in (4, 8) and "loss" not in row)
        with Image.open(folder / "figures" / "training.png") as picture:
            assert min(picture.size) > 300
    last = read_metrics(runs / "joint" / "metrics.jsonl")[-1]
    assert {"val_psnr", "val_ssim", "val_mean_psnr", "val_classical_psnr"} <= set(last)
    with Image.open(runs / "joint" / "figures" / "filling-000008.png") as picture:
        assert min(picture.size) > 300
    assert (runs / "joint" / "reconstruction.keras").is_file()


@pytest.mark.slow
def test_nothing_of_held_out_patients_is_pretrained_on(runs, journey):
    run = open_run(runs / "moco", kind=Pretraining)
    manifest, parts = open_shards(journey / "shards").manifest, run.parts()
    held = set(manifest["patient_key"][manifest["sex"] == "F"])
    assert held
    assert set(parts["patient_key"][parts["part"] == "test"]) == held
    assert not held & set(parts["patient_key"][parts["part"] != "test"])


@pytest.mark.slow
def test_fine_tuning_goes_on_from_encoder_and_decoder(runs, journey, run_cli, tmp_path):
    weights = [f"model.weights={runs / 'joint' / 'encoder.keras'}"]
    weights.append(f"model.decoder_weights={runs / 'joint' / 'reconstruction.keras'}")
    sets = [
        word for override in (*weights, "train.steps=2", "train.learning_rate=1e-9") for word in ("--set", override)
    ]
    done = run_cli("train", journey / "experiment.toml", "--out", tmp_path / "run", *sets)
    assert done.returncode == 0, done.stderr[-3000:]
    model = keras.saving.load_model(tmp_path / "run" / "model.keras", compile=False)
    for name in ("encoder.keras", "reconstruction.keras"):
        start = keras.saving.load_model(runs / "joint" / name, compile=False)
        for layer in start.layers:
            if layer.name in {other.name for other in model.layers} and layer.trainable_weights:
                for a, b in zip(layer.trainable_weights, model.get_layer(layer.name).trainable_weights, strict=True):
                    np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-6, err_msg=a.path)


@pytest.mark.slow
def test_a_probe_compares_with_random_weights_and_thumbnails(runs, run_cli):
    done = run_cli("probe", runs / "moco", "--fractions", "0.5,1.0")
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("pre-trained", "random weights", "8 x 8 thumbnails", "minus random weights", "mean of 5 draws"):
        assert words in done.stdout
    found = json.loads((runs / "moco" / "probe" / "probe.json").read_text())
    assert [row["fraction"] for row in found["fractions"]] == [0.5, 1.0]
    assert found["films"]["test"] > 0
    with Image.open(runs / "moco" / "probe" / "probe.png") as picture:
        assert min(picture.size) > 300


def test_classes_of_few_test_patients_are_not_judged():
    patients = np.arange(20) // 2
    ten, four = np.arange(20) < 10, np.arange(20) < 8
    unknown = np.where(np.arange(20) < 12, np.nan, 1.0)
    values = np.stack([ten, ~ten, four, ~four, unknown], axis=1).astype(float)
    assert _judged(values, patients).tolist() == [True, True, False, False, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fractions", "0.5,x"], "numbers between commas"),
        (["--fractions", "2.0"], "above 0 and at most 1"),
        (["--data", "none"], "none"),
        (["--experiment", "EXPERIMENT"], "were pre-trained on"),
    ],
)
def test_a_probe_says_what_is_wrong(runs, journey, run_cli, arguments, words):
    arguments = [str(journey / "experiment.toml") if word == "EXPERIMENT" else word for word in arguments]
    done = run_cli("probe", runs / "moco", *arguments)
    assert done.returncode == 1
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_commands_of_other_runs_say_which_is_meant(runs, journey, run_cli):
    done = run_cli("evaluate", runs / "moco")
    assert done.returncode == 1
    assert "pre-training" in done.stderr
    done = run_cli("probe", journey / "run")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


# Runs as the command line does, and prints a hash of all that the next step depends on.
SCRIPT = """
import hashlib, sys
from pathlib import Path
import numpy as np
import cxr_tf.pretrain.recipe as recipe
from cxr_tf.config import Pretraining, load_experiment
built = recipe.build
def build(*arguments, **named):
    global model
    model = built(*arguments, **named)
    return model
recipe.build = build
recipe.pretrain(load_experiment(sys.argv[1], kind=Pretraining), Path(sys.argv[2]))
sums = hashlib.sha256()
fills = getattr(model, "inpainting", model)
for v in [*model.variables, *model.optimizer.variables, *fills.discriminator_optimizer.variables]:
    sums.update(np.asarray(v).tobytes())
print("HASH", sums.hexdigest())
"""


def _start(experiment: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, experiment, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
    )


def _hash(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=280)
    assert "HASH" in out, err[-2000:]
    return out.split("HASH ")[1].strip()


@pytest.mark.slow
def test_killed_at_a_random_step_and_started_again_ends_in_the_same_weights(journey, tmp_path):
    experiment = write(journey, tmp_path, "joint", steps=16)
    whole = _hash(_start(experiment, tmp_path / "whole"))
    process = _start(experiment, tmp_path / "killed")
    kill_at = int(np.random.default_rng().integers(4, 13))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        rows = read_metrics(tmp_path / "killed" / "metrics.jsonl")
        if rows and rows[-1]["step"] >= kill_at:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "pretraining.json").exists()
    assert _hash(_start(experiment, tmp_path / "killed")) == whole, f"killed at step {kill_at}"


# Without a command line


def _experiment(**settings) -> Pretraining:
    base = {"name": "a", "method": "moco", "data": {"shards": "s"}, "model": {"encoder": "small_resnet", "size": 32}}
    return parse_experiment(base | settings, kind=Pretraining)


def test_the_queue_is_bounded_by_the_films_and_a_large_share_warns():
    with pytest.warns(PretrainingWarning, match=r"a queue of 200 keys is 100% of the 200 films"):
        assert build(_experiment(), films=200).queue_size == 200
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", PretrainingWarning)
        assert build(_experiment(moco={"queue": 20}), films=200).queue_size == 20


def test_settings_reach_the_model():
    moco = {"queue": 8, "dim": 6, "temperature": 0.1, "momentum": 0.5, "momentum_schedule": "cosine", "head": "v1"}
    experiment = _experiment(moco=moco | {"symmetric": True, "parts": 2}, train={"steps": 7})
    config = build(experiment, films=100).get_config()
    wanted = {"queue_size": 8, "dim": 6, "temperature": 0.1, "momentum": 0.5, "momentum_steps": 7, "head": "v1"}
    assert {key: config[key] for key in wanted} == wanted
    assert (config["symmetric"], config["parts"]) == (True, 2)


def test_collapse_ends_a_run_after_three_intervals_behind_the_warm_up(tmp_path):
    log = tmp_path / "metrics.jsonl"
    check = _collapse_guard(10, log)
    for step, spread in ((5, 0.0), (10, 0.0), (15, 0.01), (20, 0.3), (25, 0.01), (30, 0.02)):
        check(step, {"spread": spread})
    with pytest.raises(CollapseError, match="collapse: at step 35"):
        check(35, {"spread": 0.049})
    check = _collapse_guard(0, log)
    for step in range(1, 9):
        check(step, {"loss": 1.0})  # inpainting has no embeddings
    with pytest.raises(CollapseError):
        for step in range(1, 4):
            check(step, {"moco_spread": 0.0})
    # A run that goes on at step 25 counts what it logged before.
    rows = [
        {"step": 5, "spread": 0.0},
        {"step": 15, "spread": 0.3},
        {"step": 20, "spread": 0.01},
        {"step": 20, "val": 1},
    ]
    rows += [{"step": 25, "spread": 0.01}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = _collapse_guard(10, log)
    check(25, {"spread": 0.01})
    with pytest.raises(CollapseError, match="step 30"):
        check(30, {"spread": 0.01})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.batch_size=6"], "8 films or more on each device.*Received: 6"),
        (['probe.where={view=["LATERAL"]}'], "no row has 'LATERAL'"),
        (
            ['probe.classes=["Negative for Pneumonia"]', 'probe.where={"label:Typical Appearance"=["1.0"]}'],
            "tell apart",
        ),
    ],
)
def test_what_cannot_work_is_said_before_the_folder_is_made(journey, tmp_path, changes, message):
    experiment = load_experiment(write(journey, tmp_path, "moco"), changes, Pretraining)
    with pytest.raises(CxrError, match=message):
        pretrain(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "simclr"}, ["`method`", '"moco"']),
        ({"moco": {"quue": 5}}, ["`moco.quue`", 'Did you mean "queue"?']),
        ({"moco": {"views": "strong"}}, ["`moco.views`", '"moco-v2"']),
        ({"inpainting": {"holes": "heart"}}, ["`inpainting.holes`", '"lung"']),
        ({"inpainting": {"adversarial": 1.0}}, ["`inpainting.adversarial`", "less than 1"]),
        ({"joint": {"weights": [1.0]}}, ["`joint.weights`", "2 numbers"]),
        ({"loss": {}}, ["`loss`"]),
        ({"probe": {}}, ["`probe.classes` is missing"]),
    ],
)
def test_a_bad_experiment_names_its_key(settings, words):
    with pytest.raises(ConfigError) as found:
        _experiment(**settings)
    for word in words:
        assert word in str(found.value)


def test_files_of_the_other_command_are_recognized(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('name = "a"\nmethod = "moco"\n[data]\nshards = "s"\n')
    with pytest.raises(ConfigError, match="cxr-tf pretrain"):
        load_experiment(path)
    path.write_text('name = "a"\n[data]\nshards = "s"\n[loss]\nfocal_gamma = 1.0\n')
    with pytest.raises(ConfigError, match="cxr-tf train"):
        load_experiment(path, kind=Pretraining)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RunError, match="cxr-tf pretrain"):
        open_run(tmp_path, kind=Pretraining)


def test_a_holdout_that_leaves_nothing_is_refused(journey):
    from cxr_tf.data.split import SplitError

    manifest = open_shards(journey / "shards").manifest
    data = _experiment(data={"shards": "s", "holdout": {"sex": ["F", "M"]}}).data
    with pytest.raises(SplitError, match="no film is left"):
        choose_unlabeled(manifest, data)
