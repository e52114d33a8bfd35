"""Explanations against annotations: each figure by hand, and a model that must point at what it has learned."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import spearmanr

import cxr_tf
from cxr_tf.data.manifest import make_manifest
from cxr_tf.data.shards import ShardFolder, prepare
from cxr_tf.errors import CxrError
from cxr_tf.evaluate.explanation import (
    explain_films,
    iou_at_area,
    pointing_game,
    rank_correlation,
    share_inside,
)
from cxr_tf.evaluate.saliency import randomized, saliency_of
from cxr_tf.models.layers import Standardize
from cxr_tf.models.normalization import normalization_layer

NAN = float("nan")
CLASSES = ["bright", "dark", "neither"]
BACKGROUND, CELL = 64, 32


# --- one map on one film ----------------------------------------------------------------------------------------------


def test_pointing_game_by_hand() -> None:
    mask = np.zeros((6, 6), bool)
    mask[2:4, 2:4] = True
    saliency = np.zeros((6, 6))
    saliency[3, 3] = 1
    assert pointing_game(saliency, mask) == 1
    saliency[0, 0] = 2
    assert pointing_game(saliency, mask) == 0
    saliency[3, 3] = 2  # one of two highest points
    assert pointing_game(saliency, mask) == 0.5
    assert pointing_game(np.ones((6, 6)), mask) == mask.mean()
    saliency[3, 5] = 3  # two pixels beside it
    assert [pointing_game(saliency, mask, t) for t in (0, 1.9, 2, 50)] == [0, 0, 1, 1]
    assert pointing_game(np.ones((6, 6)), mask, 1) == 12 / 36


def test_iou_at_area_by_hand() -> None:
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    saliency = np.arange(16.0)[::-1].reshape(4, 4)
    assert iou_at_area(saliency, mask) == 1
    assert iou_at_area(-saliency, mask) == 0
    assert iou_at_area(saliency.T, mask) == pytest.approx(1 / 7)
    both = 4 * 4 / 16  # of a draw of four pixels, a quarter lies on the mask
    assert iou_at_area(np.zeros((4, 4)), mask) == pytest.approx(both / (8 - both))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_ties_count_what_a_draw_among_them_gives_on_average(seed: int) -> None:
    rng = np.random.default_rng(seed)
    saliency, mask = rng.integers(0, 3, (2, 4)).astype(float), rng.random((2, 4)) < 0.5
    mask[0, 0] = True
    area = mask.sum()
    pixels, on = saliency.ravel(), mask.ravel()
    choices = [list(choice) for choice in itertools.combinations(range(8), area)]
    highest = max(pixels[choice].sum() for choice in choices)
    both = np.mean([on[choice].sum() for choice in choices if pixels[choice].sum() == highest])
    assert iou_at_area(saliency, mask) == pytest.approx(both / (2 * area - both))
    assert pointing_game(saliency, mask) == pytest.approx(on[pixels == pixels.max()].mean())


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_the_scale_of_a_map_does_not_matter(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    saliency, mask = rng.random((5, 6)), rng.random((5, 6)) < 0.4
    mask[0, 0] = True
    other = rng.random((5, 6))
    for figure in (pointing_game, iou_at_area, share_inside):
        assert figure(saliency * scale, mask) == pytest.approx(figure(saliency, mask))
    assert rank_correlation(saliency**3 * scale, other) == pytest.approx(rank_correlation(saliency, other))
    assert (pointing_game(mask * scale, mask), iou_at_area(mask * scale, mask)) == (1, 1)


def test_share_inside_by_hand() -> None:
    region = np.array([[True, False], [True, False]])
    assert share_inside(np.array([[1.0, 2.0], [0.0, 1.0]]), region) == 0.25
    assert share_inside(np.ones((2, 2)), region) == region.mean()
    assert np.isnan(share_inside(np.zeros((2, 2)), region))
    assert np.isnan(share_inside(np.ones((2, 2)), np.zeros((2, 2), bool)))


def test_rank_correlation_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        one, other = np.maximum(rng.normal(size=(2, 9, 7)), 0)  # half of it ties
        assert rank_correlation(one, other) == pytest.approx(spearmanr(one.ravel(), other.ravel()).statistic)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert np.isnan(rank_correlation(one, np.zeros((9, 7))))


# --- films whose figures are known ------------------------------------------------------------------------------------


def by_hand(heads: tuple[str, ...] = ("logits", "mask_logits")) -> cxr_tf.MultiTask:
    """Without anything learned below the logits: "bright" is how bright the squares of 32 pixels are on average, "dark"
    is minus that; and an opacity is where the film is dark."""
    image = keras.Input((3 * CELL, 3 * CELL, 1), name="image")
    x = Standardize(128.0, 64.0, multiple=32, name="standardize")(image)
    for stride in (2, 4, 8, 16, 32):
        x = keras.layers.AveragePooling2D(2, name=f"pool{stride}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pooled")(x)
    outputs = {
        "logits": keras.layers.Dense(3, use_bias=False, name="logits")(x),
        "mask_logits": keras.layers.Rescaling(-1 / 16, 8.0, name="mask_logits")(image),
    }
    model = cxr_tf.MultiTask(
        image,
        {head: outputs[head] for head in heads},
        encoder_name="by_hand",
        encoder_layers={f"stride_{stride}": f"pool{stride}" for stride in (2, 4, 8, 16, 32)},
    )
    if "logits" in heads:
        model.get_layer("logits").kernel.assign([[1.0, -1.0, 0.0]])
    return model


def squares(*cells: tuple[int, int], shape: tuple[int, int] = (96, 96)) -> np.ndarray:
    """A dark film with bright squares at (row, column) of a grid of 32 pixels."""
    film = np.full(shape, BACKGROUND, np.uint8)
    for row, column in cells:
        film[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = 192
    return film


def boxes(*cells: tuple[int, int]) -> list[list[float]]:
    return [[column * CELL, row * CELL, CELL, CELL] for row, column in cells]


def shards_of(
    root: Path, films: list[np.ndarray], labels: list[list[float]], drawn: list[Any], classes: list[str]
) -> ShardFolder:
    """Films with labels and boxes; None instead of boxes is a film that nobody annotated."""
    for i, film in enumerate(films):
        Image.fromarray(film).save(root / f"{i}.png")
    n = len(films)
    manifest = make_manifest(
        {
            "image": [str(root / f"{i}.png") for i in range(n)],
            "source": ["here"] * n,
            **{name: [str(i) for i in range(n)] for name in ("patient_id", "study_id")},
            **{name: [None] * n for name in ("view", "sex", "mask", "split")},
            "age": [NAN] * n,
            **{f"label:{name}": [label[c] for label in labels] for c, name in enumerate(classes)},
            "boxes": [each or [] for each in drawn],
            "mask_known": [each is not None for each in drawn],
        }
    )
    return prepare(manifest, root / "shards", storage_size=max(films[0].shape), workers=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    films, labels, drawn = zip(
        (squares((1, 1)), [1, 0, 0], boxes((1, 1))),
        (squares((0, 2), (2, 0)), [1, 0, 0], boxes((0, 2))),
        (255 - squares((2, 0)), [0, 1, 0], boxes((2, 0))),
        (squares(), [0, 0, 1], []),  # nothing to be seen
        (squares((1, 1)), [1, 0, 0], None),  # nobody annotated it
        (255 - squares((1, 0)), [NAN, NAN, NAN], boxes((1, 0))),  # nobody said what it is
        (squares((0, 0)), [1, 1, 0], boxes((0, 0))),
        strict=True,
    )  # fmt: skip
    return shards_of(tmp_path_factory.mktemp("films"), list(films), list(labels), list(drawn), CLASSES)


def explain(model: cxr_tf.MultiTask, shards: ShardFolder, keys: Any = range(7), **changes: Any) -> dict[str, Any]:
    keys = np.array(keys)
    settings = {"classes": CLASSES, "size": 96, "batch_size": 4, "patients": keys, "replicates": 50} | changes
    found = explain_films(model, shards, keys, **settings)
    json.dumps(found, allow_nan=False)
    return found


def values(section: dict[str, Any], figure: str) -> dict[str, float]:
    return {name: each[figure]["value"] for name, each in section.items()}


def test_figures_of_films_by_hand(shards: ShardFolder) -> None:
    found = explain(by_hand(), shards)
    assert found["n"] == {"films": 7, "annotated": 5, "explained": 4}
    assert list(found["classes"]) == ["bright", "dark"]
    bright, dark = found["classes"]["bright"], found["classes"]["dark"]
    # Film 1 has a second bright square, as high as the annotated one; film 6 is bright and explained as dark, too: dark
    # is everything but its annotation.
    assert bright["grad_cam"]["pointing_game"]["value"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert dark["grad_cam"]["pointing_game"]["value"] == pytest.approx((1 + 0) / 2)
    overall = found["overall"]
    assert overall["grad_cam"]["pointing_game"]["value"] == pytest.approx((1 + 0.5 + 1 + 1 + 0) / 5)
    assert overall["grad_cam"]["pointing_game"]["n"] == 5
    assert overall["grad_cam"]["pointing_game"]["patients"] == 4
    # The segmentation head sees what is dark, on film 5, too, whose class nobody knows.
    assert overall["segmentation"]["pointing_game"]["value"] == pytest.approx((0 + 0 + 1 + 1 + 0 + 0) / 6)
    assert overall["segmentation"]["iou_at_area"]["value"] == pytest.approx((0 + 0 + 1 + 1 + 0 + 0) / 6)
    assert overall["segmentation"]["iou_at_area"]["n"] == 6
    both = CELL**2 / 9
    chance = both / (2 * CELL**2 - both)
    assert values(overall, "pointing_game")["chance"] == pytest.approx(1 / 9)
    assert values(overall, "iou_at_area")["chance"] == pytest.approx(chance)
    for name in ("grad_cam", "segmentation", "randomized"):
        for figure in ("pointing_game", "iou_at_area"):
            above, value = overall[name][f"{figure}_above_chance"]["value"], overall[name][figure]["value"]
            assert above == pytest.approx(value - overall["chance"][figure]["value"])


def test_maps_are_those_of_the_true_class(shards: ShardFolder) -> None:
    found = explain(by_hand(), shards, [0, 2])["overall"]["grad_cam"]["iou_at_area"]["value"]
    films = np.stack([squares((1, 1)), 255 - squares((2, 0))]).astype("float32")[..., None]
    maps = saliency_of(by_hand(), films, [0, 1])
    expected = [iou_at_area(one, film[..., 0] == film[48, 48]) for one, film in zip(maps[:1], films[:1], strict=True)]
    expected.append(iou_at_area(maps[1], films[1, ..., 0] == 255 - 192))
    assert found == pytest.approx(np.mean(expected))
    assert 0.5 < found < 1


def test_a_map_that_does_not_change_with_the_weights_is_told(shards: ShardFolder) -> None:
    """Nothing was learned below the logits, so random weights give the same map, or its opposite."""
    found = explain(by_hand(), shards, [0])["overall"]["randomized"]
    assert found["absolute_rank_correlation"]["value"] == pytest.approx(1, abs=0.01)
    assert found["rank_correlation"]["value"] == pytest.approx(1 / 3, abs=0.01)  # two alike, one the opposite


def test_share_in_lungs_is_over_films_whose_lungs_are_known(shards: ShardFolder) -> None:
    lungs = np.zeros((3, 96, 96), bool)
    lungs[0, :, :48] = True
    lungs[1, :, 80:] = True
    found = explain(by_hand(), shards, [0, 1, 2], lungs=lungs)["overall"]
    maps = saliency_of(by_hand(), squares((0, 2), (2, 0)).astype("float32")[None, ..., None], [0])
    share = found["grad_cam"]["share_in_lungs"]
    assert share["n"] == 2
    assert share["value"] == pytest.approx((0.5 + share_inside(maps[0], lungs[1])) / 2)
    assert found["chance"]["share_in_lungs"]["value"] == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert found["chance"]["pointing_game"]["n"] == 3
    none = explain(by_hand(), shards, [2], lungs=lungs[2:])["overall"]["segmentation"]["share_in_lungs"]
    assert (none["value"], none["note"]) == (None, "not measurable: no annotated film can give it")


def test_batches_change_nothing(shards: ShardFolder) -> None:
    one, other = (explain(by_hand(), shards, batch_size=size) for size in (1, 16))
    for figure in ("pointing_game", "iou_at_area"):
        assert values(one["overall"], figure) == pytest.approx(values(other["overall"], figure))


def test_a_tolerance_is_for_the_highest_point_alone(shards: ShardFolder) -> None:
    strict, lenient = (explain(by_hand(), shards, [1], tolerance=pixels)["overall"] for pixels in (0, 100))
    assert [found["grad_cam"]["pointing_game"]["value"] for found in (strict, lenient)] == [0.5, 1]
    assert values(lenient, "pointing_game")["chance"] > values(strict, "pointing_game")["chance"]
    assert values(lenient, "iou_at_area") == values(strict, "iou_at_area")


def test_padding_does_not_count(tmp_path: Path) -> None:
    """The padding is the darkest of all, and the film's narrow: a third of the square."""
    film = 255 - squares((1, 0), shape=(96, CELL))
    shards = shards_of(tmp_path, [film, film], [[0, 1, 0]] * 2, [boxes((1, 0))] * 2, CLASSES)
    lungs = np.zeros((2, 96, 96), bool)
    lungs[:, 32:64] = True  # beyond the film, too
    found = explain(by_hand(), shards, range(2), lungs=lungs)["overall"]
    assert values(found, "pointing_game")["chance"] == pytest.approx(1 / 3)
    assert values(found, "share_in_lungs")["chance"] == pytest.approx(1 / 3)
    assert values(found, "iou_at_area")["chance"] == pytest.approx((1 / 3) / (2 - 1 / 3))
    assert values(found, "pointing_game")["segmentation"] == 1
    assert values(found, "iou_at_area")["segmentation"] == 1


def test_what_cannot_be_measured_says_why(shards: ShardFolder) -> None:
    overall = explain(by_hand(("logits",)), shards)["overall"]
    assert overall["segmentation"]["pointing_game"]["note"] == "not measurable: the model has no segmentation head"
    assert overall["grad_cam"]["share_in_lungs"]["note"] == "not measurable: no lung masks were given"
    assert overall["grad_cam"]["pointing_game"]["value"] is not None
    segmenting = explain(by_hand(("mask_logits",)), shards)
    for name in ("grad_cam", "randomized"):
        estimate = segmenting["overall"][name]["pointing_game_above_chance"]
        assert (estimate["value"], estimate["note"]) == (None, "not measurable: the model has no classification head")
    assert segmenting["overall"]["segmentation"]["pointing_game"]["n"] == 6
    nothing = explain(by_hand(), shards, [3, 4])
    assert nothing["n"] == {"films": 2, "annotated": 0, "explained": 0}
    assert nothing["classes"] == {}
    assert nothing["overall"].keys() == overall.keys()
    for name, section in nothing["overall"].items():
        assert section.keys() == overall[name].keys()
        for estimate in section.values():
            assert (estimate["value"], estimate["note"]) == (None, "not measurable: no film has an annotated opacity")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"patients": np.zeros(3)}, r"Patients must be \[7\], one a film. Received: \(3,\)"),
        ({"lungs": np.zeros((7, 96, 96))}, r"Lungs must be bool \[7, 96, 96\]. Received: float64"),
        ({"lungs": np.zeros((7, 32, 32), bool)}, r"Received: bool \(7, 32, 32\)"),
        ({"tolerance": -1}, "Received: -1"),
        ({"replicates": 0}, "replicates"),
    ],
)
def test_what_does_not_fit_is_named(shards: ShardFolder, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CxrError, match=text):
        explain(by_hand(), shards, **changes)


# --- a model that has learned where to look ---------------------------------------------------------------------------

SIDE, PATCH = 160, 48


def stripes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[list[list[float]]]]:
    """Noise, with a patch of stripes across (class 0) or down (class 1), or none (class 2); classes, and boxes.

    The patch is as bright and as uneven as the noise around it, so that nothing but what was learned points at it.
    """
    rng = np.random.default_rng(seed)
    films, labels, drawn = rng.normal(0, 1, (n, SIDE, SIDE)), rng.integers(3, size=n), []
    for film, label in zip(films, labels, strict=True):
        top, left = rng.integers(SIDE - PATCH, size=2)
        wave = np.sqrt(2) * np.sin(np.pi * np.arange(PATCH) / 2 + rng.uniform(0, 2 * np.pi))
        if label < 2:
            film[top : top + PATCH, left : left + PATCH] = wave[:, None] if label == 0 else wave[None, :]
        drawn.append([[float(left), float(top), PATCH, PATCH]] if label < 2 else [])
    return np.clip(128 + 40 * films, 0, 255).astype(np.uint8), labels, drawn


def small_encoder() -> keras.Model:
    image = keras.Input((None, None, 1), name="image")
    x, levels = Standardize(128.0, 40.0, multiple=32, name="standardize")(image), {}
    for stride, channels in ((2, 16), (4, 16), (8, 24), (16, 32), (32, 32)):
        x = keras.layers.Conv2D(channels, 3, 2, padding="same", use_bias=False, name=f"conv{stride}")(x)
        x = keras.layers.ReLU(name=f"relu{stride}")(normalization_layer("batch", channels, name=f"norm{stride}")(x))
        levels[f"stride_{stride}"] = x
    return keras.Model(image, levels, name="small")


@pytest.fixture(scope="module")
def learned() -> cxr_tf.MultiTask:
    """A model that tells the two kinds of stripes and their absence apart."""
    keras.utils.set_random_seed(0)
    model = cxr_tf.multitask(small_encoder(), (SIDE, SIDE, 1), 3, hidden=16, dropout=0.0, segmentation=False)
    model.compile(keras.optimizers.AdamW(3e-3))
    films, labels, _ = stripes(768, seed=0)
    model.fit(
        films.astype("float32")[..., None],
        {"logits": np.eye(3, dtype="float32")[labels]},
        batch_size=32,
        epochs=6,
        verbose=0,
    )
    return model


@pytest.fixture(scope="module")
def striped(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    films, labels, drawn = stripes(120, seed=1)
    return shards_of(
        tmp_path_factory.mktemp("striped"), list(films), np.eye(3)[labels].tolist(), drawn, ["across", "down", "none"]
    )


def explain_stripes(model: cxr_tf.MultiTask, striped: ShardFolder) -> dict[str, Any]:
    return explain(model, striped, range(120), classes=["across", "down", "none"], size=SIDE, replicates=200)


@pytest.mark.slow
def test_a_model_that_has_learned_points_at_the_finding_and_one_that_has_not_does_not(
    learned: cxr_tf.MultiTask, striped: ShardFolder
) -> None:
    found = explain_stripes(learned, striped)
    overall = found["overall"]
    assert overall["chance"]["pointing_game"]["value"] == pytest.approx((PATCH / SIDE) ** 2)
    assert overall["grad_cam"]["pointing_game_above_chance"]["low"] > 0.7
    assert overall["grad_cam"]["iou_at_area_above_chance"]["low"] > 0.5
    for name in ("across", "down"):
        assert found["classes"][name]["grad_cam"]["pointing_game_above_chance"]["low"] > 0.7
    assert abs(overall["randomized"]["pointing_game_above_chance"]["value"]) < 0.15
    assert abs(overall["randomized"]["rank_correlation"]["value"]) < 0.3
    assert overall["randomized"]["absolute_rank_correlation"]["high"] < 0.5
    untrained = explain_stripes(randomized(learned, seed=100), striped)["overall"]
    assert abs(untrained["grad_cam"]["pointing_game_above_chance"]["value"]) < 0.15
