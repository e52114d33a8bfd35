from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import cxr_tf
from cxr_tf import preprocess
from cxr_tf.evaluate.saliency import saliency_of
from cxr_tf.models.outputs import calibrated, float32_model, load_model, pooled_features
from export.about import about
from export.savedmodel import write_savedmodel

SIZE, STORAGE = 64, 96
OPERATING = {
    "classes": ["a", "b", "c"],
    "task": "multiclass",
    "size": SIZE,
    "storage_size": STORAGE,
    "temperature": 1.7,
    "thresholds": {"a": 0.5, "b": 0.5, "c": 0.5},
    "mask_threshold": 0.5,
}


def _model(policy: str = "float32", **settings: object) -> keras.Model:
    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return cxr_tf.multitask(
            "small_resnet", (SIZE, SIZE, 1), classes=["a", "b", "c"], decoder_channels=(8, 8, 8, 8, 8), **settings
        )
    finally:
        keras.config.set_dtype_policy(before)


def _images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (count, SIZE, SIZE, 1)).astype(np.float32)


def _write(model: keras.Model, folder: Path, operating: dict[str, Any] = OPERATING) -> None:
    write_savedmodel(model, folder, about(operating, name="tiny", heads=model.heads))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = _model()
    folder = tmp_path_factory.mktemp("export") / "savedmodel" / "1"
    _write(model, folder)
    return model, folder


@pytest.fixture(scope="module")
def signatures(exported):
    loaded = tf.saved_model.load(str(exported[1]))
    yield loaded.signatures
    del loaded  # its variables live as long as it does


def test_it_says_what_it_is(exported):
    said = json.loads((exported[1] / "assets" / "cxr_tf.json").read_text())
    assert said["classes"] == ["a", "b", "c"]
    assert "not a medical device" in said["notice"]


def test_signatures_take_and_give_what_the_contract_says(exported, signatures):
    model, _ = exported
    image = _images()
    served = signatures["predict"](image=tf.constant(image))
    assert set(served) == {"logits", "probabilities", "mask", "content_box", "classes"}
    raw = model(image, training=False)["logits"].numpy()
    np.testing.assert_allclose(served["logits"], raw, atol=1e-5)
    logits = raw / 1.7
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(served["probabilities"], expected, atol=1e-5)
    assert served["classes"].numpy().tolist() == [[b"a", b"b", b"c"]] * 3
    assert served["content_box"].numpy().tolist() == [[0, 0, SIZE, SIZE]] * 3
    features = signatures["features"](image=tf.constant(image))["features"]
    np.testing.assert_allclose(features, pooled_features(model.encoder)(image)["features"], atol=1e-5)


@pytest.mark.parametrize("shape", [(200, 140), (50, 90), (300, 301), (1, 7)])
@pytest.mark.parametrize("kind", ["png", "png16", "jpeg", "rgb"])
def test_bytes_in_equal_our_own_reading_and_preprocessing(signatures, shape, kind):
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    pixels = np.asarray(tf.image.resize(pixels[::8, ::8, None], shape)).round().astype(np.uint8)  # smooth, as films are
    data = {
        "png": lambda: tf.io.encode_png(pixels),
        "png16": lambda: tf.io.encode_png(pixels.astype(np.uint16) * 257),
        "jpeg": lambda: tf.io.encode_jpeg(pixels, quality=90),
        "rgb": lambda: tf.io.encode_png(np.repeat(pixels, 3, axis=2)),
    }[kind]().numpy()
    served = signatures["serving_default"](image_bytes=tf.constant([data]))
    stored = preprocess.to_storage(cxr_tf.read_radiograph(data), STORAGE)
    ours = signatures["predict"](image=tf.constant(preprocess.to_input(stored, SIZE)[None]))
    np.testing.assert_allclose(served["probabilities"], ours["probabilities"], atol=2e-3)  # a gray level in 255
    assert served["content_box"].numpy()[0].tolist() == list(preprocess.content_box(*stored.shape, SIZE))


def test_explain_is_the_eager_map_of_the_top_class(exported, signatures):
    model, _ = exported
    image = _images()
    served = signatures["explain"](image=tf.constant(image))
    assert {name: (value.dtype, value.shape.as_list()) for name, value in served.items()} == {
        "saliency": (tf.float32, [3, SIZE, SIZE, 1]),
        "class_index": (tf.int32, [3]),
        "class_name": (tf.string, [3]),
    }
    top = model(image, training=False)["logits"].numpy().argmax(1)
    assert served["class_index"].numpy().tolist() == top.tolist()
    assert served["class_name"].numpy().tolist() == [[b"a", b"b", b"c"][i] for i in top]
    eager = saliency_of(model, image)
    assert eager.max() == 1.0  # there is evidence in it
    np.testing.assert_allclose(served["saliency"][..., 0], eager, atol=1e-4)


def test_about_says_what_the_asset_says(exported, signatures):
    _, folder = exported
    served = signatures["about"](request=tf.constant(["", "x"]))["about"].numpy()
    text = (folder / "assets" / "cxr_tf.json").read_bytes()
    assert served.tolist() == [text, text]


def test_tensorflow_alone_loads_it(exported):
    """In a process that cannot import Keras, and through the session that TensorFlow Serving runs."""
    model, folder = exported
    image = _images()
    np.save(folder.parent / "image.npy", image)
    code = f"""
        import sys
        sys.modules["keras"] = None
        import numpy as np, tensorflow as tf
        image = np.load({str(folder.parent / "image.npy")!r})
        with tf.compat.v1.Session(graph=tf.Graph()) as session:
            signature = tf.compat.v1.saved_model.load(session, ["serve"], {str(folder)!r}).signature_def["predict"]
            served = session.run(signature.outputs["probabilities"].name, {{signature.inputs["image"].name: image}})
        signatures = tf.saved_model.load({str(folder)!r}).signatures
        np.testing.assert_allclose(signatures["predict"](image=tf.constant(image))["probabilities"], served, atol=1e-6)
        assert signatures["explain"](image=tf.constant(image))["saliency"].shape == image.shape
        np.save({str(folder.parent / "served.npy")!r}, served)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = calibrated(model(image, training=False), OPERATING)["probabilities"]
    np.testing.assert_allclose(np.load(folder.parent / "served.npy"), expected, atol=1e-5)


def _refused(signatures, items: list[bytes]) -> str:
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        signatures["serving_default"](image_bytes=tf.constant(items))
    return str(error.value)


def test_what_is_no_image_is_named_by_its_position(signatures):
    good = tf.io.encode_png(np.zeros((9, 9, 1), np.uint8)).numpy()
    for bad in (b"", b"no image", good[:30], b"\xff\xd8\xff" + bytes(50)):
        assert "[1]" in _refused(signatures, [good, bad, good])


def test_a_png_that_claims_to_be_huge_is_refused_before_it_is_decoded(signatures):
    good = tf.io.encode_png(np.zeros((9, 9, 1), np.uint8)).numpy()
    huge = good[:16] + (30_000).to_bytes(4, "big") * 2 + good[24:]
    assert "megapixels" in _refused(signatures, [huge])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_rebuilt_in_float32(tmp_path, policy):
    model = float32_model(_model(policy))
    _write(model, tmp_path / "1")
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    served = loaded.signatures["predict"](image=tf.constant(_images(1)))
    for name, expected in calibrated(model(_images(1), training=False), OPERATING).items():
        np.testing.assert_allclose(served[name], expected, atol=1e-5)


@pytest.mark.parametrize("head", ["classification", "segmentation"])
def test_a_model_with_one_head(tmp_path, head):
    model = _model(**{other: other == head for other in ("classification", "segmentation")})
    operating = OPERATING if head == "classification" else {**OPERATING, "classes": []}
    _write(model, tmp_path / "1", operating)
    signatures = tf.saved_model.load(str(tmp_path / "1")).signatures
    assert ("explain" in signatures) == (head == "classification")
    of_head = {"logits", "probabilities", "classes"} if head == "classification" else {"mask"}
    assert set(signatures["predict"].structured_outputs) == of_head | {"content_box"}


def test_a_model_file_that_is_not_ours_is_refused(tmp_path):
    from cxr_tf.models.layers import ModelError

    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    other.save(tmp_path / "other.keras")
    (tmp_path / "half.keras").write_bytes((tmp_path / "other.keras").read_bytes()[:500])
    for name in ("other.keras", "half.keras", "none.keras"):
        with pytest.raises(ModelError, match=name):
            load_model(tmp_path / name)
