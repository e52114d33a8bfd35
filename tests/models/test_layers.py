from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from cxr_tf.models.layers import Dropout, ModelError, Standardize


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_standardize_sees_every_gray_level_under_every_policy(policy):
    layer = Standardize(128.0, 20.0, dtype=policy)
    levels = np.arange(256, dtype="float32").reshape(1, 16, 16, 1)
    found = layer(levels)
    assert found.dtype == layer.compute_dtype
    exact = tf.cast((levels - 128.0) / 20.0, layer.compute_dtype)
    np.testing.assert_allclose(tf.cast(found, tf.float32), tf.cast(exact, tf.float32), rtol=1e-2, atol=1e-4)
    assert Standardize.from_config(layer.get_config()).get_config() == layer.get_config()


def draw(layer: Dropout, shape=(64, 100)) -> np.ndarray:
    return np.asarray(layer(np.ones(shape, "float32"), training=True))


def test_dropout_keeps_its_share_and_the_mean():
    dropped = draw(Dropout(0.25, seed=3))
    assert abs((dropped == 0).mean() - 0.25) < 0.02
    np.testing.assert_allclose(dropped[dropped > 0], 1 / 0.75, rtol=1e-6)


def test_dropout_is_a_function_of_seed_name_and_step():
    first, again = Dropout(0.5, seed=1, name="a"), Dropout(0.5, seed=1, name="a")
    steps = [draw(first) for _ in range(3)]
    assert all(np.array_equal(draw(again), step) for step in steps)
    assert not np.array_equal(steps[0], steps[1])
    assert not np.array_equal(draw(Dropout(0.5, seed=-(2**40) + 2, name="a")), steps[0])
    assert not np.array_equal(draw(Dropout(0.5, seed=1, name="b")), steps[0])


def test_dropout_goes_on_from_a_checkpoint(tmp_path):
    layer = Dropout(0.5, name="a")
    draw(layer)
    path = tf.train.Checkpoint(layer=layer).save(str(tmp_path / "ckpt"))
    expected = draw(layer)
    restored = Dropout(0.5, name="a")
    restored.build((None, 100))
    tf.train.Checkpoint(layer=restored).restore(path).assert_consumed()
    np.testing.assert_array_equal(draw(restored), expected)


def test_dropout_does_nothing_outside_training_or_frozen():
    layer = Dropout(0.5)
    x = np.ones((4, 4), "float32")
    np.testing.assert_array_equal(layer(x), x)
    layer.trainable = False
    np.testing.assert_array_equal(layer(x, training=True), x)
    assert int(layer.step) == 0


def test_dropout_of_whole_images():
    found = draw(Dropout(0.5, noise_shape=(None, 1, 1, 1)), (32, 4, 4, 2))
    per_image = found.reshape(32, -1)
    assert (per_image == per_image[:, :1]).all()
    assert 0 < (per_image[:, 0] == 0).sum() < 32


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ModelError, match="dropout rate"):
        Dropout(rate)


def test_both_survive_a_model_file(tmp_path):
    image = keras.Input((4, 4, 1))
    model = keras.Model(image, Dropout(0.3, (None, 1, 1, 1), seed=5)(Standardize(3.0, 2.0, multiple=4)(image)))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.layers[1].get_config() == model.layers[1].get_config()
    assert loaded.layers[2].get_config() == model.layers[2].get_config()
