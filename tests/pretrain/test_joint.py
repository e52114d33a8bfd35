"""Both tasks at once: the weighted sum of the two, on one encoder."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from cxr_tf.models.layers import ModelError, Standardize
from cxr_tf.models.normalization import normalization_layer
from cxr_tf.pretrain.inpainting import Inpainting
from cxr_tf.pretrain.joint import Joint
from cxr_tf.pretrain.moco import MoCo


def encoder(normalization: str = "group") -> keras.Model:
    image = keras.Input((32, 32, 1), name="image")
    x, levels = Standardize(128.0, 64.0, multiple=32, name="standardize")(image), {}
    for stride in (2, 4, 8, 16, 32):
        x = keras.layers.Conv2D(8, 3, 2, padding="same", name=f"conv{stride}")(x)
        x = keras.layers.ReLU(name=f"relu{stride}")(normalization_layer(normalization, 8, name=f"norm{stride}")(x))
        levels[f"stride_{stride}"] = x
    return keras.Model(image, levels, name="tiny")


def make(normalization: str = "group", adversarial: float = 0.0, weights=(1.0, 1.0), rate: float = 0.1) -> Joint:
    keras.utils.set_random_seed(0)
    base = encoder(normalization)
    joint = Joint(
        MoCo(base, dim=8, queue_size=20, momentum=0.9),
        Inpainting(base, decoder_channels=(8, 8, 4, 4, 4), adversarial=adversarial, normalization=normalization),
        weights,
    )
    joint.compile(keras.optimizers.SGD(rate))
    joint.optimizer.build(joint.trainable_variables)
    return joint


def films(step: int = 0, items: int = 8) -> dict[str, tf.Tensor]:
    random = np.random.default_rng(step)
    images = random.uniform(0, 255, (3, items, 32, 32, 1)).astype("float32")
    holes = np.zeros_like(images[0])
    holes[:, 8:20, 10:24] = 1.0
    data = {"query": images[0], "key": images[1], "image": images[2], "hole": holes}
    return {name: tf.constant(value) for name, value in data.items()}


def test_the_update_is_by_the_gradient_of_the_weighted_sum():
    joint = make(weights=(0.7, 3.0))
    data = films()
    variables = joint.trainable_variables
    with tf.GradientTape() as tape:
        shares = [
            model.pretext_loss(data, model.prepare(data, training=False), training=True)[0]
            for model in (joint.moco, joint.inpainting)
        ]
        total = 0.7 * shares[0] + 3.0 * shares[1]
    gradients = tape.gradient(total, variables)
    expected = [v - 0.1 * g for v, g in zip(variables, gradients, strict=True)]
    logs = joint.train_step(data)
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(np.array(variable), value, rtol=1e-4, atol=1e-6, err_msg=variable.path)
    assert float(logs["loss"]) == pytest.approx(float(total), rel=1e-5)
    assert float(logs["moco_loss"]) == pytest.approx(float(shares[0]), rel=1e-5)
    assert float(logs["inpainting_mse"]) == pytest.approx(float(shares[1]), rel=1e-5)
    assert int(joint.moco.pointer.numpy()) == 8


def test_the_encoder_is_one_and_each_variable_is_trained_once():
    joint = make()
    ids = [id(v) for v in joint.trainable_variables]
    assert len(ids) == len(set(ids))
    assert {id(v) for v in joint.encoder.trainable_variables} <= set(ids)
    assert not set(ids) & {id(v) for v in joint.moco.key.variables}


def test_a_weight_of_zero_leaves_a_task_out():
    joint = make(weights=(1.0, 0.0))
    decoder = [np.array(v) for v in joint.inpainting.reconstruction.get_layer("decoder_1_1_conv").weights]
    joint.train_step(films())
    after = joint.inpainting.reconstruction.get_layer("decoder_1_1_conv").weights
    for old, new in zip(decoder, after, strict=True):
        np.testing.assert_array_equal(old, np.array(new))


@pytest.mark.parametrize("adversarial", [0.0, 0.01])
def test_fit_save_and_load(tmp_path, adversarial):
    joint = make("batch", adversarial)
    joint.fit(tf.data.Dataset.from_tensors(films()).repeat(2), verbose=0)
    joint.save(tmp_path / "joint.keras")
    loaded = keras.saving.load_model(tmp_path / "joint.keras", safe_mode=True)
    assert loaded.moco.encoder is loaded.inpainting.encoder
    for a, b in zip(joint.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b), err_msg=a.path)
    logs = [model.train_step(films(1)) for model in (joint, loaded)]
    for name, value in logs[0].items():
        np.testing.assert_allclose(logs[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_two_encoders_are_refused():
    with pytest.raises(ModelError, match="one encoder"):
        Joint(MoCo(encoder(), dim=8, queue_size=8), Inpainting(encoder()))


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (-1.0, 1.0)])
def test_weights_that_make_no_sense_are_refused(weights):
    with pytest.raises(ModelError, match="weights are two numbers"):
        make(weights=weights)
