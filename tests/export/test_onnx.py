from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf

from cxr_tf.models.outputs import calibrated, float32_model, load_model
from export.about import about, read_about
from export.errors import ExportError
from export.forms import open_form
from export.frozen import Frozen
from export.onnx_form import write_onnx

OPERATING = {
    "classes": ["a", "b", "c", "d"],
    "task": "multiclass",
    "size": 64,
    "storage_size": 80,
    "temperature": 1.7,
    "thresholds": dict.fromkeys("abcd", 0.5),
    "mask_threshold": 0.5,
}


def _write(model, path, operating=OPERATING):
    model = float32_model(model)
    write_onnx(Frozen(model, operating), path, about(operating, name="tiny", heads=model.heads))
    return path


def _expected(model, images, operating=OPERATING):
    raw = float32_model(model)(images, training=False)
    made = calibrated(raw, operating) | ({"logits": raw["logits"]} if "logits" in raw else {})
    return {name: value.numpy() for name, value in made.items()}


@pytest.fixture(scope="module")
def written(tiny_run, tmp_path_factory):
    model = load_model(tiny_run.folder / "model.keras")
    return model, _write(model, tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_it_is_valid_and_of_a_recent_opset(written):
    model = onnx.load_model(written[1])
    onnx.checker.check_model(model, full_check=True)
    assert next(each.version for each in model.opset_import if each.domain == "") >= 17
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


def test_names_and_a_batch_of_any_size(written):
    session = onnxruntime.InferenceSession(str(written[1]), providers=["CPUExecutionProvider"])
    assert [(each.name, each.type, each.shape) for each in session.get_inputs()] == [
        ("image", "tensor(float)", ["batch", 64, 64, 1])
    ]
    assert {each.name: each.shape for each in session.get_outputs()} == {
        "logits": ["batch", 4],
        "probabilities": ["batch", 4],
        "mask": ["batch", 64, 64, 1],
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_onnxruntime_says_what_keras_says(written, images, count):
    model, path = written
    made, expected = open_form(path)(images[:count]), _expected(model, images[:count])
    assert set(made) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, atol=1e-4)


def test_it_says_what_it_is_to_us_and_to_onnxruntime(written):
    said = read_about(written[1])
    assert said["classes"] == ["a", "b", "c", "d"]
    session = onnxruntime.InferenceSession(str(written[1]), providers=["CPUExecutionProvider"])
    assert set(session.get_modelmeta().custom_metadata_map) == {"cxr_tf"}


@pytest.mark.parametrize("head", ["classification", "segmentation"])
def test_a_model_with_one_head(small_model, images, tmp_path, head):
    model = small_model(**{other: other == head for other in ("classification", "segmentation")})
    operating = OPERATING if head == "classification" else {**OPERATING, "classes": [], "temperature": 1.0}
    made = open_form(_write(model, tmp_path / "m.onnx", operating))(images)
    assert set(made) == ({"logits", "probabilities"} if head == "classification" else {"mask"})
    for name, value in _expected(model, images, operating).items():
        np.testing.assert_allclose(made[name], value, atol=1e-4)


@pytest.mark.parametrize("given", [{"policy": "mixed_float16"}, {"normalization": "group"}])
def test_mixed_precision_and_group_normalization(small_model, images, tmp_path, given):
    model = small_model(**given)
    for name, value in open_form(_write(model, tmp_path / "m.onnx"))(images).items():
        np.testing.assert_allclose(value, _expected(model, images)[name], atol=1e-3)


def test_a_backbone_of_keras_cv_or_keras_hub(foreign_model, images, tmp_path):
    for name, value in open_form(_write(foreign_model, tmp_path / "m.onnx"))(images).items():
        np.testing.assert_allclose(value, _expected(foreign_model, images)[name], atol=1e-3)


def test_what_cannot_be_converted_is_said(tmp_path):
    class Odd(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 1], tf.float32, name="image")])
        def predict(self, image):
            return {"logits": tf.math.igamma(image, image)[:, 0, 0]}

    with pytest.raises(ExportError, match=r"onnx: the graph cannot be converted: .*Igamma"):
        write_onnx(Odd(), tmp_path / "m.onnx", {})
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_cut_off_is_refused_in_words(written, tmp_path):
    content = written[1].read_bytes()
    for part in (0.01, 0.5, 0.99):
        (tmp_path / "cut.onnx").write_bytes(content[: int(part * len(content))])
        with pytest.raises(ExportError, match=r"cut\.onnx"):
            open_form(tmp_path / "cut.onnx")
