"""What every test shares: a quiet TensorFlow and, where it is there, the real data set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest


@pytest.fixture(scope="session")
def cxr_data() -> Path:
    """The real radiographs (docs/data.md says how to rebuild them); a test that needs them skips without."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "cxr"
    root = Path(os.environ.get("CXR_DATA", beside))
    if not (root / "metadata.csv").is_file():
        pytest.skip("the real radiographs are not here: set CXR_DATA to their folder")
    return root


def cli(*args: object, cwd: Path | None = None, timeout: float = 540) -> subprocess.CompletedProcess[str]:
    """Runs `cxr-tf` in a process of its own, as a user does."""
    command = [sys.executable, "-m", "cxr_tf", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd)


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    return cli


EXPERIMENT = """
name = "tiny"
seed = 3

[data]
shards = "{shards}"

[data.split]
folds = 3

[model]
encoder = "small_resnet"
size = 64
hidden = 16
decoder_channels = [16, 16, 8, 8, 8]

[train]
steps = 12
batch_size = 8
learning_rate = 1e-3
ema = 0.9
checkpoint_every = 4
validate_every = 6
log_every = 2

[evaluate]
challenge = "siim"
replicates = 100
"""


@pytest.fixture(scope="session")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with generated films (`siim`), their shards, `experiment.toml` and a trained and evaluated `run`."""
    from cxr_tf.data.phantom import write_siim

    root = tmp_path_factory.mktemp("journey")
    write_siim(root / "siim", studies=60, size=128, seed=5)
    (root / "experiment.toml").write_text(EXPERIMENT.format(shards=root / "shards"), encoding="utf-8")
    for command in (
        ("prepare", "siim", root / "siim", "--out", root / "shards", "--storage-size", "96", "--workers", "1"),
        ("train", root / "experiment.toml", "--out", root / "run"),
        ("evaluate", root / "run"),
    ):
        done = cli(*command)
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
    return root
