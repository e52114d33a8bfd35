"""Data sets by name: options from an experiment file, parts of several machines, a look beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_tf.config import ConfigError
from cxr_tf.data.prepare import DatasetError, inspect_dataset, parse_worker, prepare_dataset, read_dataset
from cxr_tf.data.readers import DATASETS


@pytest.fixture
def chexpert(tmp_path) -> Path:
    root = tmp_path / "CheXpert-v1.0-small"
    lines = ["Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,"]
    lines[0] += "Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,"
    lines[0] += "Fracture,Support Devices"
    for i in range(6):
        name = f"patient{i:05}/study1/view1_frontal.jpg"
        path = root / "train" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((40, 48), 20 * i, np.uint8)).save(path)
        lines.append(f"CheXpert-v1.0-small/train/{name},Male,50,Frontal,AP,,,,,,-1.0,,,,,1.0,,,")
    (root / "train.csv").write_text("\n".join(lines))
    return root


def experiment(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.toml"
    path.write_text(f"name = 'x'\n[data]\nshards = 'shards'\n[dataset]\n{text}\n")
    return path


def test_options_come_from_the_experiment_file(chexpert, tmp_path):
    for text, wanted in {"": np.nan, "uncertain = 'one'": 1.0, "uncertain = { Edema = 'zero' }": 0.0}.items():
        manifest = read_dataset("chexpert", chexpert, experiment(tmp_path, text))
        np.testing.assert_array_equal(manifest["label:Edema"], [wanted] * 6)
    assert np.isnan(read_dataset("chexpert", chexpert)["label:Edema"]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uncertan = 'one'", r'`dataset.uncertan`.*Did you mean "uncertain"'),
        ("uncertain = 3", "`dataset.uncertain`"),
        ("progress = 1", "`dataset.progress`"),
        ("root = '/'", "`dataset.root`"),
    ],
)
def test_options_that_there_are_not(chexpert, tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_dataset("chexpert", chexpert, experiment(tmp_path, text))


def test_every_data_set_has_its_reader():
    for dataset in DATASETS:
        with pytest.raises(Exception, match=r"nowhere|--config") as raised:
            read_dataset(dataset, Path("/nowhere"))
        assert "Error" in type(raised.value).__name__ and not isinstance(raised.value, ImportError | AttributeError)
    with pytest.raises(DatasetError, match='Did you mean "nih"'):
        read_dataset("nhi", Path("/nowhere"))


def test_machines_make_parts_and_one_merges_them(chexpert, tmp_path):
    out = tmp_path / "shards"
    with pytest.raises(DatasetError, match="give it without --worker"):
        prepare_dataset("chexpert", chexpert, out, worker=(0, 2), merge=True)
    for i in range(2):
        assert prepare_dataset("chexpert", chexpert, out, workers=1, worker=(i, 2)) is None
    merged = prepare_dataset("chexpert", chexpert, out, merge=True)
    assert merged is not None and len(merged) == 6


def test_machines_make_parts_on_the_command_line(chexpert, tmp_path, run_cli):
    one, many = tmp_path / "one", tmp_path / "many"
    options = ("prepare", "chexpert", chexpert, "--out")
    assert run_cli(*options, one).returncode == 0
    early = run_cli(*options, many, "--merge")
    assert early.returncode != 0 and "Traceback" not in early.stderr
    for i in range(2):
        said = run_cli(*options, many, "--worker", f"{i}/2")
        assert said.returncode == 0 and "--merge" in said.stdout, said.stderr
    assert run_cli(*options, many, "--merge").returncode == 0
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in many.iterdir()}


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/4", "1/0", "1/2/3", ""])
def test_workers_that_are_none(text):
    assert parse_worker(None) is None and parse_worker("3/4") == (3, 4)
    with pytest.raises(DatasetError, match=r"0/4 is the first of four"):
        parse_worker(text)


def test_a_look_beforehand(chexpert, tmp_path):
    (chexpert / "train" / "patient00003" / "study1" / "view1_frontal.jpg").write_bytes(b"\xff\xd8\xff nothing")
    page = str(inspect_dataset("chexpert", chexpert, tmp_path / "sheet.png"))
    assert "6 films, 6 studies, 6 patients" in page and "Pleural Effusion 6" in page and "1 would be" in page
    assert (tmp_path / "sheet.png").is_file()
    with pytest.raises(DatasetError, match=r"must be a \.png file. Received: .*sheet\.jpg"):
        inspect_dataset("chexpert", chexpert, tmp_path / "sheet.jpg")
