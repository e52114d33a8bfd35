"""Momentum contrast: two views of one film shall be told from the films in a queue (He et al., CVPR 2020)."""

from __future__ import annotations

import math
from typing import Any, Literal

import keras
import tensorflow as tf

from cxr_tf.models.encoders import pyramid
from cxr_tf.models.layers import ModelError
from cxr_tf.models.normalization import BatchNormalization, copy_model
from cxr_tf.pretrain.pretext import PretextModel
from cxr_tf.train.losses import masked_mean, sum_over_replicas


@keras.saving.register_keras_serializable("cxr_tf")
class MoCo(PretextModel):
    """Trains an encoder by momentum contrast (MoCo: arXiv:1911.05722; v2: arXiv:2003.04297).

    The query network is the encoder with a projection head; the key network is a running average of it and sees the
    other view. A query shall be closer to its key than to the keys in the queue, which come from earlier batches.
    Defaults are those of MoCo-CXR (Sowrirajan et al., MIDL 2021).

    Batch-norm lets a network cheat: films that are normalized together leave a trace in each other, by which a query
    finds its key. So that no query is normalized with the companions of its key, keys are permuted over the whole
    global batch before their forward pass and put back after, and statistics are those of small parts of it: of each
    replica's batch, or, where there are fewer replicas than `parts`, of parts of that. GroupNorm needs none of this.

    Data are dictionaries of "query" and "key": two views of the same films, `[batch, size, size, 1]`, 0-255, as
    `cxr_tf.data.views.Views` draws them. Logged are "loss", "relative_loss" (divided by log(K + 1), what guessing among
    key and queue costs), "top1" (share of queries whose key is closer than the whole queue) and "spread" (√d times the
    standard deviation of the unit embeddings, mean over their d dimensions: near 1 when they fill the sphere, 0 when
    all are one).

    Args:
        encoder: From `cxr_tf.encoder`. Its very layers are trained, so this object is the result; to go on with it,
            save it, or give it to `cxr_tf.multitask`, which copies it.
        dim: Length of an embedding.
        queue_size: Keys in the queue, K.
        temperature: τ, which cosines are divided by.
        momentum: Part of the key network that a step keeps.
        momentum_steps: Over so many steps the momentum rises to 1, along half a cosine (Grill et al. 2020); None
            keeps it.
        head: "v2": two layers, ReLU between them; "v1": one.
        symmetric: True lets each view be query and key once (Chen et al., arXiv:2104.02057); twice the work a step.
        parts: Least number of parts of the global batch with batch-norm statistics of their own.
        shuffle: False leaves the keys where they are, to show what that does.
        seed: Of the first queue and the permutations. The head is drawn from Keras' global seed.
        name: Of the model.

    Raises:
        ModelError: For an encoder that is not ours or has synchronized batch-norm, a setting out of its range, or a
            batch too small for its parts.

    Example:
        >>> moco = cxr_tf.MoCo(cxr_tf.encoder("densenet121", (320, 320, 1), weights="imagenet"))
        >>> moco.compile(keras.optimizers.AdamW(1e-4))
        >>> moco.fit(dataset)  # of {"query": images, "key": images}
        >>> moco.encoder.save("encoder.keras")
    """

    def __init__(
        self,
        encoder: keras.Model,
        *,
        dim: int = 128,
        queue_size: int = 24_576,
        temperature: float = 0.2,
        momentum: float = 0.999,
        momentum_steps: int | None = None,
        head: Literal["v1", "v2"] = "v2",
        symmetric: bool = False,
        parts: int = 4,
        shuffle: bool = True,
        seed: int = 0,
        name: str = "moco",
    ):
        super().__init__(("relative_loss", "top1", "spread"), name)
        _check(dim, queue_size, temperature, momentum, momentum_steps, head, parts)
        self.encoder = encoder
        self.dim, self.queue_size, self.temperature = int(dim), int(queue_size), float(temperature)
        self.momentum, self.momentum_steps, self.head = float(momentum), momentum_steps, head
        self.symmetric, self.parts, self.shuffle, self.seed = bool(symmetric), int(parts), bool(shuffle), int(seed)

        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        embedding = self._project(encoder)
        self.query = keras.Model(encoder.input, embedding, name="query")
        self.key = copy_model(self.query, lambda layer: None)
        self.key.name = "key"
        self._own_parts = 1
        if _norm_layers(self.query):
            own = -(-self.parts // replicas)
            # The two views of a film, one behind the other in each half of a batch, are never in one part.
            self._own_parts = own + own % 2 if self.symmetric else own
        for layer in (*_norm_layers(self.query), *_norm_layers(self.key)):
            layer.parts = self._own_parts
        for variable in self.key.variables:
            variable.trainable = False  # the layers stay trainable, for batch-norm in training mode
        self._pairs = [
            (mine, theirs)
            for layer in self.query.layers
            for mine, theirs in zip(self.key.get_layer(layer.name).weights, layer.weights, strict=True)
            if theirs.trainable
        ]
        self.queue = self.add_weight(
            name="queue", shape=(self.queue_size, self.dim), initializer=self._random_directions, trainable=False
        )
        self.pointer = self._counter("pointer")
        self.step = self._counter("step")
        self.built = True

    def call(self, images: Any, training: bool = False) -> Any:
        """Unit embeddings `[batch, dim]`, float32, of the query network."""
        return self.query(images, training=training)

    @property
    def trained(self) -> list[keras.Variable]:
        """Encoder and head; the key network follows them by the momentum alone."""
        return self.query.trainable_variables

    def prepare(self, data: Any, training: bool) -> tuple[Any, Any]:
        """Moves the key network and embeds the keys.

        Returns:
            The query images of this replica and their keys, float32 `[batch, dim]`.
        """
        queries, others = _views(data)
        if self.symmetric:
            queries, others = tf.concat([queries, others], 0), tf.concat([others, queries], 0)
        if training and others.shape[0] is not None:
            self.check_batch(others.shape[0] // (2 if self.symmetric else 1))
        if training:
            self._follow()
        return queries, self._keys(others, training)

    @property
    def least_batch(self) -> int:
        """Two images in each part of the batch, of which symmetric training has two views."""
        if not _norm_layers(self.query):
            return 1
        return self._own_parts if self.symmetric else 2 * self._own_parts

    def pretext_loss(self, data: Any, prepared: Any, training: bool) -> tuple[Any, dict[str, Any], Any]:
        """InfoNCE of this replica's queries; see `PretextModel`."""
        images, keys = prepared
        queries = self.query(images, training=training)
        loss, hits = info_nce(queries, keys, tf.convert_to_tensor(self.queue), self.temperature)
        share, count = masked_mean(loss, tf.ones_like(loss))
        sums = [tf.stack([share, tf.reduce_sum(hits) / count])]
        sums += [tf.reduce_sum(moment, axis=0) / count for moment in (queries, tf.square(queries))]
        means = sum_over_replicas(tf.concat(sums, axis=0))
        first, second = means[2 : 2 + self.dim], means[2 + self.dim :]
        deviation = tf.sqrt(tf.maximum(second - tf.square(first), 0.0))
        return (
            share,
            {
                "loss": means[0],
                "relative_loss": means[0] / math.log(self.queue_size + 1),
                "top1": means[1],
                "spread": math.sqrt(self.dim) * tf.reduce_mean(deviation),
            },
            None,
        )

    def finish(self, data: Any, prepared: Any, outputs: Any) -> None:
        """The keys of all replicas replace the oldest in the queue."""
        keys = prepared[1]
        if self.symmetric:  # film by film, so that the queue does not depend on how films are divided among replicas
            keys = tf.reshape(tf.stack(tf.split(keys, 2), axis=1), [-1, self.dim])
        keys = _gather(keys, self.pointer)[-self.queue_size :]
        count = tf.shape(keys, out_type=tf.int64)[0]
        pointer = tf.convert_to_tensor(self.pointer)
        rows = (pointer + tf.range(count)) % self.queue_size
        self.queue.assign(tf.tensor_scatter_nd_update(tf.convert_to_tensor(self.queue), rows[:, None], keys))
        self.pointer.assign((pointer + count) % self.queue_size)
        self.step.assign(tf.convert_to_tensor(self.step) + 1)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        settings = ("dim", "queue_size", "temperature", "momentum", "momentum_steps", "head", "symmetric", "parts")
        return {
            "encoder": keras.saving.serialize_keras_object(self.encoder),
            **{name: getattr(self, name) for name in (*settings, "shuffle", "seed", "name")},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> MoCo:
        """The model that `get_config` describes."""
        encoder = keras.saving.deserialize_keras_object(config["encoder"], custom_objects=custom_objects)
        return cls(encoder, **{key: value for key, value in config.items() if key != "encoder"})

    def _project(self, encoder: keras.Model) -> keras.KerasTensor:
        levels = pyramid(encoder)
        deepest = levels[max(levels)]
        for layer in encoder.layers:
            if isinstance(layer, keras.layers.BatchNormalization) and (
                layer.synchronized or not isinstance(layer, BatchNormalization)
            ):
                raise ModelError(
                    "MoCo hides from each other which films are normalized together, which synchronized batch-norm "
                    'undoes: make the encoder with `cxr_tf.encoder(..., normalization="batch")` or "group". '
                    f"Received: {layer.name}, synchronized={layer.synchronized}"
                )
        x = keras.layers.GlobalAveragePooling2D(dtype="float32", name="pooled")(deepest)
        if self.head == "v2":
            width = deepest.shape[-1]
            x = keras.layers.Dense(width, activation="relu", dtype="float32", name="projection_hidden")(x)
        x = keras.layers.Dense(self.dim, dtype="float32", name="projection")(x)
        return keras.layers.UnitNormalization(dtype="float32", name="embedding")(x)

    def _random_directions(self, shape: Any, dtype: Any = None) -> Any:
        return tf.math.l2_normalize(tf.random.stateless_normal(shape, [self.seed, 0], dtype=dtype or "float32"), axis=1)

    def _counter(self, name: str) -> keras.Variable:
        return self.add_weight(name=name, shape=(), dtype="int64", initializer="zeros", trainable=False)

    def _follow(self) -> None:
        """θ_k ← θ_k + (1 − m)(θ_q − θ_k), which leaves equal weights exactly equal."""
        rate: Any = 1.0 - self.momentum
        if self.momentum_steps is not None:
            part = tf.minimum(tf.cast(tf.convert_to_tensor(self.step), tf.float32) / self.momentum_steps, 1.0)
            rate *= (tf.cos(math.pi * part) + 1.0) / 2.0
        for mine, theirs in self._pairs:
            old = tf.convert_to_tensor(mine)
            mine.assign(old + rate * (tf.convert_to_tensor(theirs) - old))

    def _keys(self, images: Any, training: bool) -> Any:
        """The keys of this replica's images, normalized with others of the global batch."""
        if not (training and self.shuffle and _norm_layers(self.key)):
            return tf.stop_gradient(self.key(images, training=training))
        rows = tf.shape(images)[0]
        sizes = _gather(rows[None], self.step)
        start, total = tf.reduce_sum(sizes[: _replica()]), tf.reduce_sum(sizes)
        seed = tf.stack([tf.constant(self.seed, tf.int64), tf.convert_to_tensor(self.step)])
        order = tf.random.experimental.index_shuffle(tf.range(total), seed, total - 1)
        shuffled = self.key(tf.gather(_gather(images, self.step), order[start : start + rows]), training=True)
        restored = tf.gather(_gather(shuffled, self.step), tf.math.invert_permutation(order))
        return tf.stop_gradient(restored[start : start + rows])


def info_nce(queries: Any, keys: Any, queue: Any, temperature: float) -> tuple[Any, Any]:
    """The cross-entropy of finding each query's key among it and the queue (van den Oord et al., arXiv:1807.03748).

    Args:
        queries: float32 `[batch, dim]`, unit vectors.
        keys: float32 `[batch, dim]`, unit vectors.
        queue: float32 `[K, dim]`, unit vectors.
        temperature: what cosines are divided by.

    Returns:
        The loss, and 1 where the key is closer than the whole queue, else 0; both float32 `[batch]`.

    Example:
        >>> q = tf.constant([[1.0, 0.0]])
        >>> info_nce(q, q, tf.constant([[0.0, 1.0]]), 1.0)[0].numpy().round(4).tolist()  # log(1 + 1 / e)
        [0.3133]
    """
    positive = tf.reduce_sum(queries * keys, axis=1)
    negative = tf.matmul(queries, queue, transpose_b=True)
    logits = tf.concat([positive[:, None], negative], axis=1) / temperature
    loss = tf.reduce_logsumexp(logits, axis=1) - logits[:, 0]
    return loss, tf.cast(positive > tf.reduce_max(negative, axis=1), tf.float32)


def _norm_layers(model: keras.Model) -> list[BatchNormalization]:
    return [layer for layer in model.layers if isinstance(layer, BatchNormalization)]


def _gather(values: Any, near: keras.Variable) -> Any:
    """The rows of all replicas, in their order, on the device of a variable of this replica's."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    # Several workers gather to where a value is, and in a graph many are nowhere yet.
    with tf.device(near.value.device):
        return context.all_gather(tf.identity(values), axis=0)


def _replica() -> Any:
    context = tf.distribute.get_replica_context()
    return context.replica_id_in_sync_group if context else 0


def _views(data: Any) -> tuple[Any, Any]:
    if not isinstance(data, dict) or not {"query", "key"} <= set(data):
        received = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ModelError(f'MoCo takes dictionaries of two views, "query" and "key". Received: {received}')
    return data["query"], data["key"]


def _check(
    dim: int, queue_size: int, temperature: float, momentum: float, momentum_steps: int | None, head: str, parts: int
) -> None:
    for name, value in (("dim", dim), ("queue_size", queue_size), ("parts", parts)):
        if value < 1:
            raise ModelError(f"{name} is at least 1. Received: {value}")
    if temperature <= 0.0:
        raise ModelError(f"temperature is above 0. Received: {temperature}")
    if not 0.0 <= momentum <= 1.0:
        raise ModelError(f"momentum is at least 0 and at most 1. Received: {momentum}")
    if momentum_steps is not None and momentum_steps < 1:
        raise ModelError(f"momentum_steps is at least 1, or None. Received: {momentum_steps}")
    if head not in ("v1", "v2"):
        raise ModelError(f'head is "v1" or "v2". Received: {head!r}')
