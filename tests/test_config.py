from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_tf.config import ConfigError, differences, load_experiment, load_table, parse_experiment, to_toml

MINIMAL = 'name = "a"\n[data]\nshards = "s"\n'


def _load(tmp_path: Path, text: str, overrides: list[str] | None = None):
    path = tmp_path / "experiment.toml"
    path.write_text(text, encoding="utf-8")
    return load_experiment(path, overrides or [])


def test_defaults_fill_what_is_not_said(tmp_path):
    experiment = _load(tmp_path, MINIMAL)
    assert experiment.model.encoder == "densenet121"
    assert experiment.loss.head_weights == [0.6, 0.4]


def test_overrides_take_toml_values_and_bare_words(tmp_path):
    experiment = _load(
        tmp_path,
        MINIMAL,
        ["train.steps=500", "train.learning_rate=1", "model.encoder=resnet50v2", 'data.classes=["x"]'],
    )
    assert experiment.train.steps == 500
    assert experiment.train.learning_rate == 1.0
    assert experiment.model.encoder == "resnet50v2"
    assert experiment.data.classes == ["x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "[train]\nstep = 5\n", ["`train.step`", 'Did you mean "steps"?']),
        (MINIMAL + '[train]\nsteps = "500"\n', ["`train.steps`", "a whole number", "'500'"]),
        (MINIMAL + "[train]\nlearning_rate = -1.0\n", ["`train.learning_rate`", "greater than 0", "-1.0"]),
        (MINIMAL + "[train]\nsteps = 5\nwarmup_steps = 9\n", ["`train`", "warmup_steps", "below"]),
        (MINIMAL + "[model]\nsize = 300\n", ["`model.size`", "multiple of 32", "300"]),
        (MINIMAL + "[model]\nencoder = 3\n", ["`model.encoder`", "a text"]),
        (MINIMAL + '[loss]\nhead_weights = "sometimes"\n', ["`loss.head_weights`", '"uncertainty"']),
        (MINIMAL + "[loss]\nhead_weights = [0, 0]\n", ["`loss.head_weights`", "above 0"]),
        (MINIMAL + '[data.split]\ncolumn = "fold"\n', ["`data.split`", "`train` and `test`"]),
        (MINIMAL + "[data.split]\nfolds = 3\nfold = 3\n", ["`data.split`", "from 0"]),
        (MINIMAL + "[modle]\nsize = 32\n", ["`modle`", 'Did you mean "model"?']),
        ('name = "a"\n[train]\nsteps = 5\n', ["`data` is missing"]),
        ('name = "a"\n[data]\n', ["`data.shards` is missing", "folder"]),
        ('name = "a/b"\n[data]\nshards = "s"\n', ["`name`"]),
        ('name = "a"\ndata = 3\n', ["`data`"]),
        ('name = "a\n', ["not valid TOML"]),
    ],
)
def test_bad_experiment_names_the_key_and_what_it_takes(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("override", ["train.steps", "=5", "train..steps=5", "name.x=5"])
def test_bad_override_is_refused(tmp_path, override):
    with pytest.raises(ConfigError, match=r"--set|section"):
        _load(tmp_path, MINIMAL, [override])


def test_missing_file_and_missing_table(tmp_path):
    with pytest.raises(ConfigError, match="no such experiment"):
        load_experiment(tmp_path / "none.toml")
    path = tmp_path / "experiment.toml"
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"no \[table\] section"):
        load_table(path)


def test_resolved_file_gives_the_same_experiment(tmp_path):
    experiment = _load(tmp_path, MINIMAL + '[data.where]\n"a b" = ["x\\"y", 1]\n[train]\nema = 0.9\n')
    text = to_toml(experiment.model_dump(mode="json"))
    assert parse_experiment(tomllib.loads(text)) == experiment


def test_differences_name_key_and_both_values(tmp_path):
    old, new = _load(tmp_path, MINIMAL), _load(tmp_path, MINIMAL, ["train.steps=7"])
    assert differences(old, old) == []
    assert differences(old, new) == ["train.steps: 1000 there, 7 asked for"]


plain = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.lists(st.integers(-5, 5), max_size=3),
)
keys = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6)


@given(st.dictionaries(keys, st.one_of(plain, st.dictionaries(keys, plain, max_size=3)), max_size=4))
def test_toml_round_trip(settings):
    assert tomllib.loads(to_toml(settings)) == settings


def test_every_experiment_file_is_valid():
    files = sorted((Path(__file__).parents[1] / "experiments").rglob("*.toml"))
    assert files
    for file in files:
        assert load_experiment(file).name
        head = file.read_text(encoding="utf-8")[:1500]
        for word in ("COMMAND", "COST", "RESULT"):
            assert word in head, f"{file} does not say its {word}"
