from __future__ import annotations

import itertools
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_tf.config import (
    ConfigError,
    Experiment,
    Pretraining,
    differences,
    load_experiment,
    load_table,
    parse_experiment,
    to_toml,
)

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


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("key", ["train.learning_rate", "train.clip_norm", "augment.noise", "model.dropout"])
def test_infinite_and_undefined_numbers_are_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"`{key}`: must be a finite number\..*Received: {value}\."):
        _load(tmp_path, MINIMAL, [f"{key}={value}"])


def test_infinite_numbers_are_refused_inside_lists_and_tables(tmp_path):
    with pytest.raises(ConfigError, match=r"`loss.class_weights`: each must be a finite number"):
        _load(tmp_path, MINIMAL, ["loss.class_weights=[1.0, inf]"])
    with pytest.raises(ConfigError, match=r"`data.where.age`: each must be a finite number"):
        _load(tmp_path, MINIMAL, ["data.where.age=[nan]"])


@pytest.mark.parametrize("key", ["flip", "shift", "brightness", "contrast", "noise", "blur", "erase"])
def test_augment_fractions_go_from_0_to_1(tmp_path, key):
    assert getattr(_load(tmp_path, MINIMAL, [f"augment.{key}=1.0"]).augment, key) == 1.0
    for value in ("-0.1", "1.1"):
        with pytest.raises(ConfigError, match=rf"experiment.toml: `augment.{key}`: must be .*Received: {value}"):
            _load(tmp_path, MINIMAL, [f"augment.{key}={value}"])


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("rotation", "180.0", "180.5"),
        ("rotation", "0.0", "-1.0"),
        ("gamma", "10.0", "10.5"),
        ("crop", "0.99", "1.0"),
        ("scale", "[1.0, 1.0]", "[1.1, 0.9]"),
        ("scale", "[0.5, 2.0]", "[0.0, 1.0]"),
        ("scale", "[0.5, 2.0]", "[0.5, inf]"),
        ("scale", "[0.5, 2.0]", "[1.0]"),
    ],
)
def test_augment_bounds(tmp_path, key, good, bad):
    _load(tmp_path, MINIMAL, [f"augment.{key}={good}"])
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, MINIMAL, [f"augment.{key}={bad}"])
    assert f"experiment.toml: `augment.{key}`" in str(error.value)
    assert str(error.value).endswith(f"Received: {bad}.")


def test_classes_are_named_once_each(tmp_path):
    for classes in ('["a", "b", "a"]', "[]"):
        with pytest.raises(ConfigError, match=r"`data.classes`: must name at least one class, and none of them twice"):
            _load(tmp_path, MINIMAL, [f"data.classes={classes}"])


@pytest.mark.parametrize(
    "csv", ["/etc/a.csv", "../a.csv", "a/../../b.csv", "a\\..\\..\\b.csv", "C:\\a.csv", "\\a.csv", ""]
)
def test_the_csv_stays_inside_the_root(tmp_path, csv):
    path = tmp_path / "experiment.toml"
    path.write_text(to_toml({"table": {"csv": csv}}))
    with pytest.raises(ConfigError, match=r"`table.csv`: must be a file inside the root"):
        load_table(path)


def test_a_csv_in_a_folder_of_the_root_is_accepted(tmp_path):
    path = tmp_path / "experiment.toml"
    path.write_text('[table]\ncsv = "tables/all..films.csv"\n')
    assert load_table(path).csv == "tables/all..films.csv"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train=3", "`train` takes a section with the keys steps, batch_size, "),
        ("model.decoder_channels=[1, 2]", "`model.decoder_channels` takes 5 whole numbers (of the decoder, "),
        (
            "model.decoder_channels=[1, 2, 3, 4, 5, 6]",
            "`model.decoder_channels` takes 5 whole numbers (of the decoder, ",
        ),
        (
            "model.decoder_channels=[1, 2, 3, 4, 0]",
            "`model.decoder_channels`: each must be greater than or equal to 1. ",
        ),
        ("loss.class_weights=3", "`loss.class_weights` takes a list of numbers (one weight a class, "),
        ('loss.head_weights="x"', '`loss.head_weights` takes 2 numbers or "uncertainty" ('),
        ("loss.head_weights=[1]", '`loss.head_weights` takes 2 numbers or "uncertainty" ('),
        (
            "loss.head_weights=[-1, 1]",
            "`loss.head_weights`: each must be greater than or equal to 0. It takes 2 numbers",
        ),
        ("loss.head_weights=[0, 0]", "`loss.head_weights`: at least one of the two weights must be above 0. "),
        ("data.where=3", "`data.where` takes a table of lists of texts, numbers, true or false (column = values"),
        ("data.where.age=3", "`data.where.age` takes a list of texts, numbers, true or false (column = values"),
        ("data.where.age=[[1]]", "`data.where.age` takes a list of texts, numbers, true or false (column = values"),
        ('table.classes={a = "b"}', "`table.classes.a` takes a list of texts (class name = "),
        ("table.label_columns.a=1", "`table.label_columns.a` takes a text (class name = "),
        ('train.optimizer="adam"', '`train.optimizer` takes "adamw" or "sgd" or "lamb". '),
        ("train.deterministic=1", "`train.deterministic` takes true or false ("),
        ('name="a/b"', "`name` takes a text (of the run folder: letters, digits, "),
    ],
)
def test_errors_are_one_plain_line_a_key(tmp_path, override, line):
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, MINIMAL, [override])
    text = str(error.value).split("experiment.toml: ", 1)[1]
    assert text.startswith(line)
    assert "Received: " in text
    assert "\n" not in text
    for jargon in ("a valid", "instance", "dictionary", "string", "integer", "Section", "items", "pattern", "Input"):
        assert jargon not in text


def test_each_wrong_key_has_its_line(tmp_path):
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, MINIMAL, ["train.steps=0.5", "train.stepz=1", "loss.head_weights=1", "model.size=3"])
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    for key in ("`train.steps`", "`train.stepz`", "`loss.head_weights`", "`model.size`"):
        assert sum(key in line for line in lines) == 1


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


@pytest.mark.parametrize("override", ["evaluate.replicates=500", "data.shards=moved", "table.image=path"])
def test_differences_leave_out_what_does_not_touch_the_training(tmp_path, override):
    old, new = _load(tmp_path, MINIMAL), _load(tmp_path, MINIMAL, [override])
    assert old != new
    assert differences(old, new) == []


def test_differences_see_the_rest_of_data(tmp_path):
    old, new = _load(tmp_path, MINIMAL), _load(tmp_path, MINIMAL, ["data.shards=moved", "data.split.seed=1"])
    assert differences(old, new) == ["data.split.seed: 0 there, 1 asked for"]


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


FILES = sorted((Path(__file__).parents[1] / "experiments").rglob("*.toml"))


def test_there_are_experiment_files():
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_every_experiment_file_is_valid_and_says_command_cost_and_result(file):
    text = file.read_text(encoding="utf-8")
    assert load_experiment(file, kind=Pretraining if "method" in tomllib.loads(text) else Experiment).name
    lines = text.splitlines()
    head = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    for word in ("COMMAND", "COST", "RESULT"):
        at = [i for i, line in enumerate(head) if line.split()[:1] == [word]]
        assert len(at) == 1, f"{file} does not say its {word}"
        said = head[at[0]].split()[1:]
        after = " ".join(head[at[0] + 1 : at[0] + 2]).split()
        if after[:1] not in (["COMMAND"], ["COST"], ["RESULT"]):
            said += after
        assert len(said) >= 3, f"{file} leaves its {word} empty"
