"""What is read from features: neighbors, linear probes, and paired comparisons."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import cxr_tf
from cxr_tf.evaluate.paired import paired_auroc
from cxr_tf.models.outputs import pooled_features
from cxr_tf.pretrain.features import ProbeError, features, linear_probe, neighbors, reader, thumbnails

NAN = float("nan")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 20), st.integers(0, 999))
def test_neighbors_equal_a_loop_written_by_hand(films, queries, k, seed):
    random = np.random.default_rng(seed)
    bank, asked = random.normal(size=(films, 4)), random.normal(size=(queries, 4))
    labels = random.choice([0.0, 1.0, NAN], size=(films, 3))
    found = neighbors(bank, labels, asked, k=k, temperature=0.5)
    assert found.shape == (queries, 3) and (found >= 0).all() and (found <= 1).all()
    for i, query in enumerate(asked):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-cosine)[:k]
        for c in range(3):
            voting = [j for j in nearest if not np.isnan(labels[j, c])]
            weights = [np.exp(cosine[j] / 0.5) for j in voting]
            share = np.dot(weights, labels[voting, c]) / sum(weights) if voting else 0.5
            assert found[i, c] == pytest.approx(share)


def _blobs(seed: int, films: int = 120, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    which = random.integers(classes, size=films)
    centers = 1.5 * np.random.default_rng(99).normal(size=(classes, 5))
    return centers[which] + random.normal(size=(films, 5)), np.eye(classes)[which]


def test_a_linear_probe_tells_classes_apart_and_ignores_unknown_labels():
    (x, y), (v, w), (t, u) = (_blobs(seed) for seed in range(3))
    x, y = np.concatenate([x, 1e3 * np.ones((5, 5))]), np.concatenate([y, np.full((5, 3), NAN)])
    said = linear_probe(x, y, v, w, "multiclass")(t)
    np.testing.assert_allclose(said.sum(axis=1), 1.0)
    assert roc_auc_score(u, said, average="macro") > 0.9


def test_a_multilabel_probe_takes_each_class_by_itself():
    (x, y), (v, w), (t, u) = (_blobs(seed) for seed in range(3))
    y[::2, 0] = NAN
    y[:, 2] = 1.0  # one outcome only: nothing can be said of it
    said = linear_probe(x, y, v, w, "multilabel")(t)
    np.testing.assert_array_equal(said[:, 2], 0.5)
    assert roc_auc_score(u[:, 0], said[:, 0]) > 0.9


def test_a_class_without_training_films_gets_nothing():
    x, y = _blobs(0)
    keep = y[:, 1] == 0
    v, w = _blobs(1)
    np.testing.assert_array_equal(linear_probe(x[keep], y[keep], v, w, "multiclass")(v)[:, 1], 0.0)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_one_class_only_is_refused(task):
    x, _ = _blobs(0)
    one = np.tile([1.0, 0.0, 0.0], (len(x), 1))
    with pytest.raises(ProbeError, match="nothing to tell apart"):
        linear_probe(x, one, x, one, task)


def test_paired_auroc_agrees_with_scikit_learn_and_pairs_the_draws():
    random = np.random.default_rng(0)
    y = random.integers(0, 2, (80, 2)).astype(float)
    noisy, worse = (y + spread * random.normal(size=y.shape) for spread in (0.6, 1.2))
    patients = np.arange(80) // 2
    scores = {"a": np.stack([noisy, worse]), "b": worse[None], "b again": worse[None]}
    found, differences = paired_auroc(scores, y, patients, against="b", replicates=300)
    both = [roc_auc_score(y, s, average="macro") for s in (noisy, worse)]
    assert found["a"].value == pytest.approx(np.mean(both))
    assert found["b"].value == pytest.approx(both[1])
    assert differences["a"].value == pytest.approx(np.mean(both) - both[1])
    assert differences["a"].low < differences["a"].value < differences["a"].high
    again = differences["b again"]
    assert (again.low, again.value, again.high) == (0.0, 0.0, 0.0)  # the same draws: no difference on any


def test_features_are_means_of_the_deepest_level_in_the_order_of_the_keys(journey):
    shards = cxr_tf.open_shards(journey / "shards")
    encoder = cxr_tf.encoder("small_resnet", (64, 64, 1))
    keys = np.array([5, 0, 3])
    found = features(reader(encoder), shards, keys, size=64, batch_size=2)
    films = cxr_tf.batches(shards, keys, size=64, batch_size=3, shuffle=False)
    images, _ = next(iter(films))
    expected = encoder(images)["stride_32"].numpy().mean(axis=(1, 2))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(pooled_features(encoder)(images)["features"], expected, atol=1e-5)
    small = thumbnails(shards, keys, size=8)
    assert small.shape == (3, 64) and small.min() >= 0 and small.max() <= 255
    assert keras.ops.convert_to_numpy(images).mean() == pytest.approx(small.mean(), rel=0.05)
