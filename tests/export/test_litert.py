from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from cxr_tf.config import load_experiment
from cxr_tf.models.outputs import float32_model, load_model
from cxr_tf.train.finetune import build
from export import litert
from export.about import about, litert_with_about, read_about
from export.errors import ExportError
from export.forms import open_form
from export.frozen import Frozen
from export.litert import KINDS, convert, custom_ops, write_litert

OPERATING = {
    "classes": ["a", "b", "c", "d"],
    "task": "multiclass",
    "size": 64,
    "storage_size": 80,
    "temperature": 1.7,
    "thresholds": dict.fromkeys("abcd", 0.5),
    "mask_threshold": 0.5,
}


def _write(model, path, kind, films, operating=OPERATING):
    model = float32_model(model)
    said = about(operating, name="tiny", heads=model.heads)
    write_litert(lambda batch: Frozen(model, operating, batch), kind, path, said, films)
    return path


def _expected(model, images, operating=OPERATING):
    """By hand: softmax or sigmoid of logits by the temperature, sigmoid of mask logits."""
    raw = {name: value.numpy().astype(np.float64) for name, value in model(images, training=False).items()}
    made = {}
    if "logits" in raw:
        made["logits"], z = raw["logits"], raw["logits"] / operating["temperature"]
        multiclass = operating["task"] == "multiclass"
        made["probabilities"] = np.exp(z) / np.exp(z).sum(1, keepdims=True) if multiclass else 1 / (1 + np.exp(-z))
    if "mask_logits" in raw:
        made["mask"] = 1 / (1 + np.exp(-raw["mask_logits"]))
    return made


def _ops(path):
    """(name, types of its inputs, types of its outputs) of each op."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    types = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
    (graph,) = model.subgraphs
    for op in graph.operators:
        code = model.operatorCodes[op.opcodeIndex]
        yield (
            names[max(code.builtinCode, code.deprecatedBuiltinCode)],
            [types[graph.tensors[i].type] for i in op.inputs if i >= 0],
            [types[graph.tensors[i].type] for i in op.outputs],
        )


@pytest.fixture(scope="module")
def trained(tiny_run):
    """The model of the tiny run, 24 of its training films and 12 test films."""
    from cxr_tf.data.pipeline import batches, read_batches

    model = load_model(tiny_run.folder / "model.keras")
    shards = tiny_run.shards()

    def films(part: str, count: int) -> np.ndarray:
        parts = tiny_run.parts()
        keys = parts.index[parts["part"] == part].to_numpy()[:count]
        found = read_batches(batches(shards, keys, size=64, batch_size=8, shuffle=False))
        return np.concatenate([images.numpy() for images, _ in found])

    return model, films("train", 24), films("test", 12)


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    model, films, _ = trained
    folder = tmp_path_factory.mktemp("litert")
    return {kind: _write(model, folder / f"{kind}.tflite", kind, films) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_names_types_and_ranges_are_the_contract(written, trained, kind):
    interpreter = Interpreter(str(written[kind]))
    assert interpreter.get_signature_list() == {
        "predict": {"inputs": ["image"], "outputs": ["logits", "mask", "probabilities"]}
    }
    for given in (*interpreter.get_input_details(), *interpreter.get_output_details()):
        assert given["dtype"] == np.float32
    made = open_form(written[kind])(trained[2][:3])
    assert {name: value.shape for name, value in made.items()} == {
        "logits": (3, 4),
        "probabilities": (3, 4),
        "mask": (3, 64, 64, 1),
    }
    np.testing.assert_allclose(made["probabilities"].sum(1), 1, atol=1e-5)
    assert made["mask"].min() >= 0
    assert made["mask"].max() <= 1
    assert read_about(written[kind])["classes"] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("kind", KINDS)
def test_builtin_ops_alone(written, kind):
    assert custom_ops(written[kind].read_bytes()) == []
    assert "CUSTOM" not in {name for name, _, _ in _ops(written[kind])}


# Largest error allowed: of a logit, of a mask.
@pytest.mark.parametrize(("kind", "logit", "mask"), [("float32", 1e-4, 1e-4), ("float16", 0.02, 0.02)])
def test_float_forms_equal_keras(written, trained, kind, logit, mask):
    model, _, images = trained
    made, expected = open_form(written[kind])(images), _expected(model, images)
    np.testing.assert_allclose(made["logits"], expected["logits"], atol=logit)
    np.testing.assert_allclose(made["probabilities"], expected["probabilities"], atol=logit)
    np.testing.assert_allclose(made["mask"], expected["mask"], atol=mask)


@pytest.mark.parametrize("kind", ["dynamic", "int8"])
def test_eight_bits_stay_near_keras(written, trained, kind):
    model, _, images = trained
    made, expected = open_form(written[kind])(images), _expected(model, images)
    spread = expected["logits"].std()
    assert np.abs(made["logits"] - expected["logits"]).mean() < 0.1 * spread
    assert np.abs(made["mask"] - expected["mask"]).mean() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_films_goes_in(written, trained, kind):
    images, call = trained[2], open_form(written[kind])
    alone = [call(images[i : i + 1]) for i in range(5)]
    for count in (5, 2, 1, 5):
        made = call(images[:count])
        for name, value in made.items():
            np.testing.assert_allclose(value, np.concatenate([one[name] for one in alone[:count]]), atol=1e-5)


def test_sizes_are_those_of_their_weights(written):
    whole = written["float32"].stat().st_size
    assert 0.45 < written["float16"].stat().st_size / whole < 0.6
    for kind in ("dynamic", "int8"):
        assert 0.2 < written[kind].stat().st_size / whole < 0.4


@pytest.mark.slow
def test_the_model_for_the_edge_is_small_and_whole(tmp_path):
    """What experiments/cxr/edge.toml trains, with drawn weights, in 8 bits: under 3 MB, any number of films."""
    experiment = load_experiment(Path(__file__).parents[2] / "experiments" / "cxr" / "edge.toml")
    model, operating = build(experiment, experiment.data.classes), OPERATING | {"classes": ["a", "b"], "size": 256}
    films = np.random.default_rng(0).uniform(0, 255, (4, 256, 256, 1)).astype(np.float32)
    path = _write(model, tmp_path / "int8.tflite", "int8", films, operating)
    assert path.stat().st_size < 3_000_000
    made = open_form(path)(films[:2])
    assert {name: value.shape for name, value in made.items()} == {
        "logits": (2, 2),
        "probabilities": (2, 2),
        "mask": (2, 256, 256, 1),
    }


def test_int8_computes_in_eight_bits_but_for_its_two_ends(written):
    ops = list(_ops(written["int8"]))
    convolutions = [(given, made) for name, given, made in ops if name == "CONV_2D"]
    in_float = [made for given, made in convolutions if given[0] == "FLOAT32"]
    assert len(convolutions) > 20
    assert len(in_float) == 2  # the first, and mask logits
    assert all(given[:2] == ["INT8", "INT8"] for given, made in convolutions if made not in in_float)
    assert all(made == ["FLOAT32"] for name, _, made in ops if name in ("SOFTMAX", "LOGISTIC"))
    dense = [made for name, _, made in ops if name == "FULLY_CONNECTED"]
    assert dense == [["INT8"], ["FLOAT32"]]  # the hidden layer, and the classes
    assert [name for name, _, _ in ops[:4]] == ["MUL", "SUB", "CONV_2D", "QUANTIZE"]  # standardization first


def test_logits_of_int8_are_not_clipped_at_what_calibration_saw(trained, tmp_path):
    model, films, images = trained
    path = _write(model, tmp_path / "m.tflite", "int8", films[:2])
    made = open_form(path)(images)
    assert len(np.unique(made["logits"][:, 0])) > 8
    assert len(np.unique(made["mask"])) > 256


def test_no_form_but_int8_looks_at_films(trained):
    model, films, _ = trained
    with_films = convert(Frozen(float32_model(model), OPERATING), "dynamic", films)
    without = convert(Frozen(float32_model(model), OPERATING), "dynamic", films[:0])
    assert with_films == without


@pytest.mark.parametrize("head", ["classification", "segmentation"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_model_with_one_head(small_model, images, tmp_path, head, kind):
    model = small_model(**{other: other == head for other in ("classification", "segmentation")})
    operating = OPERATING if head == "classification" else {**OPERATING, "classes": [], "temperature": 1.0}
    path = _write(model, tmp_path / "m.tflite", kind, images, operating)
    made, expected = open_form(path)(images), _expected(model, images, operating)
    assert set(made) == ({"logits", "probabilities"} if head == "classification" else {"mask"})
    assert read_about(path)["heads"] == [head]
    if kind == "float32":
        for name, value in expected.items():
            np.testing.assert_allclose(made[name], value, atol=1e-4)


def test_a_multilabel_model_has_sigmoids(small_model, images, tmp_path):
    operating = {**OPERATING, "task": "multilabel"}
    model = small_model(segmentation=False)
    made = open_form(_write(model, tmp_path / "m.tflite", "float32", images, operating))(images)
    np.testing.assert_allclose(made["probabilities"], _expected(model, images, operating)["probabilities"], atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_rebuilt_in_float32(small_model, images, tmp_path, policy):
    model = small_model(policy=policy)
    path = _write(model, tmp_path / "m.tflite", "float32", images)
    assert {kind for _, given, made in _ops(path) for kind in (*given, *made)} <= {"FLOAT32", "INT32"}
    expected = _expected(float32_model(model), images)
    for name, value in open_form(path)(images).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_model_with_group_normalization(small_model, images, tmp_path, kind):
    model = small_model(normalization="group")
    made, expected = open_form(_write(model, tmp_path / "m.tflite", kind, images))(images), _expected(model, images)
    tolerance = 1e-3 if kind == "float32" else 0.3
    np.testing.assert_allclose(made["logits"], expected["logits"], atol=tolerance)
    np.testing.assert_allclose(made["mask"], expected["mask"], atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_of_keras_cv_or_keras_hub(foreign_model, images, tmp_path, kind):
    made = open_form(_write(foreign_model, tmp_path / "m.tflite", kind, images))(images)
    expected = _expected(foreign_model, images)
    assert set(made) == {"logits", "probabilities", "mask"}
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, atol=1e-3 if kind == "float32" else 0.1)


def test_where_the_runtime_bears_no_batches_the_input_is_one_film(trained, tmp_path, monkeypatch):
    model, films, images = trained
    monkeypatch.setattr(litert, "bears_batches", lambda path, size: False)
    path = _write(model, tmp_path / "m.tflite", "float32", films)
    assert Interpreter(str(path)).get_input_details()[0]["shape_signature"].tolist() == [1, 64, 64, 1]
    for name, value in open_form(path)(images[:3]).items():
        np.testing.assert_allclose(value, _expected(model, images[:3])[name], atol=1e-4)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_graph_that_is_wrong_of_two_films_bears_no_batches(tmp_path, mixed):
    class Mixed(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 1], tf.float32, name="image")])
        def predict(self, image):
            return {"logits": tf.reduce_mean(image, axis=(1, 2)) - mixed * tf.reduce_mean(image)}  # of all films

    content = convert(Mixed(), "float32", np.zeros((0, 8, 8, 1), np.float32))
    (tmp_path / "m.tflite").write_bytes(litert_with_about(content, {**OPERATING, "notice": "", "name": "x"}))
    assert litert.bears_batches(tmp_path / "m.tflite", 8) != mixed


def test_what_has_no_builtin_op_is_refused_by_name():
    class Odd(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 1], tf.float32, name="image")])
        def predict(self, image):
            return {"logits": tf.math.igamma(image, image)[:, 0, 0]}

    with pytest.raises(ExportError, match=r"litert-float32: .*Igamma"):
        convert(Odd(), "float32", np.zeros((0, 8, 8, 1), np.float32))


def test_no_weight_is_read_from_a_variable(trained):
    frozen = Frozen(float32_model(trained[0]), OPERATING)
    graph = frozen.predict.get_concrete_function().graph.as_graph_def()
    kinds = collections.Counter(
        node.op for each in (graph.node, *(f.node_def for f in graph.library.function)) for node in each
    )
    assert kinds["Const"] > 50
    assert not [kind for kind in kinds if "Variable" in kind]


def test_one_that_is_cut_off_anywhere_is_refused_in_words(written, tmp_path):
    content = written["int8"].read_bytes()
    for part in (0.01, 0.3, 0.5, 0.9, 0.99, 0.9999):
        (tmp_path / "cut.tflite").write_bytes(content[: int(part * len(content))])
        with pytest.raises(ExportError, match=r"cut\.tflite"):
            open_form(tmp_path / "cut.tflite")
