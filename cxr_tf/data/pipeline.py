"""Shards -> batches. What a batch holds is a function of (seed, step) alone, and memory does not grow with the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from cxr_tf.data.augment import Augment
from cxr_tf.data.shards import ShardFolder
from cxr_tf.errors import CxrError, innermost, nearest
from cxr_tf.preprocess import tf_content_box, tf_mask_to_input, tf_to_input

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)  # of each byte


class PipelineError(CxrError):
    """Keys, classes or sizes that do not fit the shards or each other."""


def batches(
    shards: ShardFolder,
    keys: Sequence[int] | np.ndarray,
    *,
    size: int,
    batch_size: int,
    seed: int = 0,
    first_step: int = 0,
    steps: int | None = None,
    shuffle: bool = True,
    augment: Augment | None = None,
    classes: Sequence[str] | None = None,
    content_boxes: bool = False,
    worker: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """Films and their truth, batch by batch.

    Shuffled, the films come in one endless sequence in which every `len(keys)` films are all of `keys`, each time in
    another order; batches are cut from it, so that a batch may span two epochs. Step k holds the same films with the
    same changes whether the run began at 0 or at k.

    Args:
        shards: from `open_shards`.
        keys: which films, by their key in `shards.manifest`.
        size: side of the model's input, in pixels.
        batch_size: films a step, over all devices and workers.
        seed: of order and augmentation.
        first_step: where to begin; steps count from 0.
        steps: where to end: steps `first_step` to `steps - 1` come out. By default shuffled batches never end.
        shuffle: False for one pass in the order of `keys`, whose last batch may be short.
        augment: random changes.
        classes: which classes, in which order; by default those of the shards.
        content_boxes: True adds "content_box" to the truth, int32 `[batch, 4]`: where each film lies in its padded
            square (top, left, height, width), before any augmentation.
        worker: (i, n) for the i-th of n workers, counted from 0: it gets its part of every batch, `batch_size / n`
            films. Use it with `strategy.distribute_datasets_from_function`; `experimental_distribute_dataset` on one
            machine divides the global batches itself.

    Returns:
        A dataset of (images, truth): images float32 `[batch, size, size, 1]`, 0-255, and truth a dict of "logits",
        float32 `[batch, classes]` (1, 0, NaN = unknown), and "mask_logits", float32 `[batch, size, size, 1]` (0 and 1;
        NaN all over = no annotation). Shuffled, the batch dimension is static.

    Raises:
        PipelineError: a key or class that is not there, or sizes that make no sense.

    Example:
        >>> shards = open_shards("shards/siim")  # doctest: +SKIP
        >>> train = batches(shards, range(1000), size=320, batch_size=32, augment=Augment())  # doctest: +SKIP
        >>> model.fit(train, steps_per_epoch=100, epochs=10)  # doctest: +SKIP
    """
    if size < 1:
        raise PipelineError(f"size must be 1 or more. Received: {size}")
    films = _check_keys(shards, keys)
    columns = _check_classes(shards, classes)
    local, first, last = _check_steps(len(films), batch_size, first_step, steps, shuffle, worker)
    films_tensor = tf.constant(films, tf.int64)
    count = len(films)

    def position(item: Any) -> Any:
        """The place of this worker's item in the sequence of all workers."""
        return item // local * batch_size + worker[0] * local + item % local

    def key(place: Any) -> Any:
        if not shuffle:
            return films_tensor[place]
        order = tf.stack([tf.constant(seed, tf.int64), place // count])
        return films_tensor[
            tf.random.experimental.index_shuffle(place % count, order, tf.constant(count - 1, tf.int64))
        ]

    def read(wanted: np.ndarray) -> bytes:
        return shards.read([int(wanted)])[0]

    def film(item: Any) -> tuple[Any, Any, Any, Any, Any]:
        place = position(item)
        record = tf.numpy_function(read, [key(place)], tf.string, stateful=False)
        image, mask, labels, box = decode(tf.ensure_shape(record, []), len(shards.classes), size)
        return image, mask, tf.gather(labels, columns), box, place

    def finish(images: Any, masks: Any, labels: Any, boxes: Any, places: Any) -> tuple[Any, dict[str, Any]]:
        if augment is not None:
            images, masks = augment(images, masks, seed, places)
        truth = {"logits": labels, "mask_logits": masks}
        return images, truth | {"content_box": boxes} if content_boxes else truth

    if last is None:
        items = tf.data.Dataset.counter(first)
    else:
        items = tf.data.Dataset.range(first, last)
    dataset = items.map(film, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    dataset = dataset.batch(local, drop_remainder=shuffle)
    dataset = dataset.map(finish, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    options = tf.data.Options()
    options.deterministic = True
    # Files are read by key, so there is nothing to divide among workers but the batches.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)


def read_batches(dataset: Any) -> Iterator[Any]:
    """Iterates over a dataset whose films may vanish or be damaged on the way.

    Args:
        dataset: of `batches`, also distributed.

    Yields:
        Its batches.

    Raises:
        PipelineError: when one cannot be read; the text names the file.
    """
    iterator = iter(dataset)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            raise PipelineError(f"a batch could not be read: {innermost(error)}") from error
        yield batch


def decode(record: Any, classes: int, size: int) -> tuple[Any, Any, Any, Any]:
    """One record as the model takes it.

    Args:
        record: scalar string, a serialized `tf.train.Example` of the shards.
        classes: how many labels it holds.
        size: side of the model's input, in pixels.

    Returns:
        Image float32 `[size, size, 1]`, 0-255; mask float32 `[size, size, 1]` of 0 and 1, or NaN all over; labels
        float32 `[classes]`; content box int32 `[4]`.
    """
    found = tf.io.parse_single_example(
        record,
        {
            "image": tf.io.FixedLenFeature([], tf.string),
            "height": tf.io.FixedLenFeature([], tf.int64),
            "width": tf.io.FixedLenFeature([], tf.int64),
            "mask": tf.io.FixedLenFeature([], tf.string),
            "mask_pixels": tf.io.FixedLenFeature([], tf.int64),
            "labels": tf.io.FixedLenFeature([classes], tf.float32),
        },
    )
    shape = tf.stack([found["height"], found["width"], 1])

    def annotated() -> Any:
        packed = tf.io.decode_raw(tf.io.decode_compressed(found["mask"], "ZLIB"), tf.uint8)
        bits = tf.reshape(tf.gather(_BITS, tf.cast(packed, tf.int32)), [-1])
        return tf_mask_to_input(tf.reshape(bits[: tf.reduce_prod(shape)], shape), size)

    def same_all_over() -> Any:
        known = tf.strings.length(found["mask"]) > 0
        return tf.fill([size, size, 1], tf.where(known, 0.0, np.float32(np.nan)))

    image = tf_to_input(tf.reshape(tf.io.decode_raw(found["image"], tf.uint8), shape), size)
    mask = tf.cond(found["mask_pixels"] > 0, annotated, same_all_over)
    height, width = tf.cast(found["height"], tf.int32), tf.cast(found["width"], tf.int32)
    return image, mask, found["labels"], tf_content_box(height, width, size)


def _check_keys(shards: ShardFolder, keys: Sequence[int] | np.ndarray) -> np.ndarray:
    films = np.asarray(keys)
    if films.ndim != 1 or not len(films) or not np.issubdtype(films.dtype, np.integer):
        raise PipelineError(f"keys must be a list of whole numbers, at least one. Received: {keys!r}")
    if films.min() < 0 or films.max() >= len(shards):
        raise PipelineError(
            f"{shards.folder} has films 0 to {len(shards) - 1}. Received: keys from {films.min()} to {films.max()}"
        )
    return films.astype(np.int64)


def _check_classes(shards: ShardFolder, classes: Sequence[str] | None) -> list[int]:
    wanted = shards.classes if classes is None else list(classes)
    for name in wanted:
        if name not in shards.classes:
            raise PipelineError(
                f"{shards.folder} has no class {name!r}.{nearest(name, shards.classes)} "
                f"It has: {', '.join(shards.classes) or 'none'}. Received: {wanted}"
            )
    return [shards.classes.index(name) for name in wanted]


def _check_steps(
    films: int, batch_size: int, first_step: int, steps: int | None, shuffle: bool, worker: tuple[int, int]
) -> tuple[int, int, int | None]:
    """Films a step of this worker, and its first and last item."""
    index, workers = worker
    if not 0 <= index < workers:
        raise PipelineError(f"worker must be (i, n) with 0 <= i < n. Received: {worker}")
    if batch_size < 1 or batch_size % workers:
        raise PipelineError(
            f"batch_size must be 1 or more and a multiple of the number of workers, {workers}. Received: {batch_size}"
        )
    local = batch_size // workers
    if first_step < 0 or (steps is not None and steps < first_step):
        raise PipelineError(f"steps must not end before they begin. Received: first_step={first_step}, steps={steps}")
    first, last = first_step * local, None if steps is None else steps * local
    if not shuffle:
        whole, rest = divmod(films, batch_size)
        end = whole * local + min(max(rest - index * local, 0), local)
        last = end if last is None else min(end, last)
    return local, first, last
