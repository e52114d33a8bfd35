"""Grad-CAM against closed forms, in graphs and exports; and random weights that leave the model alone."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import cxr_tf
from cxr_tf.evaluate.saliency import TOP, grad_cam, normalized, randomized, saliency_of
from cxr_tf.models.encoders import pyramid
from cxr_tf.models.layers import ModelError, Standardize
from cxr_tf.models.normalization import normalization_layer

SIZE = 96


def tiny_encoder() -> keras.Model:
    """One convolution a level: what takes time in these tests is tracing."""
    image = keras.Input((None, None, 1), name="image")
    x, levels = Standardize(128.0, 64.0, multiple=32, name="standardize")(image), {}
    for stride in (2, 4, 8, 16, 32):
        x = keras.layers.Conv2D(8, 3, 2, padding="same", name=f"conv{stride}")(x)
        x = keras.layers.ReLU(name=f"relu{stride}")(normalization_layer("batch", 8, name=f"norm{stride}")(x))
        levels[f"stride_{stride}"] = x
    return keras.Model(image, levels, name="tiny")


def make(**settings) -> cxr_tf.MultiTask:
    keras.utils.set_random_seed(0)
    settings = {"hidden": 0, "dropout": 0.0, "segmentation": False, "decoder_channels": (8, 8, 8, 8, 4)} | settings
    return cxr_tf.multitask(tiny_encoder(), (SIZE, SIZE, 1), 3, **settings)


def films(n: int = 5) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (n, SIZE, SIZE, 1)).astype("float32")


def deepest(model: cxr_tf.MultiTask, images: np.ndarray) -> np.ndarray:
    """The level that Grad-CAM looks at: `[n, h, w, channels]`."""
    levels = pyramid(model.encoder)
    return keras.Model(model.input, levels[max(levels)])(images, training=False).numpy()


def enlarged(small: np.ndarray) -> np.ndarray:
    """A level on the film. Five strided convolutions that pad below and to the right look 15.5 pixels that way."""
    large = tf.image.resize(small[..., None], (SIZE, SIZE)).numpy()[..., 0]
    return np.pad(large, ((0, 0), (16, 0), (16, 0)), mode="edge")[:, :SIZE, :SIZE]


def test_with_a_linear_head_it_is_cam_without_negatives() -> None:
    """CAM is the sum of the channels, weighted as the class weighs their means; the mean's gradient adds 1 / (h w)."""
    model, images, explained = make(), films(), np.array([0, 1, 2, 1, 0])
    level = deepest(model, images)
    kernel = model.get_layer("logits").kernel.numpy()
    cam = np.einsum("nhwc,nc->nhw", level, kernel.T[explained])
    got = grad_cam(model)(images, explained).numpy()
    assert got.shape == (5, SIZE, SIZE)
    assert got.dtype == np.float32
    assert (cam < 0).any()
    assert (cam > 0).any()
    np.testing.assert_allclose(got, enlarged(np.maximum(cam, 0) / 9), rtol=1e-4, atol=1e-7)


def test_hidden_units_count_with_their_gradient_on_the_film_and_dropout_is_off() -> None:
    model, images, explained = make(hidden=16, dropout=0.5), films(), np.array([0, 1, 2, 1, 0])
    level = deepest(model, images)
    hidden, logits = model.get_layer("hidden"), model.get_layer("logits")
    active = hidden(level.mean((1, 2))).numpy() > 0
    slopes = (active * logits.kernel.numpy().T[explained]) @ hidden.kernel.numpy().T  # of the logit by the pooled level
    expected = np.maximum(np.einsum("nhwc,nc->nhw", level, slopes / 9), 0)
    explain = grad_cam(model)
    got = explain(images, explained).numpy()
    np.testing.assert_allclose(got, enlarged(expected), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(got, explain(images, explained).numpy())


@pytest.mark.parametrize("padding", ["one side", "both sides", "none"])
def test_the_map_lies_where_the_network_looks(padding: str) -> None:
    """Networks that only average, each another way: a bright dot is explained by itself, not by what is beside it."""
    image = keras.Input((None, None, 1), name="image")
    x, levels = Standardize(0.0, 255.0, multiple=32, name="standardize")(image), {}
    for stride in (2, 4, 8, 16, 32):
        if padding == "both sides":
            x = keras.layers.ZeroPadding2D(1, name=f"pad{stride}")(x)
        kind = {"one side": (3, "same"), "both sides": (3, "valid"), "none": (2, "valid")}[padding]
        x = keras.layers.Conv2D(1, kind[0], 2, kind[1], kernel_initializer="ones", name=f"conv{stride}")(x)
        levels[f"stride_{stride}"] = x
    model = cxr_tf.multitask(
        keras.Model(image, levels, name="averaging"), (256, 256, 1), 1, hidden=0, dropout=0, segmentation=False
    )
    model.get_layer("logits").kernel.assign([[1.0]])
    dots = np.zeros((3, 256, 256, 1), "float32")
    places = np.array([[100, 120], [143, 143], [160, 90]])
    dots[np.arange(3), places[:, 0], places[:, 1]] = 255
    for saliency, place in zip(saliency_of(model, dots), places, strict=True):
        center = [saliency.sum(axis=axis) @ np.arange(256) / saliency.sum() for axis in (1, 0)]
        # Without overlap a dot counts for one place alone, which is 32 pixels wide.
        np.testing.assert_allclose(center, place, atol=16 if padding == "none" else 8)


def test_each_film_is_explained_by_itself_in_batches_of_any_size() -> None:
    model, images = make(hidden=16, segmentation=True), films()
    explain = grad_cam(model)
    whole = explain(images, [0, 1, 2, 1, 0]).numpy()
    for i, c in enumerate([0, 1, 2, 1, 0]):
        np.testing.assert_allclose(explain(images[i : i + 1], [c]).numpy()[0], whole[i], rtol=1e-4, atol=1e-7)


def test_the_top_class_is_that_of_the_highest_logit() -> None:
    model, images = make(hidden=16), films()
    top = model(images, training=False)["logits"].numpy().argmax(1)
    explain = grad_cam(model)
    np.testing.assert_array_equal(explain(images, np.full(5, TOP)), explain(images, top))


def test_a_frozen_encoder_is_explained_alike() -> None:
    model, images = make(hidden=16), films()
    before = grad_cam(model)(images, [0, 1, 2, 1, 0]).numpy()
    model.freeze_encoder()
    np.testing.assert_array_equal(grad_cam(model)(images, [0, 1, 2, 1, 0]).numpy(), before)
    assert before.max() > 0


def test_mixed_precision_gives_float32_maps_close_to_those_of_float32() -> None:
    images = films()
    expected = saliency_of(make(hidden=16), images, [0, 1, 2, 1, 0])
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        got = saliency_of(make(hidden=16), images, [0, 1, 2, 1, 0])
    finally:
        keras.config.set_dtype_policy(policy)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=0.05)


def test_it_can_be_exported_and_gives_the_same(tmp_path) -> None:
    model, images = make(hidden=16, segmentation=True), films()
    explain = grad_cam(model)

    class Served(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 1], tf.float32, name="image")])
        def explain(self, image):
            return {"saliency": normalized(explain(image, tf.fill([tf.shape(image)[0]], TOP)))}

    served = Served()
    tf.saved_model.save(served, str(tmp_path / "saved"), signatures={"explain": served.explain})
    signature = tf.saved_model.load(str(tmp_path / "saved")).signatures["explain"]
    for batch in (images, images[:1]):
        got = signature(image=tf.constant(batch))["saliency"].numpy()
        np.testing.assert_allclose(got, saliency_of(model, batch), atol=1e-5)


def test_maps_for_pictures_have_a_maximum_of_one_or_are_empty() -> None:
    model, images = make(), films()
    maps = saliency_of(model, images, [0, 1, 2, 1, 0], batch_size=2)
    assert maps.shape == (5, SIZE, SIZE)
    raw = grad_cam(model)(images, [0, 1, 2, 1, 0]).numpy()
    highest = raw.max((1, 2), keepdims=True)
    assert (highest > 0).sum() == 4  # nothing on film 1 speaks for class 1
    np.testing.assert_allclose(maps, raw / np.where(highest > 0, highest, 1), rtol=1e-4, atol=1e-6)
    model.get_layer("logits").kernel.assign(-np.ones((8, 3)))  # everything speaks against every class
    assert (saliency_of(model, images) == 0).all()
    assert saliency_of(model, images[:0]).shape == (0, SIZE, SIZE)


def test_a_model_that_only_segments_has_no_class_to_explain() -> None:
    model = make(segmentation=True, classification=False)
    with pytest.raises(ModelError, match="takes a model with a classification head"):
        grad_cam(model)
    with pytest.raises(ModelError, match="counts layers from the logits"):
        randomized(model, 0, top=1)


def weights(model: keras.Model) -> dict[str, np.ndarray]:
    return {w.path: np.array(w) for w in model.weights}


def as_if_trained(model: keras.Model) -> keras.Model:
    for weight in model.weights:
        if "float" in weight.dtype:
            weight.assign(weight + 0.5)
    return model


def test_random_weights_are_a_function_of_the_seed_and_leave_the_model_alone() -> None:
    model = as_if_trained(make(hidden=16, dropout=0.5, segmentation=True))
    before, copies = weights(model), []
    for seed, elsewhere in ((1, 7), (1, 8), (2, 7)):
        keras.utils.set_random_seed(elsewhere)
        copies.append(weights(randomized(model, seed)))
    assert weights(model).keys() == before.keys()
    for path, value in weights(model).items():
        np.testing.assert_array_equal(value, before[path])
    for one, same, other in zip(*(copy.items() for copy in copies), strict=True):
        np.testing.assert_array_equal(one[1], same[1])
        if not one[0].endswith("step"):  # of the dropout
            assert not np.array_equal(one[1], before[one[0]]), one[0]
        if one[0].endswith("kernel"):
            assert not np.allclose(one[1], other[1]), one[0]
    kernels = [value for path, value in copies[0].items() if path.endswith("kernel")]
    assert len({value.ravel()[0] for value in kernels}) == len(kernels)  # not one draw for all


def test_cascading_randomization_starts_at_the_logits() -> None:
    model = as_if_trained(make(hidden=16, segmentation=True))
    before = weights(model)

    def changed(top: int) -> set[str]:
        now = weights(randomized(model, 0, top=top))
        return {path.split("/")[0] for path in now if not np.array_equal(now[path], before[path])}

    assert changed(0) == set()
    assert changed(1) == {"logits"}
    assert changed(2) == {"logits", "hidden"}
    assert changed(4) == {"logits", "hidden", "norm32", "conv32"}
    everything_below = {f"{kind}{stride}" for kind in ("norm", "conv") for stride in (2, 4, 8, 16, 32)}
    assert changed(99) == {"logits", "hidden"} | everything_below  # the decoder is on another way


def test_the_map_of_the_model_follows_its_weights() -> None:
    model, images = make(hidden=16), films()
    same = saliency_of(randomized(model, 0, top=0), images, [0] * 5)
    np.testing.assert_allclose(same, saliency_of(model, images, [0] * 5), atol=1e-6)
    assert np.abs(saliency_of(randomized(model, 0), images, [0] * 5) - same).max() > 0.1
