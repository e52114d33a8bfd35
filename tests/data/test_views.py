"""Two views of each film: alike whoever draws them and wherever a run begins, and never the same view twice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cxr_tf.data.augment import _DRAWS, Augment, uniforms
from cxr_tf.data.manifest import make_manifest
from cxr_tf.data.pipeline import batches, pretext_batches
from cxr_tf.data.shards import ShardFolder, prepare
from cxr_tf.data.views import MOCO_CXR, MOCO_V2, Views

FILMS, SIZE = 9, 32
PRESETS = pytest.mark.parametrize("views", [MOCO_CXR, MOCO_V2], ids=["MOCO_CXR", "MOCO_V2"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardFolder:
    root = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    for i in range(FILMS):
        pixels = rng.integers(40, 256, (60 - 3 * i, 40 + 2 * i)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    manifest = make_manifest(
        {
            "image": [str(root / f"{i}.png") for i in range(FILMS)],
            "source": ["here"] * FILMS,
            **{name: [str(i) for i in range(FILMS)] for name in ("patient_id", "study_id")},
            **{name: [None] * FILMS for name in ("view", "sex", "mask", "split")},
            "age": [float("nan")] * FILMS,
            "label:sick": [float("nan")] * FILMS,
            "boxes": [[]] * FILMS,
            "mask_known": [False] * FILMS,
        }
    )
    return prepare(manifest, root / "shards", storage_size=48, shard_size=4, workers=0)


def run(shards, views, **changes) -> list:
    settings = {"size": SIZE, "batch_size": 4, "seed": 5, "steps": 6, "make": views} | changes
    return list(pretext_batches(shards, range(FILMS), **settings).as_numpy_iterator())


def assert_same(some, others) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys() == {"query", "key"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def films(count: int, size: int = SIZE) -> tf.Tensor:
    return tf.constant(np.random.default_rng(0).uniform(0, 255, (count, size, size, 1)), tf.float32)


def places(count: int) -> tf.Tensor:
    return tf.range(count, dtype=tf.int64)


@PRESETS
def test_shapes_types_and_range(shards, views):
    dataset = pretext_batches(shards, range(FILMS), size=SIZE, batch_size=4, make=views)
    spec = tf.TensorSpec([4, SIZE, SIZE, 1], tf.float32)
    assert dataset.element_spec == {"query": spec, "key": spec}
    for pair in run(shards, views):
        for view in pair.values():
            assert np.isfinite(view).all() and view.min() >= 0 and view.max() <= 255 and view.std() > 1


@PRESETS
def test_views_are_a_function_of_seed_and_step(shards, views):
    whole = run(shards, views)
    assert_same(run(shards, views), whole)
    assert_same(run(shards, views, first_step=4), whole[4:])
    other = run(shards, views, seed=6)
    assert all(not np.array_equal(one["query"], two["query"]) for one, two in zip(whole, other, strict=True))


@PRESETS
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_each_batch(shards, views, workers):
    parts = [run(shards, views, worker=(i, workers)) for i in range(workers)]
    joined = [
        {name: np.concatenate([part[name] for part in given]) for name in ("query", "key")}
        for given in zip(*parts, strict=True)
    ]
    assert_same(joined, run(shards, views))


@PRESETS
def test_the_two_views_of_a_film_differ_and_no_view_comes_twice(views):
    images = tf.repeat(films(1), 40, axis=0)
    pair = views(images, 0, places(40))
    flat = np.concatenate([pair["query"], pair["key"]]).reshape(80, -1)
    assert len(np.unique(flat, axis=0)) == 80


def test_each_view_has_its_own_ranges():
    images = films(8)
    flipped = dataclasses.replace(Augment.none(), flip=1.0)
    pair = Views(query=Augment.none(), key=flipped)(images, 0, places(8))
    np.testing.assert_array_equal(pair["query"], images)
    np.testing.assert_array_equal(pair["key"], images[:, :, ::-1])


def test_a_view_that_changes_nothing_is_the_film(shards):
    found = run(shards, Views(query=Augment.none(), key=Augment.none()))
    given = batches(shards, range(FILMS), size=SIZE, batch_size=4, seed=5, steps=6).as_numpy_iterator()
    for pair, (images, _) in zip(found, given, strict=True):
        np.testing.assert_array_equal(pair["query"], images)
        np.testing.assert_array_equal(pair["key"], images)


@pytest.mark.parametrize(("views", "smallest", "angle"), [(MOCO_CXR, 0.8, 10), (MOCO_V2, 0.2, 0)])
def test_ranges_of_the_presets(views, smallest, angle):
    assert views.query == views.key
    draws = dict(zip(_DRAWS, tf.unstack(uniforms(1, places(20_000), len(_DRAWS)), axis=1), strict=True))
    a, b, _, c, d, _, p, q = tf.transpose(views.query.transforms(draws, 224)).numpy().astype(np.float64)
    assert not p.any() and not q.any()
    area = np.abs(a * d - b * c)
    assert smallest <= area.min() < smallest + 0.01 and 0.99 < area.max() <= 1 + 1e-6
    np.testing.assert_allclose(np.histogram(area, 4, (smallest, 1))[0] / 20_000, 0.25, atol=0.015)
    assert (a < 0).mean() == pytest.approx(0.5, abs=0.015)
    turned = np.degrees(np.arctan2(b, d))
    assert np.abs(turned).max() <= angle + 1e-4 and (angle == 0 or turned.max() > 9.9 > -9.9 > turned.min())
    ratio = np.hypot(a, c) / np.hypot(b, d)
    widest = min(4 / 3, 1 / smallest)  # has room
    assert 1 / widest - 1e-5 <= ratio.min() < 1 / widest + 0.03 and widest - 0.03 < ratio.max() <= widest + 1e-5


def test_moco_cxr_leaves_gray_levels_alone():
    gray = tf.fill([64, 64, 64, 1], 100.0)
    view = MOCO_CXR(gray, 0, places(64))["query"].numpy()[:, 16:-16, 16:-16]
    np.testing.assert_allclose(view, 100, atol=1e-3)


def test_moco_v2_changes_gray_levels_as_much_as_it_says():
    gray = tf.fill([512, 16, 16, 1], 127.5)
    shift = MOCO_V2(gray, 0, places(512))["query"].numpy()[:, 8, 8, 0] - 127.5
    assert 49 < shift.max() <= 51 and -51 <= shift.min() < -49
