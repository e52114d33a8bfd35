from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, checker, helper, save_model

from export.about import about, litert_about, litert_with_about, onnx_about, read_about
from export.errors import ExportError, imported

OPERATING = {
    "classes": ["healthy", "süß"],
    "task": "multiclass",
    "size": 64,
    "storage_size": 96,
    "temperature": 1.7,
    "thresholds": {"healthy": 0.5, "süß": 0.4},
    "mask_threshold": 0.5,
}


@pytest.fixture(scope="module")
def said():
    return about(OPERATING, name="tiny", heads=("logits", "mask_logits"))


@pytest.fixture(scope="module")
def plain() -> bytes:
    """A .tflite that TensorFlow made of a convolution and a dense layer, and that says nothing of itself."""
    import tensorflow as tf

    drawn = np.random.default_rng(0)
    kernel, dense = drawn.normal(size=(3, 3, 1, 5)).astype("f"), drawn.normal(size=(5, 3)).astype("f")

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 1], tf.float32, name="image")])
    def run(image):
        return {"logits": tf.matmul(tf.reduce_mean(tf.nn.conv2d(image, kernel, 1, "SAME"), axis=(1, 2)), dense)}

    return tf.lite.TFLiteConverter.from_concrete_functions([run.get_concrete_function()]).convert()


def _onnx(path, props):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph)
    helper.set_model_props(model, props)
    checker.check_model(model)
    save_model(model, path)
    return path


def test_it_says_all_of_operating_and_what_the_graph_takes(said):
    assert {key: said[key] for key in OPERATING} == OPERATING
    assert said["notice"] == "research use, not a medical device"
    assert said["name"] == "tiny"
    assert said["heads"] == ["classification", "segmentation"]
    assert said["calibrated"] is True
    assert set(said["versions"]) == {"cxr-tf", "keras", "tensorflow"}


def test_every_form_gives_back_what_it_was_given(said, plain, tmp_path):
    (tmp_path / "1" / "assets").mkdir(parents=True)
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"")
    (tmp_path / "1" / "assets" / "cxr_tf.json").write_text(json.dumps(said), encoding="utf-8")
    (tmp_path / "m.tflite").write_bytes(litert_with_about(plain, said))
    _onnx(tmp_path / "m.onnx", {"another": "thing", "cxr_tf": json.dumps(said)})
    for name in ("1", "m.tflite", "m.onnx"):
        assert read_about(tmp_path / name) == said


def test_a_tflite_computes_the_same_with_it(said, plain):
    image = np.random.default_rng(1).normal(size=(1, 8, 8, 1)).astype("f")
    made = []
    for content in (plain, litert_with_about(plain, said)):
        interpreter = Interpreter(model_content=content)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
        interpreter.invoke()
        made.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    np.testing.assert_array_equal(*made)


def test_weights_stay_aligned_and_other_metadata_stay(said, plain):
    content = litert_with_about(litert_with_about(plain, {"classes": []}), said)
    assert json.loads(litert_about(content)) == said
    model = schema.Model.GetRootAs(content, 0)
    names = [model.Metadata(i).Name() for i in range(model.MetadataLength())]
    assert names.count(b"cxr_tf.json") == 1
    assert b"min_runtime_version" in names
    start = np.frombuffer(content, np.uint8).ctypes.data
    starts = [
        b.DataAsNumpy().ctypes.data - start for b in map(model.Buffers, range(model.BuffersLength())) if b.DataLength()
    ]
    assert len(starts) > 3
    assert {at % 16 for at in starts} == {0}


def test_without_it_a_form_is_not_ours(plain, tmp_path):
    (tmp_path / "m.tflite").write_bytes(plain)
    _onnx(tmp_path / "m.onnx", {"another": "thing"})
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"")
    for name in ("m.tflite", "m.onnx", "1"):
        with pytest.raises(ExportError, match="not one of ours"):
            read_about(tmp_path / name)


def test_what_is_cut_off_is_said_to_be(said, plain, tmp_path):
    content = litert_with_about(plain, said)
    whole = _onnx(tmp_path / "whole.onnx", {"cxr_tf": json.dumps(said)}).read_bytes()
    for part in (0.1, 0.3, 0.5):  # in the tables at the end of a .tflite the runtime finds it: test_litert
        with pytest.raises(ExportError, match="cut off"):
            litert_about(content[: int(part * len(content))])
    for part in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        with pytest.raises(ExportError, match="cut off"):
            onnx_about(whole[: int(part * len(whole))])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("kind", ["tflite", "onnx"])
def test_whatever_is_wrong_with_a_file_is_said_in_words(said, plain, tmp_path, kind, data):
    """A few bytes are overwritten, somewhere: it is read, or refused; nothing else."""
    if kind == "tflite":
        content, read = bytearray(litert_with_about(plain, said)), litert_about
    else:
        content, read = bytearray(_onnx(tmp_path / "m.onnx", {"cxr_tf": json.dumps(said)}).read_bytes()), onnx_about
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + 4] = data.draw(st.binary(min_size=1, max_size=4))
    with contextlib.suppress(ExportError):
        assert read(bytes(content)) is None or isinstance(read(bytes(content)), str)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x1c\x00\x00\x00TFL3", b"\x89PNG" * 99, bytes(500)])
@pytest.mark.parametrize("name", ["m.tflite", "m.onnx"])
def test_any_other_bytes_are_refused_in_words(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ExportError, match=name):
        read_about(tmp_path / name)


def test_what_is_no_form_is_refused(tmp_path):
    (tmp_path / "film.dcm").write_bytes(b"")
    with pytest.raises(ExportError, match="no exported form"):
        read_about(tmp_path / "film.dcm")
    with pytest.raises(ExportError, match="no SavedModel"):
        read_about(tmp_path)
    with pytest.raises(ExportError, match="No such file"):
        read_about(tmp_path / "none.tflite")


def test_what_is_of_another_version_or_no_json_is_refused(plain, tmp_path):
    (tmp_path / "old.tflite").write_bytes(litert_with_about(plain, {"notice": "", "classes": []}))
    with pytest.raises(ExportError, match=r"task, size, storage_size, .* missing or makes no sense"):
        read_about(tmp_path / "old.tflite")
    for text in ("{", "3", "[]", "null"):
        with pytest.raises(ExportError, match=r"odd\.onnx"):
            read_about(_onnx(tmp_path / "odd.onnx", {"cxr_tf": text}))


def test_reading_and_running_need_no_tensorflow(said, plain, tmp_path):
    (tmp_path / "m.tflite").write_bytes(litert_with_about(plain, said))
    _onnx(tmp_path / "m.onnx", {"cxr_tf": json.dumps(said)})
    code = (
        "import sys; from export.about import read_about; from export.forms import open_form\n"
        f"for name in ('m.tflite', 'm.onnx'): print(read_about('{tmp_path}/' + name)['name'])\n"
        f"open_form('{tmp_path}/m.onnx')\n"
        "print([m for m in ('tensorflow', 'keras', 'onnx', 'pandas', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:3] == ["tiny", "tiny", "[]"]


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ExportError, match="pip install ai-edge-litert"):
        imported("ai_edge_litert.interpreter")
