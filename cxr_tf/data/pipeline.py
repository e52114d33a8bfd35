"""Shards -> batches. What a batch holds is a function of (seed, step) alone, and memory does not grow with the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from cxr_tf.data.augment import Augment
from cxr_tf.data.records import RecordedFilm, RecordError, read_record
from cxr_tf.data.shards import ShardFolder
from cxr_tf.errors import CxrError, innermost, nearest
from cxr_tf.preprocess import tf_content_box, tf_to_input


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
    columns = np.asarray(_check_classes(shards, classes), np.int64)

    def load(wanted: Any, places: Any) -> tuple[Any, dict[str, Any]]:
        images, truth = _films_and_truth(shards, wanted, columns, size)
        if not content_boxes:
            del truth["content_box"]
        if augment is not None:
            images, truth["mask_logits"] = augment(images, truth["mask_logits"], seed, places)
        return images, truth

    return _dataset(shards, keys, size, batch_size, seed, first_step, steps, shuffle, worker, load)


def pretext_batches(
    shards: ShardFolder,
    keys: Sequence[int] | np.ndarray,
    *,
    size: int,
    batch_size: int,
    make: Callable[[Any, Any, Any], Any],
    seed: int = 0,
    first_step: int = 0,
    steps: int | None = None,
    shuffle: bool = True,
    worker: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """Films without their truth, made into what a pretext task takes, batch by batch.

    The films come in the order of `batches`, with the same positions; masks and labels are not decoded.

    Args:
        shards: from `open_shards`.
        keys: which films, by their key in `shards.manifest`.
        size: side of the model's input, in pixels.
        batch_size: films a step, over all devices and workers.
        make: called in graph, once for each batch, as `make(images, seed, positions)`: images float32
            `[batch, size, size, 1]`, 0-255; seed, as given here; positions int64 `[batch]`, of the films in the run's
            whole sequence. Random numbers should depend on seed and position alone (`cxr_tf.data.augment.uniforms`),
            so that replicas, workers and a run taken up again draw the same.
        seed: of order and of what `make` draws.
        first_step: where to begin; steps count from 0.
        steps: where to end: steps `first_step` to `steps - 1` come out. By default shuffled batches never end.
        shuffle: False for one pass in the order of `keys`, whose last batch may be short.
        worker: (i, n) for the i-th of n workers, as in `batches`.

    Returns:
        A dataset of what `make` returns, most often a dict of tensors. Shuffled, the batch dimension is static.

    Raises:
        PipelineError: a key that is not there, or sizes that make no sense.

    Example:
        >>> shards = open_shards("shards/cxr")  # doctest: +SKIP
        >>> pairs = pretext_batches(shards, range(1000), size=224, batch_size=32, make=MOCO_CXR)  # doctest: +SKIP
        >>> next(iter(pairs))["query"].shape  # doctest: +SKIP
        TensorShape([32, 224, 224, 1])
    """

    def load(wanted: Any, places: Any) -> Any:
        return make(_films(shards, wanted, size), seed, places)

    return _dataset(shards, keys, size, batch_size, seed, first_step, steps, shuffle, worker, load)


def _dataset(
    shards: ShardFolder,
    keys: Sequence[int] | np.ndarray,
    size: int,
    batch_size: int,
    seed: int,
    first_step: int,
    steps: int | None,
    shuffle: bool,
    worker: tuple[int, int],
    load: Callable[[Any, Any], Any],
) -> tf.data.Dataset:
    """What `load` makes of each batch's keys and positions, int64 `[batch]`, in the order of (seed, step)."""
    if size < 1:
        raise PipelineError(f"size must be 1 or more. Received: {size}")
    films = _check_keys(shards, keys)
    local, last = _check_steps(len(films), batch_size, first_step, steps, shuffle, worker)
    films_tensor = tf.constant(films, tf.int64)
    count = len(films)

    def batch(step: Any) -> Any:
        end = (step + 1) * local
        items = tf.range(step * local, end if last is None or shuffle else tf.minimum(end, last))
        if shuffle:
            items = tf.ensure_shape(items, [local])
        # The places of this worker's items in the sequence of all workers.
        places = items // local * batch_size + worker[0] * local + items % local
        index = _shuffled(places, seed, count) if shuffle else places
        return load(tf.gather(films_tensor, index), places)

    if last is None:
        dataset = tf.data.Dataset.counter(first_step)
    else:
        dataset = tf.data.Dataset.range(first_step, max(-(-last // local), first_step))
    dataset = dataset.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    options = tf.data.Options()
    options.deterministic = True
    # Files are read by key, so there is nothing to divide among workers but the batches.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)


def _shuffled(places: Any, seed: int, count: int) -> Any:
    """Which of `count` films stands at each place of the endless sequence; int64 `[batch]` both.

    `tf.random.experimental.index_shuffle` of each place with the seed (seed, epoch), in one call: that function cannot
    take a seed a place, so this is the op that it calls, with the number that it puts before a seed.
    """
    seeds = [tf.fill(tf.shape(places), tf.constant(value, tf.int64)) for value in (498247692, seed)]
    return tf.raw_ops.RandomIndexShuffle(
        index=places % count,
        seed=tf.stack([*seeds, places // count], axis=1),
        max_index=tf.constant(count - 1, tf.int64),
        rounds=4,
    )


def read_batches(dataset: Any) -> Iterator[Any]:
    """Iterates over a dataset whose films may vanish or be damaged on the way.

    Args:
        dataset: of `batches` or `pretext_batches`, also distributed.

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


def _films(shards: ShardFolder, keys: Any, size: int) -> Any:
    """Films from disk, in graph: int64 `[batch]` -> float32 `[batch, size, size, 1]`."""

    def read(wanted: np.ndarray) -> tuple[np.ndarray, ...]:
        return _by_shape([_film(shards, int(key), truth=False).image for key in wanted])

    pixels, kinds, places = tf.numpy_function(read, [keys], [tf.uint8, tf.int64, tf.int64], stateful=False)
    images = _fit(pixels, kinds, places, size)
    return tf.ensure_shape(images, [*keys.shape, size, size, 1])


def _films_and_truth(shards: ShardFolder, keys: Any, columns: np.ndarray, size: int) -> tuple[Any, dict[str, Any]]:
    """Films from disk, and their truth as `batches` gives it, with the content boxes. Masks are fitted as films are."""

    def read(wanted: np.ndarray) -> tuple[np.ndarray, ...]:
        films = [_film(shards, int(key), truth=True) for key in wanted]
        masks = [film.mask for film in films if film.mask is not None]
        return (
            *_by_shape([film.image for film in films] + masks),
            np.asarray([film.image.shape for film in films], np.int32),
            np.asarray([i for i, film in enumerate(films) if film.mask is not None], np.int64),
            np.asarray([film.known for film in films], np.bool_),
            np.asarray([film.labels for film in films], np.float32)[:, columns],
        )

    types = [tf.uint8, tf.int64, tf.int64, tf.int32, tf.int64, tf.bool, tf.float32]
    pixels, kinds, places, shapes, drawn, known, labels = tf.numpy_function(read, [keys], types, stateful=False)
    fitted = _fit(pixels, kinds, places, size)
    count = tf.size(keys)
    blank = tf.where(tf.ensure_shape(known, keys.shape), 0.0, np.float32(np.nan))
    blank = tf.tile(blank[:, None, None, None], [1, size, size, 1])
    masks = tf.cast(fitted[count:] >= 0.5, tf.float32)
    boxes = tf.map_fn(lambda shape: tf_content_box(shape[0], shape[1], size), tf.ensure_shape(shapes, [*keys.shape, 2]))
    return tf.ensure_shape(fitted[:count], [*keys.shape, size, size, 1]), {
        "logits": tf.ensure_shape(labels, [*keys.shape, len(columns)]),
        "mask_logits": tf.tensor_scatter_nd_update(blank, tf.reshape(drawn, [-1, 1]), masks),
        "content_box": boxes,
    }


def _film(shards: ShardFolder, key: int, *, truth: bool) -> RecordedFilm:
    try:
        return read_record(shards.read([key])[0], truth=truth)
    except RecordError:  # not its cause: TensorFlow tells the innermost error of all
        raise PipelineError(f"{shards.folder}: the record of film {key} is damaged") from None


def _by_shape(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pixels, sorted by their images' shapes; height, width and number for each shape; where each image went."""
    shapes = np.asarray([image.shape for image in images], np.int64)
    kinds, kind, counts = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(kind.reshape(-1), kind="stable")
    pixels = np.concatenate([images[i].reshape(-1) for i in order])
    return pixels, np.column_stack([kinds, counts]), np.argsort(order)


def _fit(pixels: Any, kinds: Any, places: Any, size: int) -> Any:
    """What `_by_shape` sorted -> float32 `[images, size, size, 1]` in the order of before; one shape after the other.

    An op on all films of a shape costs half of as many ops on one film each.
    """
    kinds = tf.ensure_shape(kinds, [None, 3])
    ends = tf.cumsum(tf.reduce_prod(kinds, axis=1))

    def fit(kind: Any, parts: Any) -> tuple[Any, Any]:
        height, width, count = tf.unstack(kinds[kind])
        films = tf.ensure_shape(pixels, [None])[ends[kind] - height * width * count : ends[kind]]
        films = tf.reshape(films, tf.stack([count, height, width, 1]))
        return kind + 1, parts.write(kind, tf_to_input(films, size))

    number = tf.shape(kinds)[0]
    parts = tf.TensorArray(tf.float32, number, infer_shape=False, element_shape=[None, size, size, 1])
    _, parts = tf.while_loop(lambda kind, _: kind < number, fit, (0, parts))
    return tf.gather(parts.concat(), tf.ensure_shape(places, [None]))


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
) -> tuple[int, int | None]:
    """Films a step of this worker, and how many there are in all; None for no end."""
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
    last = None if steps is None else steps * local
    if not shuffle:
        whole, rest = divmod(films, batch_size)
        end = whole * local + min(max(rest - index * local, 0), local)
        last = end if last is None else min(end, last)
    return local, last
