"""An encoder's features of films, and what can be read from them without training it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr_tf.data.pipeline import pretext_batches, read_batches
from cxr_tf.data.shards import ShardFolder
from cxr_tf.errors import CxrError
from cxr_tf.evaluate.calibration import Task
from cxr_tf.evaluate.metrics import auroc, macro
from cxr_tf.models.outputs import pooled_features
from cxr_tf.progress import Update, silent

NEIGHBORS, TEMPERATURE = 20, 0.07  # ImageNet probes take 200 neighbors; these sets are a hundredth of its size
STRENGTHS = tuple(10.0**power for power in range(-5, 2))  # inverse regularization; validation patients choose one


class ProbeError(CxrError):
    """A probe that cannot be made, or that would be judged on films it has seen."""


def reader(encoder: keras.Model) -> Callable[[Any], Any]:
    """A compiled function from films `[batch, size, size, 1]` to pooled features `[batch, channels]`, both float32.

    Make it once for a model that is read again and again while it trains.
    """
    model = pooled_features(encoder)
    shape = tf.TensorSpec(encoder.input.shape, tf.float32)  # any batch: one trace serves the last, shorter one, too
    return tf.function(lambda images: model(images, training=False)["features"], input_signature=[shape])


def features(
    read: Callable[[Any], Any],
    shards: ShardFolder,
    keys: np.ndarray,
    *,
    size: int,
    batch_size: int,
    update: Update = silent,
) -> np.ndarray:
    """Pooled features of films, as they are (no augmentation).

    Args:
        read: from `reader`.
        shards: where the films are.
        keys: integer `[n]`, which films.
        size: side of the encoder's input.
        batch_size: films at a time.
        update: shows progress.

    Returns:
        float32 `[n, channels]`.

    Example:
        >>> features(reader(encoder), shards, range(1000), size=320, batch_size=32).shape  # doctest: +SKIP
        (1000, 1024)
    """
    dataset = pretext_batches(
        shards, keys, size=size, batch_size=batch_size, make=lambda images, seed, places: images, shuffle=False
    )
    found: list[np.ndarray] = []
    for images in read_batches(dataset):
        found.append(read(images).numpy())
        update(sum(map(len, found)), len(keys))
    return np.concatenate(found)


def thumbnails(shards: ShardFolder, keys: np.ndarray, *, size: int) -> np.ndarray:
    """Films shrunk to a few pixels: float32 `[n, size * size]`, 0-255. Brightness and framing, and no more."""
    return features(lambda films: tf.reshape(films, [-1, size * size]), shards, keys, size=size, batch_size=64)


def neighbors(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, k: int = NEIGHBORS, temperature: float = TEMPERATURE
) -> np.ndarray:
    """What the nearest labeled films vote (Wu et al., arXiv:1805.01978): needs no fitting, so it is cheap on the way.

    Args:
        bank: `[n, channels]`, features of labeled films.
        labels: `[n, classes]`; 1, 0, NaN = unknown, which votes for nothing.
        queries: `[m, channels]`.
        k: neighbors that vote; fewer where the bank has fewer.
        temperature: a neighbor weighs exp(cosine / temperature).

    Returns:
        float64 `[m, classes]`, 0-1: the weighted share of the votes; 0.5 where no neighbor's label is known.

    Example:
        >>> neighbors(np.eye(2), np.eye(2), np.array([[2.0, 0.1]]), k=1)
        array([[1., 0.]])
    """
    bank, queries = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (bank, queries))
    cosine = queries @ bank.T
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    weights = np.exp((np.take_along_axis(cosine, nearest, axis=1) - 1.0) / temperature)[:, :, None]
    votes = np.asarray(labels, np.float64)[nearest]
    known = ~np.isnan(votes)
    total = np.sum(weights * known, axis=1)
    voted = np.sum(weights * np.where(known, votes, 0.0), axis=1)
    # All votes together may come to a bit more than their sum.
    return np.minimum(np.divide(voted, total, out=np.full(voted.shape, 0.5), where=total > 0), 1.0)


def linear_probe(
    train: np.ndarray, labels: np.ndarray, validation: np.ndarray, validation_labels: np.ndarray, task: Task
) -> Any:
    """Logistic regression on standardized features; its strength is the best one on validation films.

    Args:
        train: `[n, channels]`.
        labels: `[n, classes]`, 1, 0, NaN = unknown.
        validation: `[m, channels]`, of other patients.
        validation_labels: `[m, classes]`.
        task: "multiclass" (softmax) or "multilabel" (each class by itself).

    Returns:
        A function of features `[k, channels]` that gives scores in 0-1, float64 `[k, classes]`.

    Raises:
        ProbeError: when the films have one class only.
    """
    best: Any = None
    best_score = -np.inf
    for strength in STRENGTHS:
        fitted = _fit(train, labels, task, strength)
        score = macro(auroc(fitted(validation), validation_labels))
        if best is None or score > best_score:
            best, best_score = fitted, score
    return best


def _fit(x: np.ndarray, labels: np.ndarray, task: Task, strength: float) -> Any:
    def regression() -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))

    if task == "multiclass":
        known = ~np.isnan(labels).any(axis=1)
        truth = labels[known].argmax(axis=1)
        if len(np.unique(truth)) < 2:
            raise ProbeError("The labeled films have one class only, so there is nothing to tell apart.")
        fitted = regression().fit(x[known], truth)
        present = fitted[-1].classes_

        def multiclass(some: np.ndarray) -> np.ndarray:
            scores = np.zeros((len(some), labels.shape[1]))
            scores[:, present] = fitted.predict_proba(some)
            return scores

        return multiclass
    columns = []
    for c in range(labels.shape[1]):
        known = ~np.isnan(labels[:, c])
        both = len(np.unique(labels[known, c])) == 2
        columns.append(regression().fit(x[known], labels[known, c]) if both else None)
    if not any(columns):
        raise ProbeError("The labeled films have one outcome only of each class, so there is nothing to tell apart.")
    return lambda some: np.stack(
        [np.full(len(some), 0.5) if one is None else expit(one.decision_function(some)) for one in columns], axis=1
    )
