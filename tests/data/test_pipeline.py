"""Shards -> batches: what they hold, in which order, and that nothing but (seed, step) decides it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cxr_tf import preprocess
from cxr_tf.data.augment import Augment
from cxr_tf.data.manifest import make_manifest
from cxr_tf.data.pipeline import PipelineError, batches, pretext_batches, read_batches
from cxr_tf.data.shards import ShardFolder, prepare

FILMS = 11
SIZE = 32
AUGMENT = Augment(crop=0.3, blur=0.5, noise=0.1, erase=0.5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardFolder:
    """Film i is told by its labels (the bits of i) and, roughly, by its gray level."""
    root = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    for i in range(FILMS):
        pixels = rng.integers(0, 40, (70 - 3 * i, 40 + 4 * i)) + 20 * i
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i}.png")
    manifest = make_manifest(
        {
            "image": [str(root / f"{i}.png") for i in range(FILMS)],
            "source": ["here"] * FILMS,
            **{name: [str(i) for i in range(FILMS)] for name in ("patient_id", "study_id")},
            **{name: [None] * FILMS for name in ("view", "sex", "mask", "split")},
            "age": [float("nan")] * FILMS,
            **{f"label:bit {bit}": [float(i >> bit & 1) for i in range(FILMS)] for bit in range(4)},
            "label:unknown": [float("nan")] * FILMS,
            "boxes": [[[5.0, 6.0, 20.0, 15.0]] if i % 3 == 0 else [] for i in range(FILMS)],
            "mask_known": [i % 3 != 2 for i in range(FILMS)],
        }
    )
    return prepare(manifest, root / "shards", storage_size=48, shard_size=4, workers=0)


def run(shards, keys=range(FILMS), **changes) -> list:
    settings = {"size": SIZE, "batch_size": 4, "seed": 5} | changes
    return list(batches(shards, keys, **settings).as_numpy_iterator())


def which(found) -> list[int]:
    """The films of batches, by their labels."""
    return [int(film[:4] @ [1, 2, 4, 8]) for _, truth in found for film in truth["logits"]]


def assert_same(some, others) -> None:
    assert len(some) == len(others)
    for (image, truth), (other_image, other_truth) in zip(some, others, strict=True):
        np.testing.assert_array_equal(image, other_image)
        assert truth.keys() == other_truth.keys()
        for name in truth:
            np.testing.assert_array_equal(truth[name], other_truth[name])


def test_shapes_and_types(shards):
    dataset = batches(shards, range(FILMS), size=SIZE, batch_size=4)
    images, truth = dataset.element_spec
    assert images == tf.TensorSpec([4, SIZE, SIZE, 1], tf.float32)
    assert truth == {
        "logits": tf.TensorSpec([4, 5], tf.float32),
        "mask_logits": tf.TensorSpec([4, SIZE, SIZE, 1], tf.float32),
    }
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    assert batches(shards, range(FILMS), size=SIZE, batch_size=4, steps=7, first_step=2).cardinality() == 5
    assert batches(shards, range(FILMS), size=SIZE, batch_size=4, shuffle=False).cardinality() == 3


def test_films_are_what_preprocessing_makes_of_them(shards):
    found = run(shards, shuffle=False)
    assert [len(images) for images, _ in found] == [4, 4, 3]
    assert which(found) == list(range(FILMS))
    images = np.concatenate([images for images, _ in found])
    masks = np.concatenate([truth["mask_logits"] for _, truth in found])
    for key, record in enumerate(shards.read(range(FILMS))):
        features = tf.train.Example.FromString(record).features.feature
        shape = [features[name].int64_list.value[0] for name in ("height", "width")]
        stored = np.frombuffer(features["image"].bytes_list.value[0], np.uint8).reshape(shape)
        assert np.abs(images[key] - preprocess.to_input(stored, SIZE)).max() <= 1
        if key % 3 == 2:
            assert np.isnan(masks[key]).all()
        else:
            bits = np.unpackbits(np.frombuffer(zlib.decompress(features["mask"].bytes_list.value[0]), np.uint8))
            mask = bits[: shape[0] * shape[1]].reshape(shape)
            np.testing.assert_array_equal(masks[key], preprocess.mask_to_input(mask, SIZE))
            assert masks[key].any() == (key % 3 == 0)


def test_labels_may_be_chosen_and_ordered_by_name(shards):
    truth = run(shards, shuffle=False, classes=["unknown", "bit 3", "bit 0"])[2][1]["logits"]
    np.testing.assert_array_equal(truth, [[np.nan, 1, 0], [np.nan, 1, 1], [np.nan, 1, 0]])


def test_films_may_be_chosen(shards):
    assert which(run(shards, [7, 2, 9], shuffle=False)) == [7, 2, 9]
    order = which(run(shards, [7, 2, 9], batch_size=3, steps=20))
    assert all(sorted(order[i : i + 3]) == [2, 7, 9] for i in range(0, 60, 3))


def test_each_epoch_is_all_films_in_another_order(shards):
    order = which(run(shards, steps=FILMS * 3))
    epochs = [order[i : i + FILMS] for i in range(0, len(order), FILMS)]
    assert len(epochs) == 12
    assert all(sorted(epoch) == list(range(FILMS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12
    assert {epoch[0] for epoch in epochs} != {epochs[0][0]}
    assert which(run(shards, steps=3, seed=6)) != order[:12]


def test_the_order_is_that_of_tensorflows_index_shuffle(shards):
    order = which(run(shards, steps=7))
    for place, film in enumerate(order):
        epoch, index = divmod(place, FILMS)
        assert film == int(tf.random.experimental.index_shuffle(index, tf.constant([5, epoch], tf.int64), FILMS - 1))


def test_one_film_is_an_epoch(shards):
    assert which(run(shards, [6], steps=2)) == [6] * 8


@pytest.mark.parametrize("first_step", [4, 9])
def test_a_run_taken_up_again_gets_the_same_batches(shards, first_step):
    whole = run(shards, steps=9, augment=AUGMENT)
    assert_same(run(shards, steps=9, first_step=first_step, augment=AUGMENT), whole[first_step:])


def test_a_pass_in_order_may_begin_later(shards):
    assert_same(run(shards, shuffle=False, first_step=2), run(shards, shuffle=False)[2:])
    assert_same(run(shards, shuffle=False, steps=2), run(shards, shuffle=False)[:2])
    assert run(shards, shuffle=False, first_step=3) == []


@pytest.mark.parametrize(("workers", "shuffle"), [(2, True), (2, False)])
def test_workers_share_each_batch(shards, workers, shuffle):
    steps = 5 if shuffle else None
    whole = run(shards, steps=steps, shuffle=shuffle, augment=AUGMENT)
    parts = [run(shards, steps=steps, shuffle=shuffle, augment=AUGMENT, worker=(i, workers)) for i in range(workers)]
    for step, (images, truth) in enumerate(whole):
        given = [part[step] for part in parts if step < len(part)]
        np.testing.assert_array_equal(np.concatenate([images for images, _ in given]), images)
        for name in truth:
            np.testing.assert_array_equal(np.concatenate([t[name] for _, t in given]), truth[name])


def test_the_batch_size_does_not_change_what_a_film_gets(shards):
    whole, singly = run(shards, steps=3, augment=AUGMENT), run(shards, steps=12, batch_size=1, augment=AUGMENT)
    np.testing.assert_array_equal(np.concatenate([i for i, _ in whole]), np.concatenate([i for i, _ in singly]))


def test_augmentation_differs_from_epoch_to_epoch_and_seed_to_seed(shards):
    same_film = [images[0] for images, _ in run(shards, [3], batch_size=1, steps=4, augment=AUGMENT)]
    assert all(not np.array_equal(same_film[0], other) for other in same_film[1:])
    assert not np.array_equal(same_film[0], run(shards, [3], batch_size=1, steps=1, seed=6, augment=AUGMENT)[0][0][0])
    plain = run(shards, [3], batch_size=1, steps=4, augment=Augment.none())
    assert_same(plain, run(shards, [3], batch_size=1, steps=4))


def test_masks_stay_0_1_or_unknown(shards):
    for _, truth in run(shards, steps=6, augment=AUGMENT):
        for film, mask in zip(truth["logits"], truth["mask_logits"], strict=True):
            kind = int(film[:4] @ [1, 2, 4, 8]) % 3
            assert np.isnan(mask).all() if kind == 2 else set(np.unique(mask)) <= {0.0, 1.0}


def plain(images, seed, positions) -> dict:
    return {"images": images, "seed": seed, "positions": positions}


def pretext(shards, keys=range(FILMS), **changes) -> list:
    settings = {"size": SIZE, "batch_size": 4, "seed": 5, "make": plain} | changes
    return list(pretext_batches(shards, keys, **settings).as_numpy_iterator())


@pytest.mark.parametrize(
    "settings", [{"steps": 7}, {"steps": 7, "first_step": 3}, {"shuffle": False}, {"seed": 6, "steps": 2}]
)
def test_pretext_batches_are_the_films_of_batches(shards, settings):
    found, films = pretext(shards, **settings), run(shards, **settings)
    assert len(found) == len(films)
    for made, (images, _) in zip(found, films, strict=True):
        np.testing.assert_array_equal(made["images"], images)
    first = 4 * settings.get("first_step", 0)
    positions = np.concatenate([made["positions"] for made in found])
    np.testing.assert_array_equal(positions, first + np.arange(len(positions)))
    assert {int(made["seed"]) for made in found} == {settings.get("seed", 5)}


def test_pretext_positions_are_those_of_batches(shards):
    """The same changes come out."""

    def make(images, seed, positions):
        return {"images": AUGMENT(images, None, seed, positions)[0]}

    found = pretext(shards, steps=5, make=make)
    for made, (images, _) in zip(found, run(shards, steps=5, augment=AUGMENT), strict=True):
        np.testing.assert_array_equal(made["images"], images)


def test_pretext_workers_share_each_batch(shards):
    for settings in ({"steps": 5}, {"shuffle": False}):
        whole = pretext(shards, **settings)
        parts = [pretext(shards, worker=(i, 2), **settings) for i in range(2)]
        for step, made in enumerate(whole):
            given = [part[step] for part in parts if step < len(part)]
            for name in ("images", "positions"):
                np.testing.assert_array_equal(np.concatenate([part[name] for part in given]), made[name])


def test_pretext_shapes_and_errors(shards):
    dataset = pretext_batches(shards, range(FILMS), size=SIZE, batch_size=4, make=lambda i, s, p: {"a": i, "b": p})
    assert dataset.element_spec == {
        "a": tf.TensorSpec([4, SIZE, SIZE, 1], tf.float32),
        "b": tf.TensorSpec([4], tf.int64),
    }
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    for changes, said in (({"keys": [FILMS]}, "has films"), ({"size": 0}, "size must"), ({"worker": (1, 1)}, "worker")):
        with pytest.raises(PipelineError, match=said):
            pretext(shards, **changes)


def test_a_damaged_record_is_named(shards, monkeypatch):
    for change in (lambda record: record[:-9], lambda record: b"", lambda record: record.replace(b"height", b"hxight")):
        monkeypatch.setattr(
            ShardFolder, "read", lambda self, keys, change=change: [change(self._record(k)) for k in keys]
        )
        for dataset in (
            batches(shards, [3], size=SIZE, batch_size=1),
            pretext_batches(shards, [3], size=SIZE, batch_size=1, make=plain),
        ):
            with pytest.raises(PipelineError, match=r"the record of film 3 is damaged"):
                next(read_batches(dataset))


def test_keras_trains_on_it(shards):
    import keras

    inputs = keras.Input((SIZE, SIZE, 1))
    pooled = keras.layers.GlobalAveragePooling2D()(inputs)
    model = keras.Model(inputs, {"logits": keras.layers.Dense(1)(pooled), "mask_logits": inputs})
    model.compile("sgd", {"logits": "mse", "mask_logits": None})
    train = batches(shards, range(FILMS), size=SIZE, batch_size=4, classes=["bit 0"])
    history = model.fit(train.map(lambda x, y: (x / 255, {"logits": y["logits"]})), steps_per_epoch=3, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keys": []}, "at least one"),
        ({"keys": [0.5]}, "whole numbers"),
        ({"keys": [0, FILMS]}, rf"films 0 to {FILMS - 1}\. Received: keys from 0 to {FILMS}"),
        ({"keys": [-1]}, "Received: keys from -1"),
        ({"classes": ["bit 0", "bit3"]}, r'no class \'bit3\'\. Did you mean "bit 3"\?.*Received'),
        ({"batch_size": 0}, "batch_size must be .*Received: 0"),
        ({"batch_size": 4, "worker": (0, 3)}, "multiple of the number of workers, 3. Received: 4"),
        ({"worker": (2, 2)}, r"worker must be .*Received: \(2, 2\)"),
        ({"first_step": -1}, "Received: first_step=-1"),
        ({"first_step": 3, "steps": 2}, "Received: first_step=3, steps=2"),
        ({"size": 0}, "size must be 1 or more. Received: 0"),
    ],
)
def test_what_does_not_fit_is_refused(shards, changes, said):
    with pytest.raises(PipelineError, match=said):
        batches(shards, **({"keys": range(FILMS), "size": SIZE, "batch_size": 4} | changes))


DISTRIBUTED = """
    import sys
    import numpy as np, tensorflow as tf
    from cxr_tf.data.augment import Augment
    from cxr_tf.data.pipeline import batches
    from cxr_tf.data.shards import open_shards

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    shards = open_shards(sys.argv[1])
    settings = {"size": 32, "batch_size": 4, "steps": 3, "augment": Augment()}
    whole = list(batches(shards, range(11), **settings))
    divided = list(strategy.experimental_distribute_dataset(batches(shards, range(11), **settings)))
    assert len(divided) == 3
    for (images, truth), (parts, truths) in zip(whole, divided):
        local = strategy.experimental_local_results(parts)
        assert [len(part) for part in local] == [2, 2]
        np.testing.assert_array_equal(np.concatenate(local), images)
        for name in truth:
            local = strategy.experimental_local_results(truths[name])
            np.testing.assert_array_equal(np.concatenate(local), truth[name])
    print("equal")
"""


@pytest.mark.slow
def test_a_strategy_divides_the_global_batch(shards, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    ended = subprocess.run([sys.executable, script, shards.folder], capture_output=True, text=True, check=False)
    assert ended.stdout.endswith("equal\n"), ended.stderr


MEMORY = """
    import resource, sys
    from cxr_tf.data.pipeline import batches
    from cxr_tf.data.shards import open_shards

    shards = open_shards(sys.argv[1])
    peaks = []
    for step, _ in enumerate(batches(shards, range(len(shards)), size=128, batch_size=8, steps=2000)):
        if step in (500, 1999):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_read(shards, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(MEMORY))
    ended = subprocess.run([sys.executable, script, shards.folder], capture_output=True, text=True, check=False)
    # 12,000 films of 64 kB would be 780 MB.
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 150_000  # kB
