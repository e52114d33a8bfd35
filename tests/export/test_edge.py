from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_tf.data.radiograph import read_radiograph
from cxr_tf.errors import CxrError
from cxr_tf.models.outputs import float32_model, load_model
from cxr_tf.predict import Predictor
from export.about import about, litert_with_about
from export.edge.__main__ import main
from export.edge.predictor import edge_predictor
from export.frozen import Frozen
from export.litert import convert

NEEDED = ("numpy", "pillow", "pydicom", "ai-edge-litert")
PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tiny_run, tmp_path_factory):
    """The tiny run as a .tflite for any number of films, and one in 8 bits for one film."""
    folder = tmp_path_factory.mktemp("edge")
    operating = tiny_run.operating()
    model = float32_model(load_model(tiny_run.folder / "model.keras"))
    said = about(operating, name="tiny", heads=model.heads)
    films = np.random.default_rng(0).uniform(0, 255, (8, operating["size"], operating["size"], 1)).astype(np.float32)
    for name, kind, batch in (("float32", "float32", None), ("int8", "int8", 1)):
        content = convert(Frozen(model, operating, batch), kind, films)
        (folder / f"{name}.tflite").write_bytes(litert_with_about(content, said))
    return folder


@pytest.fixture(scope="module")
def films(tiny_shards, tmp_path_factory):
    """A DICOM film as it came, and another as PNG."""
    folder = tmp_path_factory.mktemp("two")
    paths = sorted((tiny_shards.parent / "siim" / "train").rglob("*.dcm"))
    shutil.copy(paths[0], folder / "a.dcm")
    Image.fromarray(read_radiograph(paths[1])[:, 5:80]).save(folder / "b.png")
    return [folder / "a.dcm", folder / "b.png"]


def test_it_says_what_the_run_says(models, films, tiny_run):
    ours, edge, small = Predictor(tiny_run.folder), edge_predictor(models / "float32.tflite"), models / "int8.tflite"
    for film in films:
        pixels = read_radiograph(film)
        expected, got, coarse = ours(pixels), edge(pixels), edge_predictor(small, threads=2)(pixels)
        assert got.probabilities == pytest.approx(expected.probabilities, abs=1e-4)
        assert got.mask.shape == coarse.mask.shape == pixels.shape
        np.testing.assert_allclose(got.mask, expected.mask, atol=1e-3)
        assert coarse.probabilities.keys() == expected.probabilities.keys()
        assert sum(coarse.probabilities.values()) == pytest.approx(1, abs=1e-3)


def test_the_command_prints_a_table_and_writes_pictures(models, films, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(models / "float32.tflite"), *map(str, films), "--out", str(out), "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert all(str(film) in said.out for film in films) and "not a medical device" in said.err
    made = {f"{name}.{kind}.png" for name in "ab" for kind in ("mask", "overlay")}
    assert {file.name for file in out.iterdir()} == made | {"predictions.csv"}
    with (out / "predictions.csv").open() as file:
        assert [row["film"] for row in csv.DictReader(file)] == list(map(str, films))


def test_the_command_names_broken_films_and_goes_on(models, films, tmp_path, capsys):
    (tmp_path / "broken.dcm").write_bytes(films[0].read_bytes()[:600])
    given = [tmp_path / "broken.dcm", *films]
    assert main([str(models / "int8.tflite"), *map(str, given), "--json"]) == 1
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert [row["film"] for row in answer["films"]] == list(map(str, films))
    assert [row["film"] for row in answer["failed"]] == [str(given[0])]
    assert f"not read: {given[0]}" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["broken.dcm"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("cut.tflite", "cut off"), ("none.tflite", "cannot be read"), ("model.onnx", "is no .tflite"), ("", "no .tflite")],
)
def test_what_is_no_model_is_named(models, films, tmp_path, capsys, name, words):
    content = (models / "int8.tflite").read_bytes()
    (tmp_path / "cut.tflite").write_bytes(content[: len(content) // 2])
    assert main([str(tmp_path / name), str(films[0]), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and str(tmp_path / name) in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(CxrError, match=words):
        edge_predictor(tmp_path / name)


@pytest.mark.parametrize("threads", ["0", "60000"])
def test_threads_are_one_to_256(models, films, capsys, threads):
    with pytest.raises(SystemExit):
        main([str(models / "int8.tflite"), str(films[0]), "--threads", threads])
    assert f"--threads is 1 to 256. Received: {threads}" in capsys.readouterr().err


def test_json_has_the_error_too_where_nothing_can_be_read(models, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no film")
    assert main([str(models / "int8.tflite"), str(tmp_path / "text.png"), "--json"]) == 1
    said = capsys.readouterr()
    assert "text.png" in json.loads(said.out)["error"] and said.err.startswith("error: ")


def test_it_loads_nothing_but_the_four(models, films, tmp_path):
    """In this environment, which has all: what is loaded is what a bare one must have."""
    script = (
        "import sys; from export.edge.__main__ import main\n"
        f"main([{str(models / 'int8.tflite')!r}, {str(films[0])!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    loaded = done.stdout[done.stdout.index("['") :]
    assert "'ai_edge_litert'" in loaded and "'pydicom'" in loaded
    unwanted = "tensorflow keras pandas pydantic scipy matplotlib sklearn typer rich onnx onnxruntime skimage highdicom"
    assert [package for package in unwanted.split() if f"'{package}'" in loaded] == []


@pytest.mark.slow
def test_a_bare_environment_predicts_what_the_run_says(models, films, tiny_run, tmp_path):
    """The wheel without what it asks for, and the four packages: nothing else is there."""
    source, home = tmp_path / "source", tmp_path / "venv"
    for name in ("cxr_tf", "export"):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*command, code=0):
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment
        )
        assert done.returncode == code, done.stdout[-1000:] + done.stderr[-2000:]
        return done

    wheel = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", source)
    run(sys.executable, "-m", "pip", *wheel)
    (built,) = (tmp_path / "dist").glob("*.whl")
    venv.create(home, with_pip=True)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", built)
    run(python, "-m", "pip", "install", "--quiet", *NEEDED)
    for package in ("tensorflow", "keras", "pandas", "pydantic", "scipy", "matplotlib"):
        run(python, "-c", f"import {package}", code=1)

    done = run(python, "-m", "export.edge", models / "float32.tflite", *films, "--out", tmp_path / "out", "--json")
    rows = json.loads(done.stdout)["films"]
    ours = Predictor(tiny_run.folder)
    for film, row in zip(films, rows, strict=True):
        pixels = read_radiograph(film)
        said = ours(pixels)
        assert {name: row[name] for name in said.probabilities} == pytest.approx(said.probabilities, abs=1e-4)
        found = said.mask >= ours.operating["mask_threshold"]
        with Image.open(tmp_path / "out" / f"{film.stem}.mask.png") as mask:
            drawn = np.asarray(mask) == 255
        assert drawn.shape == pixels.shape and (drawn != found).mean() < 0.001
        with Image.open(tmp_path / "out" / f"{film.stem}.overlay.png") as picture:
            assert picture.size == pixels.shape[::-1]
