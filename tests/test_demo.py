from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image

# The demo with fewer and smaller films and a few steps, in a process of its own (it makes TensorFlow deterministic).
SCRIPT = """
import sys
from pathlib import Path
import cxr_tf.demo as demo
from cxr_tf.config import parse_experiment
from export import parity

def short(whole):
    def made(*arguments):
        experiment = whole(*arguments)
        small = ["train.steps=8", "train.warmup_steps=2", "train.validate_every=4", "model.size=64"]
        settings = experiment.model_dump(mode="json", exclude_none=True)
        return parse_experiment(settings, small, kind=type(experiment))
    return made

# After eight steps films hardly differ, so that figures of ranks hang on the last bits of the logits.
for limits in parity.TOLERANCES.values():
    limits.update(auroc=1.0, average_precision=1.0, ece=1.0, dice=1.0)
demo.STUDIES, demo.FILM_SIZE = 60, 128
demo.demo_experiment, demo.demo_pretraining = short(demo.demo_experiment), short(demo.demo_pretraining)
if __name__ == "__main__":
    demo.demo(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_demo_names_what_it_made_and_goes_on_where_it_was_stopped(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = tmp_path / "demo"
    for _ in range(2):
        done = subprocess.run([sys.executable, script, out], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "summary.json").read_text())
    assert {"films: macro AUROC", "films: Dice", "studies: macro challenge mAP"} <= set(result["figures"])
    steps = {"make films", "prepare", "pre-train", "train", "evaluate", "export", "predict"}
    assert set(result["seconds"]) == steps | {"all"}
    parts = {name: pd.read_csv(out / name / "parts.csv") for name in ("pretrained", "run")}
    tested = set(parts["run"]["patient_key"][parts["run"]["part"] == "test"])
    assert tested
    assert not tested & set(parts["pretrained"]["patient_key"][parts["pretrained"]["part"] != "test"])
    forms = result["parity"]["forms"]
    assert set(forms) == {
        "keras",
        "savedmodel",
        "onnx",
        *(f"litert-{k}" for k in ("float32", "float16", "dynamic", "int8")),
    }
    assert forms["savedmodel"]["difference"]["logits"]["max"] <= 1e-3
    page = (out / "run" / "evaluation" / "report.html").read_text()
    assert "Is it the same when it is exported?" in page and "litert-int8" in page
    for path in result["paths"].values():
        assert path in done.stdout
    with Image.open(out / "run" / "evaluation" / "figures" / "films.png") as picture:
        assert min(picture.size) > 500
    assert list((out / "predicted").glob("*.mask.png"))


def test_a_folder_of_something_else_is_left_alone(tmp_path, run_cli):
    (tmp_path / "photo.txt").write_text("mine")
    done = run_cli("demo", "--out", tmp_path)
    assert done.returncode == 1
    assert "files of something else" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["photo.txt"]
