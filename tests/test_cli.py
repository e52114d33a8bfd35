from __future__ import annotations

import subprocess
import sys

import pytest


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def _cli(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cxr_tf", *args], capture_output=True, text=True, timeout=300)


def test_help_loads_neither_tensorflow_nor_pandas():
    done = _python(
        "import sys\nfrom cxr_tf.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "print('LOADED', sorted(loaded & {'tensorflow', 'keras', 'pandas'}))"
    )
    assert "LOADED []" in done.stdout, done.stderr
    for command in ("demo", "prepare", "pretrain", "probe", "train", "evaluate", "compare", "export", "predict"):
        assert command in done.stdout


def test_onednn_is_on_before_tensorflow():
    done = _python("import os, cxr_tf; print(os.environ['TF_ENABLE_ONEDNN_OPTS'])")
    assert done.stdout.strip() == "1"


def test_public_names_exist():
    done = _python("import cxr_tf; print(all(getattr(cxr_tf, n) is not None for n in cxr_tf.__all__))")
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "none.toml"], "no such experiment"),
        (["evaluate", "none"], "no run folder"),
        (["pretrain", "none.toml"], "no such experiment"),
        (["probe", "none"], "no run folder"),
        (["export", "none"], "no run folder"),
        (["predict", "none", "film.png", "--out", "out"], "no such file"),
        (["prepare", "sim", "root", "--out", "out"], 'Did you mean "siim"?'),
        (["prepare", "siim", "none", "--out", "out"], "none"),
        (["prepare", "table", "none", "--out", "out"], "--config"),
    ],
)
def test_bad_input_is_one_message_and_no_traceback(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    done = _cli(*args)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
