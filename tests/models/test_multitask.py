"""The two-headed model as a Keras user meets it: build, compile, fit, evaluate, predict, save, load."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import cxr_tf
from cxr_tf.models.encoders import pyramid
from cxr_tf.models.layers import ModelError, Standardize
from cxr_tf.models.normalization import normalization_layer
from cxr_tf.train import losses

NAN = float("nan")
SMALL = {"hidden": 16, "decoder_channels": (8, 8, 8, 8, 4)}


def tiny_encoder() -> keras.Model:
    """One convolution a level: what takes time in these tests is tracing."""
    image = keras.Input((None, None, 1), name="image")
    x, levels = Standardize(128.0, 64.0, multiple=32, name="standardize")(image), {}
    for stride in (2, 4, 8, 16, 32):
        x = keras.layers.Conv2D(8, 3, 2, padding="same", name=f"conv{stride}")(x)
        x = keras.layers.ReLU(name=f"relu{stride}")(normalization_layer("batch", 8, name=f"norm{stride}")(x))
        levels[f"stride_{stride}"] = x
    return keras.Model(image, levels, name="tiny")


def make(classes=3, encoder=None, **settings) -> cxr_tf.MultiTask:
    keras.utils.set_random_seed(0)
    return cxr_tf.multitask(encoder or tiny_encoder(), (32, 32, 1), classes, **(SMALL | settings))


def data(items: int = 8, classes: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 255, (items, 32, 32, 1)).astype("float32")
    labels = np.eye(classes, dtype="float32")[rng.integers(classes, size=items)]
    masks = rng.integers(0, 2, (items, 32, 32, 1)).astype("float32")
    return images, {"logits": labels, "mask_logits": masks}


def dataset(images, targets, batch_size: int = 4) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((images, targets)).batch(batch_size)


@pytest.fixture(scope="module")
def trained() -> cxr_tf.MultiTask:
    model = make(classes=["a", "b", "c"])
    model.compile(keras.optimizers.AdamW(1e-3))
    model.fit(dataset(*data()), verbose=0)
    return model


def test_it_is_one_flat_functional_graph_with_named_outputs_in_float32(trained):
    assert not any(isinstance(layer, keras.Model) for layer in trained.layers)
    assert {k: (v.shape, v.dtype) for k, v in trained.output.items()} == {
        "logits": ((None, 3), "float32"),
        "mask_logits": ((None, 32, 32, 1), "float32"),
    }
    assert trained.classes == ("a", "b", "c")
    plain = keras.Model(trained.inputs, trained.output)
    assert len(plain.weights) == len(trained.weights)


def test_fit_learns_and_reports_the_three_losses():
    images, targets = data(4)
    targets["mask_logits"] = (images > 128).astype("float32")
    model = make(dropout=0.0)
    model.compile(keras.optimizers.AdamW(1e-2))
    history = model.fit(dataset(images, targets), epochs=20, verbose=0).history
    assert set(history) == {"loss", "classification_loss", "segmentation_loss"}
    for values in history.values():
        assert values[-1] < 0.9 * values[0]


def test_evaluate_is_the_mean_over_known_items_whatever_the_batches(trained):
    images, targets = data(7)
    targets["logits"][[0, 3, 4]] = NAN
    targets["mask_logits"][[1, 4, 5, 6]] = NAN
    found = trained.evaluate(dataset(images, targets, 2), return_dict=True, verbose=0)
    whole = trained.evaluate(dataset(images, targets, 7), return_dict=True, verbose=0)
    outputs = trained.predict(images, verbose=0)
    one, known = losses.softmax_cross_entropy(targets["logits"], outputs["logits"])
    other, mask_known = losses.dice_cross_entropy(targets["mask_logits"], outputs["mask_logits"])
    for logs in (found, whole):
        np.testing.assert_allclose(logs["classification_loss"], np.sum(one) / np.sum(known), rtol=1e-5)
        np.testing.assert_allclose(logs["segmentation_loss"], np.sum(other) / np.sum(mask_known), rtol=1e-5)
    np.testing.assert_allclose(
        whole["loss"], 0.6 * whole["classification_loss"] + 0.4 * whole["segmentation_loss"], rtol=1e-5
    )


def test_saved_and_loaded_it_predicts_and_trains_on_as_before(trained, tmp_path):
    images, targets = data(4, seed=5)
    trained.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, cxr_tf.MultiTask)
    assert loaded.classes == trained.classes
    before, after = trained.predict(images, verbose=0), loaded.predict(images, verbose=0)
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)
    continued = [m.fit(dataset(images, targets), verbose=0).history for m in (trained, loaded)]
    assert continued[0] == continued[1]
    for a, b in zip(trained.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_settings_of_compile_come_back(tmp_path):
    model = make()
    settings = {
        "task": "multilabel",
        "head_weights": "uncertainty",
        "class_weights": [0.5, 1.0, 2.0],
        "label_smoothing": 0.1,
        "focal_gamma": 2.0,
    }
    model.compile(keras.optimizers.SGD(0.1), **settings)
    model.uncertainty.log_variance.assign([0.5, -0.5])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_compile_config() == model.get_compile_config()
    np.testing.assert_array_equal(loaded.uncertainty.log_variance, [0.5, -0.5])
    plain = keras.Model(model.inputs, model.output)
    assert not any("uncertainty" in w.path for w in plain.weights)
    keras.saving.load_model(tmp_path / "model.keras", compile=False).predict(data(1)[0], verbose=0)


def test_weights_go_into_the_plain_graph_and_back(trained, tmp_path):
    plain = keras.Model(trained.inputs, trained.output)
    plain.save_weights(tmp_path / "plain.weights.h5")
    other = make()
    other.load_weights(tmp_path / "plain.weights.h5", skip_mismatch=False)
    images = data(2)[0]
    np.testing.assert_array_equal(other(images)["logits"], trained(images)["logits"])


@pytest.mark.parametrize("head, other", [("classification", "segmentation"), ("segmentation", "classification")])
def test_either_head_can_be_left_out(head, other):
    key = {"classification": "logits", "segmentation": "mask_logits"}[head]
    model = make(classes=3 if head == "classification" else None, **{other: False})
    assert list(model.output) == [key]
    model.compile("adamw", run_eagerly=True)
    images, targets = data(4)
    history = model.fit(dataset(images, {key: targets[key]}), verbose=0).history
    assert set(history) == {"loss", f"{head}_loss"}
    np.testing.assert_allclose(history["loss"], history[f"{head}_loss"])  # a head alone has weight 1
    other_key = ({"logits", "mask_logits"} - {key}).pop()
    model.evaluate(dataset(images, targets), verbose=0)  # targets of the other head are ignored
    with pytest.raises(ModelError, match="Targets are a dictionary"):
        model.evaluate(dataset(images, {other_key: targets[other_key]}), verbose=0)


def test_targets_of_one_head_train_that_head_alone(trained):
    images, targets = data(4)
    model = make()
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    before = model.get_layer("mask_logits").get_weights()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        history = model.fit(dataset(images, {"logits": targets["logits"]}), verbose=0).history
    assert history["segmentation_loss"] == [0.0]
    np.testing.assert_allclose(history["loss"], 0.6 * np.array(history["classification_loss"]), rtol=1e-6)
    np.testing.assert_array_equal(model.get_layer("mask_logits").get_weights()[0], before[0])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda t: t["logits"], "Targets are a dictionary"),
        (lambda t: {}, "Targets are a dictionary|Received"),
        (lambda t: t | {"label": t["logits"]}, r"Received: \['label', 'logits', 'mask_logits'\]"),
        (lambda t: t | {"logits": np.argmax(t["logits"], -1)}, 'targets of "logits" have the shape'),
        (lambda t: t | {"mask_logits": t["mask_logits"][:, ::2]}, 'targets of "mask_logits" have the shape'),
    ],
)
def test_targets_that_do_not_fit_are_refused(trained, wrong, message):
    images, targets = data(4)
    trained.make_train_function(force=True)
    with pytest.raises(ModelError, match=message):
        trained.train_step((tf.constant(images), tf.nest.map_structure(tf.constant, wrong(targets))))
    with pytest.raises(ModelError, match="Sample weights"):
        trained.test_step((images, targets, np.ones(4)))


def test_the_encoder_comes_back_and_goes_into_another_model(tmp_path):
    images = data(2)[0]
    model = make(encoder="small_resnet")
    encoder = model.encoder
    assert sorted(pyramid(encoder)) == [2, 4, 8, 16, 32]
    encoder.save(tmp_path / "encoder.keras")
    other = make(encoder="small_resnet", weights=tmp_path / "encoder.keras")
    np.testing.assert_array_equal(other.encoder(images)["stride_32"], encoder(images)["stride_32"])
    encoder.get_layer("stem_conv").kernel.assign_add(tf.ones([3, 3, 1, 16]))
    np.testing.assert_array_equal(model.encoder(images)["stride_32"], encoder(images)["stride_32"])


def test_an_encoder_made_before_can_be_given():
    encoder = cxr_tf.encoder("small_resnet", normalization="group")
    model = cxr_tf.multitask(encoder, (64, 32, 1), 2, **SMALL)
    assert model.input_shape == (None, 64, 32, 1)
    images = np.random.default_rng(0).uniform(0, 255, (1, 64, 32, 1))
    np.testing.assert_array_equal(model.encoder(images)["stride_32"], encoder(images)["stride_32"])
    assert isinstance(model.encoder.get_layer("stem_norm"), keras.layers.GroupNormalization)
    with pytest.raises(ModelError, match="leave `weights` out"):
        cxr_tf.multitask(encoder, (64, 32, 1), 2, weights="imagenet")


def test_a_linear_probe_trains_the_head_alone():
    model = make(segmentation=False, hidden=0, dropout=0.0)
    model.freeze_encoder()
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    before = [w.numpy() for w in model.encoder.weights]
    images, targets = data(8)
    model.fit(dataset(images, {"logits": targets["logits"]}), verbose=0)
    assert [v.path for v in model.trainable_variables] == ["logits/kernel", "logits/bias"]
    for a, b in zip(before, model.encoder.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_running_averages_of_the_weights_end_up_in_the_model():
    model = make()
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), run_eagerly=True)
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(np.array(model.trainable_variables[0]))
    )
    model.fit(dataset(*data()), callbacks=[watch], verbose=0)
    np.testing.assert_allclose(model.trainable_variables[0], 0.5 * seen[0] + 0.5 * seen[1], rtol=1e-5, atol=1e-7)


def test_weights_and_dropout_are_repeatable():
    ends = []
    for _ in range(2):
        model = make(dropout=0.5)
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
        model.fit(dataset(*data()), epochs=2, verbose=0)
        ends.append(model.get_weights())
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"classes": None}, "classes is the number of classes, or their names"),
        ({"classes": 0}, "classes is the number"),
        ({"classification": False, "segmentation": False}, "at least one head"),
        ({"decoder_channels": (8, 4)}, "takes 5 channel numbers"),
        ({"normalization": "layer"}, "normalization is one of"),
    ],
)
def test_models_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "multi-class"}, 'Did you mean "multiclass"'),
        ({"head_weights": (1.0,)}, "two numbers"),
        ({"head_weights": (0.0, 0.0)}, "two numbers"),
        ({"head_weights": "uncertain"}, '"uncertainty". Received'),
        ({"class_weights": [1.0, 1.0]}, "class_weights are 3 numbers"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"focal_gamma": -1.0}, "focal_gamma"),
    ],
)
def test_settings_that_cannot_be_are_refused(trained, settings, message):
    with pytest.raises(ModelError, match=message):
        make().compile("adamw", **settings)
