"""The contract that every encoder passes, the folding of RGB weights, and what is refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import cxr_tf
from cxr_tf.models import encoders
from cxr_tf.models.encoders import ENCODERS, MEAN, STD, fold_rgb, pyramid
from cxr_tf.models.layers import Dropout, ModelError, Standardize

CHANNELS = {
    "densenet121": (64, 256, 512, 1024, 1024),
    "resnet50v2": (64, 256, 512, 1024, 2048),
    "efficientnetv2b0": (16, 32, 48, 112, 1280),
    "mobilenetv3small": (16, 16, 24, 48, 576),
    "mobilenetv3large": (16, 24, 40, 112, 960),
    "small_resnet": (16, 24, 48, 96, 128),
}


def keras_cv_backbone(kind: str) -> keras.Model:
    models = pytest.importorskip("keras_cv").models
    settings = {"include_rescaling": False, "input_shape": (None, None, 1)}
    if kind == "keras_cv densenet":
        return models.DenseNetBackbone(stackwise_num_repeats=[1, 1, 1, 2], **settings)
    return models.ResNetV2Backbone(
        stackwise_filters=[16, 32, 48, 64], stackwise_blocks=[2, 2, 2, 2], stackwise_strides=[1, 2, 2, 2], **settings
    )


# Each of these takes more than ten seconds to build, save and load.
BIG = ("densenet121", "efficientnetv2b0", "mobilenetv3large")
FAST_AND_SLOW = [pytest.param(name, marks=pytest.mark.slow) if name in BIG else name for name in ENCODERS]


@pytest.fixture(scope="module", params=[*FAST_AND_SLOW, "keras_cv densenet", "keras_cv resnetv2"])
def model(request) -> keras.Model:
    keras.utils.set_random_seed(1)
    is_cv = request.param.startswith("keras_cv")
    return cxr_tf.encoder(keras_cv_backbone(request.param) if is_cv else request.param, (64, 64, 1))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 1)).astype("float32")


def test_pyramid_has_the_shapes_of_its_strides(model):
    levels = pyramid(model)
    assert set(levels) - {2} == {4, 8, 16, 32}
    assert all(level.shape[:3] == (None, 64 // stride, 64 // stride) for stride, level in levels.items())
    if model.name in CHANNELS:
        assert tuple(levels[stride].shape[3] for stride in (2, 4, 8, 16, 32)) == CHANNELS[model.name]


def test_image_is_one_channel_and_is_standardized_first(model):
    assert model.input_shape == (None, 64, 64, 1)
    assert model.input.name == "image"
    assert isinstance(model.layers[1], Standardize)
    assert (model.layers[1].mean, model.layers[1].std) == (MEAN, STD)
    assert not any(isinstance(layer, keras.Model) for layer in model.layers), "the graph is flat"
    assert not any(isinstance(layer, keras.layers.Dropout) for layer in model.layers), "its draws are not repeatable"
    drops = [layer for layer in model.layers if isinstance(layer, Dropout)]
    assert len(drops) == (15 if model.name == "efficientnetv2b0" else 0)
    assert all(layer.noise_shape == (None, 1, 1, 1) for layer in drops), "stochastic depth: whole images"


def test_every_trainable_weight_has_a_gradient(model, images):
    # Inference mode: a bias in front of a batch-norm over the batch has a gradient of zero by construction.
    weights = {int(k.split("_")[1]): np.random.default_rng(1).normal(size=v.shape[1:]) for k, v in model.output.items()}
    with tf.GradientTape() as tape:
        loss = sum(tf.reduce_sum(v * weights[int(k.split("_")[1])]) for k, v in model(images).items())
    gradients = tape.gradient(loss, model.trainable_variables)
    dead = [v.path for v, g in zip(model.trainable_variables, gradients, strict=True) if g is None or not np.any(g)]
    assert dead == []
    assert all(np.isfinite(g).all() for g in gradients)


def test_saved_and_loaded_it_gives_the_same(model, images, tmp_path):
    model.save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    before, after = model(images), loaded(images)
    assert loaded.name == model.name
    for stride, features in before.items():
        np.testing.assert_array_equal(after[stride], features)


@pytest.mark.parametrize("shape", [(65, 64, 1), (64, 33, 1), (16, 64, 1)])
@pytest.mark.parametrize("name", ENCODERS)
def test_odd_sizes_are_refused_with_the_nearest_that_are_not(name, shape):
    odd = next(side for side in shape if side % 32)
    nearest = {65: "64 or 96", 33: "32 or 64", 16: "32"}[odd]
    with pytest.raises(ModelError, match=f"multiples of 32.*{nearest}. Received: {odd}"):
        cxr_tf.encoder(name, shape)


def test_unknown_sizes_are_taken_and_checked_when_images_come():
    model = cxr_tf.encoder("small_resnet")
    assert model(np.zeros([1, 32, 96, 1]))["stride_32"].shape == (1, 1, 3, 128)
    with pytest.raises(ModelError, match="multiples of 32"):
        model(np.zeros([1, 48, 96, 1]))


def test_weights_come_from_the_global_seed():
    made = []
    for seed in (5, 5, 6):
        keras.utils.set_random_seed(seed)
        made.append(cxr_tf.encoder("small_resnet").get_weights())
    assert all(np.array_equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(made[0], made[2], strict=True))


@pytest.mark.parametrize("wrong", ["densnet121", "vgg16", 3])
def test_an_unknown_name_is_refused(wrong):
    with pytest.raises(ModelError, match=r"no such encoder. Accepted: densenet121.*Received: "):
        cxr_tf.encoder(wrong)


def test_three_channels_are_refused():
    with pytest.raises(ModelError, match="one channel"):
        cxr_tf.encoder("small_resnet", (64, 64, 3))


# ImageNet weights


def rgb_network(name: str) -> keras.Model:
    """The three-channel network of keras.applications with weights that a trained one could have."""
    keras.utils.set_random_seed(2)
    rgb = encoders._application(name, input_shape=(64, 64, 3))
    rng = np.random.default_rng(3)
    for layer in rgb.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            c = layer.gamma.shape[0]
            layer.set_weights([rng.uniform(low, high, c) for low, high in ((0.5, 1.5), (-1, 1), (-1, 1), (0.5, 1.5))])
        elif layer.weights and getattr(layer, "use_bias", False):
            layer.bias.assign(rng.normal(size=layer.bias.shape))
    return rgb


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("means", [(127.5, 127.5, 127.5), (150.0, 120.0, 90.0)])
def test_folding_is_exact_inside_and_everywhere_with_one_mean(use_bias, means):
    def network(channels: int, mean: float) -> keras.Model:
        image = keras.Input((16, 16, channels))
        x = Standardize(mean, 60.0)(image) if channels == 1 else image
        x = keras.layers.Conv2D(4, 3, 2, padding="same", use_bias=use_bias, name="first")(x)
        if not use_bias:
            x = keras.layers.BatchNormalization(name="norm")(x)
        return keras.Model(image, x)

    rng, stds = np.random.default_rng(0), (50.0, 60.0, 70.0)
    rgb, gray = network(3, 0.0), network(1, 127.5)
    rgb.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in rgb.weights])
    fold_rgb(rgb, gray, means, stds)
    image = rng.uniform(0, 255, (2, 16, 16, 1)).astype("float32")
    expected, found = rgb((image - np.array(means)) / np.array(stds)), gray(image)
    inside = slice(None) if means == (127.5, 127.5, 127.5) else slice(1, -1)
    np.testing.assert_allclose(found[:, inside, inside], expected[:, inside, inside], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [param for param in FAST_AND_SLOW if param != "small_resnet"])
def test_folded_weights_give_what_the_rgb_network_gives_for_a_gray_image(name):
    rgb = rgb_network(name)
    means, stds = encoders._APPLICATIONS[name].imagenet
    gray = encoders._build(name, (64, 64, 1), "batch", 0, mean=float(np.mean(means)), std=float(np.mean(stds)))
    fold_rgb(rgb, gray, means, stds)

    image = np.random.default_rng(4).uniform(0, 255, (1, 64, 64, 1)).astype("float32")
    standardized = ((image - np.array(means)) / np.array(stds)).astype("float32")
    level = encoders._APPLICATIONS[name].levels[0]
    stem = keras.Model(rgb.input, {"stem": rgb.get_layer(level).output, "last": rgb.output})
    expected, found = stem(standardized), gray(image)
    # Five pixels from the border, which the two pad with slightly different grays where the means differ by channel.
    inside = slice(5, -5)
    np.testing.assert_allclose(
        found["stride_2"][:, inside, inside], expected["stem"][:, inside, inside], rtol=1e-3, atol=1e-3
    )
    if len(set(means)) == 1:
        scale = np.abs(expected["last"]).max()
        np.testing.assert_allclose(found["stride_32"] / scale, expected["last"] / scale, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "small_resnet"])
def test_imagenet_constants_are_those_of_keras(name):
    means, stds = encoders._APPLICATIONS[name].imagenet
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 4, 4, 3)).astype("float32")
    if name.startswith("mobilenet"):  # their preprocessing is a layer of the network
        expected = pixels / 127.5 - 1
    elif name.startswith("efficientnet"):  # likewise, for the B networks torchvision's
        expected = keras.applications.imagenet_utils.preprocess_input(pixels.copy(), mode="torch")
    else:
        module = {"densenet121": keras.applications.densenet, "resnet50v2": keras.applications.resnet_v2}[name]
        expected = module.preprocess_input(pixels.copy())
    np.testing.assert_allclose((pixels - np.array(means)) / np.array(stds), expected, atol=2e-3)


def test_imagenet_weights_are_fetched_by_keras_and_folded(monkeypatch):
    rgb, build = rgb_network("mobilenetv3small"), encoders._application

    def application(name, **settings):
        return rgb if settings.get("weights") == "imagenet" else build(name, **settings)

    monkeypatch.setattr(encoders, "_application", application)
    model = cxr_tf.encoder("mobilenetv3small", (64, 64, 1), weights="imagenet")
    assert (model.layers[1].mean, model.layers[1].std) == (127.5, 127.5)
    expected = np.sum(rgb.get_layer("conv").kernel, axis=2, keepdims=True)
    np.testing.assert_allclose(model.get_layer("conv").kernel, expected, atol=1e-6)


def test_no_network_is_said_in_words(monkeypatch):
    def fail(*args, **kwargs):
        raise Exception("URL fetch failure")

    monkeypatch.setattr("keras.src.utils.file_utils.get_file", fail)
    with pytest.raises(ModelError, match="ImageNet weights of mobilenetv3small could not be fetched"):
        cxr_tf.encoder("mobilenetv3small", weights="imagenet")


def test_small_resnet_has_no_imagenet_weights():
    with pytest.raises(ModelError, match="There are ImageNet weights for densenet121"):
        cxr_tf.encoder("small_resnet", weights="imagenet")


# Weights saved by us


def test_weights_of_a_saved_encoder_come_with_their_constants(images, tmp_path):
    saved = encoders._build("small_resnet", (64, 64, 1), "batch", 0, mean=100.0, std=50.0)
    saved.save(tmp_path / "encoder.keras")
    model = cxr_tf.encoder("small_resnet", (None, None, 1), weights=tmp_path / "encoder.keras", normalization="batch")
    assert (model.layers[1].mean, model.layers[1].std) == (100.0, 50.0)
    for stride, features in saved(images).items():
        np.testing.assert_array_equal(model(images)[stride], features)
    cxr_tf.encoder("small_resnet", weights=tmp_path / "encoder.keras", normalization="synchronized")
    with pytest.raises(ModelError, match="GroupNorm and batch-norm"):
        cxr_tf.encoder("small_resnet", weights=tmp_path / "encoder.keras", normalization="group")


def test_files_that_are_no_such_encoder_are_refused(tmp_path):
    cxr_tf.encoder("small_resnet").save(tmp_path / "encoder.keras")
    with pytest.raises(ModelError, match=r'holds the encoder "small_resnet"\. Received: encoder "mobilenetv3small"'):
        cxr_tf.encoder("mobilenetv3small", weights=tmp_path / "encoder.keras")
    image = keras.Input((8, 8, 1))
    keras.Model(image, keras.layers.Flatten()(image)).save(tmp_path / "other.keras")
    with pytest.raises(ModelError, match="no encoder of ours"):
        cxr_tf.encoder("small_resnet", weights=tmp_path / "other.keras")
    (tmp_path / "broken.keras").write_bytes((tmp_path / "encoder.keras").read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"broken.keras: is cut off"):
        cxr_tf.encoder("small_resnet", weights=tmp_path / "broken.keras")
    for missing, problem in (
        ("imagenette", "no .keras"),
        (tmp_path / "none.keras", "not exist"),
        (tmp_path, "no .keras"),
    ):
        with pytest.raises(ModelError, match=f"{problem}.*encoder saved by us"):
            cxr_tf.encoder("small_resnet", weights=missing)


def test_a_file_with_code_in_it_is_not_run(tmp_path):
    image = keras.Input((64, 64, 1), name="image")
    keras.Model(image, {"stride_2": keras.layers.Lambda(lambda x: x)(image)}).save(tmp_path / "code.keras")
    with pytest.raises(ModelError, match="cannot be read"):
        cxr_tf.encoder("small_resnet", weights=tmp_path / "code.keras")


# Backbones of keras-cv


def test_a_backbone_keeps_its_weights(images):
    backbone = keras_cv_backbone("keras_cv densenet")
    model = cxr_tf.encoder(backbone, (64, 64, 1))
    expected = backbone((images - MEAN) / STD)
    np.testing.assert_allclose(model(images)["stride_32"], expected, rtol=1e-4, atol=1e-5)


def test_backbones_that_do_not_fit_are_refused():
    cv = pytest.importorskip("keras_cv").models
    repeats = {"stackwise_num_repeats": [1, 1, 1, 1]}
    with pytest.raises(ModelError, match="one channel"):
        cxr_tf.encoder(cv.DenseNetBackbone(include_rescaling=False, input_shape=(64, 64, 3), **repeats))
    with pytest.raises(ModelError, match="include_rescaling=False"):
        cxr_tf.encoder(cv.DenseNetBackbone(include_rescaling=True, input_shape=(64, 64, 1), **repeats))
    image = keras.Input((64, 64, 1))
    with pytest.raises(ModelError, match="names its feature pyramid"):
        cxr_tf.encoder(keras.Model(image, keras.layers.Conv2D(2, 3)(image)))
    backbone = cv.DenseNetBackbone(include_rescaling=False, input_shape=(64, 64, 1), **repeats)
    with pytest.raises(ModelError, match="brings its own weights"):
        cxr_tf.encoder(backbone, weights="imagenet")


def test_a_backbone_with_pyramid_outputs_is_an_encoder_too(images):
    """keras-hub's form, without keras-hub."""
    base = keras_cv_backbone("keras_cv resnetv2")
    backbone = keras.Model(base.input, base.output)
    backbone.pyramid_outputs = {k: base.get_layer(v).output for k, v in base.pyramid_level_inputs.items()}
    assert sorted(pyramid(cxr_tf.encoder(backbone, (64, 64, 1)))) == [4, 8, 16, 32]
