"""A finished run as a SavedModel for TF Serving: bytes or intensities in, calibrated probabilities and mask out.

    serving_default   image_bytes: string [batch], each a PNG or JPEG of any size
    predict           image: float32 [batch, S, S, 1], intensities 0-255 as `cxr_tf.preprocess` makes them
    features          image, as above -> features: float32 [batch, channels], the encoder's pooled last level
    explain           image, as above -> saliency: float32 [batch, S, S, 1], 0-1, of the class with the highest logit,
                      whose number and name are class_index: int32 [batch] and class_name: string [batch]
    about             request: string [batch], of any content -> about: string [batch], the text of assets/cxr_tf.json

The first two give `logits` and `probabilities` [batch, classes] (before and after temperature scaling), `classes`
[batch, classes] (their names, in the same order), `mask` [batch, S, S, 1] (0-1) and `content_box` int32 [batch, 4]
(top, left, height and width of the film in the padded square; the whole square for `predict`, whose caller did the
padding).
What belongs to a head that a run does not have is left out, and `explain` with classification.

`about` tells a client class names, sizes and thresholds, and takes an input only because TF Serving's REST interface
refuses signatures without one. The folder also holds warm-up requests (`export.serving.warmup`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from cxr_tf import preprocess
from cxr_tf.evaluate.saliency import grad_cam, normalized
from cxr_tf.models.multitask import MultiTask
from cxr_tf.models.outputs import pooled_features
from export.frozen import Frozen
from export.serving.warmup import write_warmup

MAX_PIXELS = 100_000_000


def write_savedmodel(model: MultiTask, out: Path, said: dict[str, Any]) -> None:
    """Writes a SavedModel with warm-up requests.

    Args:
        model: that computes in float32 (`cxr_tf.models.outputs.float32_model`).
        out: folder to write; it must not exist. TensorFlow Serving wants its name to be a version number.
        said: from `export.about.about`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        about = Path(scratch) / "cxr_tf.json"
        about.write_text(json.dumps(said, indent=2), encoding="utf-8")
        served = _Served(model, said, about)
        tf.saved_model.save(served, str(out), signatures=dict(served.calls))
    write_warmup(out, list(served.calls), said["size"], said["storage_size"])


class _Served(tf.Module):
    """The signatures over one float32 model; `cxr_tf.json` travels as an asset."""

    def __init__(self, model: MultiTask, operating: dict[str, Any], about: Path):
        super().__init__()
        # Constants, because TensorFlow folds batch-norm into a convolution only then, and oneDNN arranges weights once
        # and not at every call: that halves the time of one film. `features` and `explain` have the encoder and the
        # classes beside it as variables, which costs less room than constants for each of them would.
        self.frozen = Frozen(model, operating)
        pooled = pooled_features(model.encoder)
        classifier = keras.Model(model.input, model.output["logits"]) if "logits" in model.heads else pooled
        # TensorFlow's variables and not Keras' around them: of those a SavedModel restores copies, which no signature
        # reads. Python's loader puts that right; the C++ one, which TensorFlow Serving is made of, finds no values.
        self.weights = [variable.value for variable in classifier.variables]
        self.about = tf.saved_model.Asset(str(about))
        size, storage_size, classes = operating["size"], operating["storage_size"], operating["classes"]
        about_text = about.read_text(encoding="utf-8")

        bytes_in = tf.TensorSpec([None], tf.string, name="image_bytes")
        square_in = tf.TensorSpec([None, size, size, 1], tf.float32, name="image")

        def traced(takes: Any) -> Any:  # no `if` in there depends on a tensor, and rewriting costs seconds
            return tf.function(input_signature=[takes], autograph=False)

        # The traced functions close over the model; their first argument is not `self`, so no method is needed.
        def outputs(image: Any, box: Any) -> dict[str, Any]:
            made = self.frozen.predict(image) | {"content_box": box}
            if "logits" in made:
                made["classes"] = tf.repeat(tf.constant([classes]), tf.shape(image)[0], axis=0)
            return made

        @traced(bytes_in)
        def from_bytes(image_bytes: Any) -> dict[str, Any]:
            with tf.control_dependencies([_assert_images(image_bytes)]):
                image_bytes = tf.identity(image_bytes)
            image, box = tf.map_fn(
                lambda one: _decode(one, storage_size, size),
                image_bytes,
                fn_output_signature=(tf.TensorSpec([size, size, 1], tf.float32), tf.TensorSpec([4], tf.int32)),
            )
            return outputs(image, box)

        @traced(square_in)
        def predict(image: Any) -> dict[str, Any]:
            whole = tf.repeat(tf.constant([[0, 0, size, size]]), tf.shape(image)[0], axis=0)
            return outputs(_squares(image, size), whole)

        @traced(square_in)
        def features(image: Any) -> dict[str, Any]:
            return pooled(_squares(image, size), training=False)

        @traced(tf.TensorSpec([None], tf.string, name="request"))
        def tell(request: Any) -> dict[str, Any]:
            return {"about": tf.fill(tf.shape(request), about_text)}

        self.calls = {"serving_default": from_bytes, "predict": predict, "features": features, "about": tell}
        if "logits" in model.heads:
            saliency = grad_cam(model)

            @traced(square_in)
            def explain(image: Any) -> dict[str, Any]:
                image = _squares(image, size)
                top = tf.argmax(classifier(image, training=False), axis=1, output_type=tf.int32)
                return {
                    "saliency": normalized(saliency(image, top))[..., None],
                    "class_index": top,
                    "class_name": tf.gather(tf.constant(classes), top),
                }

            self.calls["explain"] = explain


def _squares(image: Any, size: int) -> Any:
    """Refuses other shapes than `[batch, size, size, 1]`: a session takes any, and convolutions would answer."""
    shape = tf.shape(image)
    message = f"image takes one film or more of {size} x {size} x 1; received the shape"
    fits = tf.reduce_all(tf.equal(shape[1:], [size, size, 1])) & (tf.size(image) > 0)
    with tf.control_dependencies([tf.debugging.Assert(fits, [message, shape], summarize=5)]):
        return tf.identity(image)


def _is_png(image_bytes: Any) -> Any:
    return tf.equal(tf.strings.substr(image_bytes, 0, 8), b"\x89PNG\r\n\x1a\n")


def _is_jpeg(image_bytes: Any) -> Any:
    return tf.equal(tf.strings.substr(image_bytes, 0, 3), b"\xff\xd8\xff")


def _assert_images(image_bytes: Any) -> Any:
    """Names the positions of what is no whole PNG or JPEG, before one of them fails the batch without its index."""
    length = tf.strings.length(image_bytes)
    tail = tf.strings.substr(image_bytes, tf.maximum(length - 12, 0), tf.minimum(length, 12))
    whole_png = _is_png(image_bytes) & tf.equal(tail, b"\x00\x00\x00\x00IEND\xaeB\x60\x82")
    jpeg_end = tf.equal(tf.strings.substr(image_bytes, tf.maximum(length - 2, 0), tf.minimum(length, 2)), b"\xff\xd9")
    bad = tf.where(~(whole_png | (_is_jpeg(image_bytes) & jpeg_end)))[:, 0]
    fits = tf.equal(tf.size(bad), 0) & (tf.size(image_bytes) > 0)
    message = "image_bytes takes one or more whole PNG or JPEG files; no such file at position"
    return tf.debugging.Assert(fits, [message, bad], 64)


def _decode(image_bytes: Any, storage_size: int, size: int) -> tuple[Any, Any]:
    """One PNG or JPEG -> model input and content box, as `cxr_tf.data.radiograph` and `cxr_tf.preprocess` do it."""

    def png() -> Any:
        # Big-endian width and height stand at byte 16 of every PNG.
        sides = tf.cast(tf.io.decode_raw(tf.strings.substr(image_bytes, 16, 8), tf.uint8), tf.int64)
        width = tf.reduce_sum(sides[:4] * [1 << 24, 1 << 16, 1 << 8, 1])
        height = tf.reduce_sum(sides[4:] * [1 << 24, 1 << 16, 1 << 8, 1])
        with tf.control_dependencies([_assert_size(height, width)]):
            high = tf.io.decode_png(tf.identity(image_bytes), channels=1, dtype=tf.uint16)
        return tf.cast(high // 256, tf.uint8)

    def jpeg() -> Any:
        shape = tf.cast(tf.image.extract_jpeg_shape(image_bytes), tf.int64)
        with tf.control_dependencies([_assert_size(shape[0], shape[1])]):
            return tf.io.decode_jpeg(tf.identity(image_bytes), channels=1, dct_method="INTEGER_ACCURATE")

    pixels = tf.ensure_shape(tf.cond(_is_png(image_bytes), png, jpeg), [None, None, 1])
    stored = preprocess.tf_to_storage(pixels, storage_size)
    shape = tf.shape(stored)
    return preprocess.tf_to_input(stored, size), preprocess.tf_content_box(shape[0], shape[1], size)


def _assert_size(height: Any, width: Any) -> Any:
    message = f"image_bytes takes at most {MAX_PIXELS // 10**6} megapixels; received"
    return tf.debugging.Assert(height * width <= MAX_PIXELS, [message, height, width])
