"""Losses against hand-written loops, closed forms and Keras; unknown items never count."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_tf.train import losses

NAN = float("nan")


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def batch(items: int, classes: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (items, classes)).astype("float32")
    one_hot = np.eye(classes, dtype="float32")[rng.integers(classes, size=items)]
    many_hot = rng.integers(0, 2, (items, classes)).astype("float32")
    return logits, one_hot, many_hot


@pytest.mark.parametrize("items, classes", [(0, 4), (1, 1), (1, 2), (5, 4)])
@pytest.mark.parametrize("smoothing, gamma", [(0.0, 0.0), (0.1, 0.0), (0.0, 2.0), (0.1, 0.5)])
def test_softmax_cross_entropy_is_the_loop(items, classes, smoothing, gamma):
    logits, labels, _ = batch(items, classes)
    weights = np.linspace(0.2, 1.7, classes)
    expected = []
    for z, y in zip(logits.astype("float64"), labels, strict=True):
        p, loss = softmax(z), 0.0
        for c in range(classes):
            target = y[c] * (1 - smoothing) + smoothing / classes
            loss -= weights[c] * target * max(1 - p[c], 1e-7) ** gamma * math.log(p[c])
        expected.append(loss)
    loss, known = losses.softmax_cross_entropy(
        labels, logits, class_weights=list(weights), label_smoothing=smoothing, focal_gamma=gamma
    )
    np.testing.assert_allclose(loss, np.array(expected), rtol=1e-5, atol=1e-6)
    assert known.numpy().tolist() == [1.0] * items


@pytest.mark.parametrize("items, classes", [(0, 3), (1, 1), (5, 3)])
@pytest.mark.parametrize("smoothing, gamma", [(0.0, 0.0), (0.1, 0.0), (0.0, 2.0), (0.1, 0.5)])
def test_sigmoid_cross_entropy_is_the_loop(items, classes, smoothing, gamma):
    logits, _, labels = batch(items, classes)
    weights = np.linspace(0.2, 1.7, classes)
    expected = np.zeros((items, classes))
    for i in range(items):
        for c in range(classes):
            p, y = sigmoid(float(logits[i, c])), labels[i, c] * (1 - smoothing) + smoothing / 2
            expected[i, c] = -weights[c] * (y * (1 - p) ** gamma * math.log(p) + (1 - y) * p**gamma * math.log(1 - p))
    loss, known = losses.sigmoid_cross_entropy(
        labels, logits, class_weights=list(weights), label_smoothing=smoothing, focal_gamma=gamma
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    assert known.shape == (items, classes)


def test_classification_losses_are_those_of_keras():
    logits, one_hot, many_hot = batch(7, 4)
    per_item = {"from_logits": True, "reduction": None}
    loss, _ = losses.softmax_cross_entropy(one_hot, logits, label_smoothing=0.1)
    expected = keras.losses.CategoricalCrossentropy(label_smoothing=0.1, **per_item)(one_hot, logits)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    loss, _ = losses.softmax_cross_entropy(one_hot, logits, focal_gamma=2.0)
    expected = keras.losses.CategoricalFocalCrossentropy(alpha=1.0, gamma=2.0, **per_item)(one_hot, logits)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    loss, _ = losses.sigmoid_cross_entropy(many_hot, logits, label_smoothing=0.1)
    expected = keras.losses.BinaryCrossentropy(label_smoothing=0.1, **per_item)(many_hot, logits)
    np.testing.assert_allclose(tf.reduce_mean(loss, -1), expected, rtol=1e-5)
    loss, _ = losses.sigmoid_cross_entropy(many_hot, logits, focal_gamma=2.0)
    expected = keras.losses.BinaryFocalCrossentropy(gamma=2.0, **per_item)(many_hot, logits)
    np.testing.assert_allclose(tf.reduce_mean(loss, -1), expected, rtol=1e-4)


def test_mask_losses_are_those_of_keras():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 4, 1)).astype("float32")
    masks = rng.integers(0, 2, (3, 5, 4, 1)).astype("float32")
    dice, _ = losses.soft_dice(masks, logits, smooth=0.0)
    expected = keras.losses.Dice(axis=(1, 2, 3), reduction=None)(masks, tf.sigmoid(logits))
    np.testing.assert_allclose(dice, expected, rtol=1e-5)
    pixels, _ = losses.pixel_cross_entropy(masks, logits)
    expected = keras.losses.BinaryCrossentropy(from_logits=True, reduction=None, axis=(1, 2, 3))(masks, logits)
    np.testing.assert_allclose(pixels, expected, rtol=1e-5)
    both, known = losses.dice_cross_entropy(masks, logits, smooth=0.0)
    np.testing.assert_allclose(both, dice + pixels, rtol=1e-6)
    assert known.numpy().tolist() == [1, 1, 1]


def test_closed_forms():
    for classes in (1, 2, 7):
        loss, _ = losses.softmax_cross_entropy(np.eye(classes), np.zeros((classes, classes)))
        np.testing.assert_allclose(loss, np.log(classes), rtol=1e-6)
    loss, _ = losses.sigmoid_cross_entropy([[1.0, 0.0]], [[0.0, 0.0]])
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    loss, _ = losses.sigmoid_cross_entropy([[1.0]], [[0.0]], focal_gamma=2.0)
    np.testing.assert_allclose(loss, np.log(2) / 4, rtol=1e-6)
    # Half of four pixels, all said to be inside: 1 - 2 * 2 / (4 + 2), smoothed by 1: 1 - 5 / 7.
    mask = np.reshape([1.0, 1.0, 0.0, 0.0], (1, 2, 2, 1))
    dice, _ = losses.soft_dice(mask, np.full((1, 2, 2, 1), 100.0))
    np.testing.assert_allclose(dice, 1 - 5 / 7, rtol=1e-6)
    empty, _ = losses.soft_dice(np.zeros((1, 2, 2, 1)), np.full((1, 2, 2, 1), -100.0))
    np.testing.assert_allclose(empty, 0.0, atol=1e-6)


@pytest.mark.parametrize("extreme", [-1e4, -80.0, 80.0, 1e4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_have_finite_losses_and_gradients(extreme, gamma):
    for loss_function in (losses.softmax_cross_entropy, losses.sigmoid_cross_entropy):
        logits = tf.Variable([[extreme, 0.0], [0.0, extreme]])
        with tf.GradientTape() as tape:
            loss, _ = loss_function([[1.0, 0.0], [1.0, 0.0]], logits, focal_gamma=gamma)
        assert np.isfinite(loss).all()
        assert np.isfinite(tape.gradient(loss, logits)).all()
    logits = tf.Variable(tf.fill([1, 2, 2, 1], extreme))
    with tf.GradientTape() as tape:
        loss, _ = losses.dice_cross_entropy(tf.ones([1, 2, 2, 1]), logits)
    assert np.isfinite(loss).all()
    assert np.isfinite(tape.gradient(loss, logits)).all()


def test_half_precision_logits_are_computed_in_float32():
    logits, one_hot, many_hot = batch(4, 3)
    for function, labels in ((losses.softmax_cross_entropy, one_hot), (losses.sigmoid_cross_entropy, many_hot)):
        loss, known = function(labels, tf.cast(logits, tf.float16))
        assert loss.dtype == known.dtype == tf.float32


def mean_and_gradient(function, labels, logits, **settings):
    logits = tf.Variable(logits)
    with tf.GradientTape() as tape:
        mean, count = losses.masked_mean(*function(labels, logits, **settings))
    return mean.numpy(), tape.gradient(mean, logits).numpy(), count.numpy()


LOSSES = {
    "softmax": (losses.softmax_cross_entropy, {"label_smoothing": 0.1, "focal_gamma": 0.5}),
    "sigmoid": (losses.sigmoid_cross_entropy, {"label_smoothing": 0.1, "focal_gamma": 0.5}),
    "mask": (losses.dice_cross_entropy, {}),
}


def items_of(name: str, known: list[bool], seed: int):
    rng = np.random.default_rng(seed)
    shape = (len(known), 2, 3, 1) if name == "mask" else (len(known), 3)
    logits = rng.normal(size=shape).astype("float32")
    labels = np.eye(3, dtype="float32")[rng.integers(3, size=len(known))] if name == "softmax" else None
    if labels is None:
        labels = rng.integers(0, 2, shape).astype("float32")
    labels[~np.array(known)] = NAN
    return labels, logits


@pytest.mark.parametrize("name", LOSSES)
@given(known=st.lists(st.booleans(), min_size=1, max_size=6), seed=st.integers(0, 99), junk=st.floats(-1e30, 1e30))
@settings(max_examples=25, deadline=None)
def test_unknown_items_change_nothing(name, known, seed, junk):
    function, options = LOSSES[name]
    known_rows = np.array(known)
    labels, logits = items_of(name, known, seed)
    logits[~known_rows] = junk
    mean, gradient, count = mean_and_gradient(function, labels, logits, **options)
    alone, alone_gradient, _ = mean_and_gradient(function, labels[known_rows], logits[known_rows], **options)
    np.testing.assert_allclose(mean, alone, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient[known_rows], alone_gradient, rtol=1e-5, atol=1e-7)
    assert (gradient[~known_rows] == 0).all()
    assert count == known_rows.sum() * (3 if name == "sigmoid" else 1)


@pytest.mark.parametrize("name", LOSSES)
@given(order=st.permutations(range(5)), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_order_of_the_items_changes_nothing(name, order, seed):
    function, options = LOSSES[name]
    labels, logits = items_of(name, [True, False, True, True, True], seed)
    loss, known = function(labels, logits, **options)
    moved, moved_known = function(labels[list(order)], logits[list(order)], **options)
    np.testing.assert_allclose(moved, loss.numpy()[list(order)], rtol=1e-6)
    np.testing.assert_array_equal(moved_known, known.numpy()[list(order)])


@given(bad=st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=15, deadline=None)
def test_single_labels_of_a_multilabel_row_can_be_unknown(bad):
    logits, _, labels = batch(2, 3)
    bad = np.reshape(bad, (2, 3))
    complete, _ = losses.sigmoid_cross_entropy(labels, logits)
    loss, known = losses.sigmoid_cross_entropy(np.where(bad, NAN, labels), logits)
    np.testing.assert_array_equal(known, ~bad)
    np.testing.assert_allclose(loss, np.where(bad, 0, complete), rtol=1e-6)


def test_a_row_with_one_nan_is_an_unknown_class_and_an_image_with_one_nan_an_unknown_mask():
    _, known = losses.softmax_cross_entropy([[NAN, 0.0], [1.0, 0.0]], np.zeros((2, 2)))
    assert known.numpy().tolist() == [0, 1]
    masks = np.zeros((2, 4, 4, 1))
    masks[0, 1, 2] = NAN
    assert losses.soft_dice(masks, np.zeros((2, 4, 4, 1)))[1].numpy().tolist() == [0, 1]


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_known_is_a_loss_of_zero_with_a_gradient_of_zero(name):
    function, options = LOSSES[name]
    labels, logits = items_of(name, [False, False], 0)
    mean, gradient, count = mean_and_gradient(function, labels, logits, **options)
    assert (mean, count) == (0.0, 0.0)
    assert (gradient == 0).all()
