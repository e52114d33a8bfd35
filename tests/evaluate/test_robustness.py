"""Corruptions against their laws and other libraries, and the judgement of models whose answers are known."""

from __future__ import annotations

import io
import json
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sklearn.metrics import roc_auc_score

from cxr_tf.data.manifest import make_manifest
from cxr_tf.data.phantom import phantom
from cxr_tf.data.shards import ShardFolder, prepare
from cxr_tf.errors import CxrError
from cxr_tf.evaluate.inference import Films
from cxr_tf.evaluate.robustness import CORRUPTIONS, STRENGTHS, Ordered, corrupted, moved_truth, robustness, rotated

ALL = [(name, strength) for name in CORRUPTIONS for strength in STRENGTHS]
NEUTRAL = {"contrast": 1, "noise": 0, "blur": 0, "rotation": 0, "shift": 0, "resolution": 1, "polarity": 0}

pixels = arrays(np.float32, st.tuples(st.integers(1, 24), st.integers(1, 24)), elements=st.integers(0, 255))


def batch(films: int = 8, size: int = 48, width: int = 36) -> Films:
    """Generated films, narrower than their square; every other one is annotated."""
    images, truth = (np.zeros((films, size, size, 1), np.float32) for _ in range(2))
    left = (size - width) // 2
    for i in range(films):
        drawn = phantom("Typical Appearance", np.random.default_rng(i), size)
        pixels = drawn.pixels[:, left : left + width]
        images[i, :, left : left + width, 0] = np.interp(pixels, [pixels.min(), pixels.max()], [0, 255])
        truth[i, :, left : left + width, 0] = drawn.opacity[:, left : left + width]
    truth[1::2] = np.nan
    content = np.zeros(images.shape, bool)
    content[:, :, left : left + width] = True
    return Films(images, np.arange(films) + 5, content, truth)


def changed(name: str, film: np.ndarray, value: float, seed: int = 0) -> np.ndarray:
    return CORRUPTIONS[name].change(film, value, np.random.default_rng(seed))


@pytest.mark.parametrize(("name", "strength"), ALL)
def test_films_change_within_their_range_and_padding_does_not(name: str, strength: int) -> None:
    films = batch()
    before = films.images.copy()
    got = corrupted(films, name, strength)
    np.testing.assert_array_equal(films.images, before)
    assert (got.shape, got.dtype) == (before.shape, np.float32)
    assert 0 <= got.min() <= got.max() <= 255
    np.testing.assert_array_equal(got[~films.content], 0)
    assert (got != before).any((1, 2, 3)).all()
    np.testing.assert_array_equal(corrupted(films, name, 0), before)


@pytest.mark.parametrize(("name", "strength"), ALL)
def test_a_film_does_not_depend_on_its_batch(name: str, strength: int) -> None:
    films = batch()
    got = corrupted(films, name, strength, seed=3)
    for i in (0, 3, 7):
        one = Films(*(part[i : i + 1] for part in films))
        np.testing.assert_array_equal(corrupted(one, name, strength, seed=3), got[i : i + 1])
        np.testing.assert_array_equal(
            moved_truth(one, name, strength, 3), moved_truth(films, name, strength, 3)[i : i + 1]
        )


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_higher_strengths_change_films_more(name: str) -> None:
    films = batch()
    change = []
    for strength in range(6):
        got = corrupted(films, name, strength)
        if name == "polarity":  # a curve that turns around moves gray levels by no more, but orders them less
            change.append(-np.corrcoef(got[films.content], films.images[films.content])[0, 1])
        else:
            change.append(np.abs(got - films.images).mean())
    assert (np.diff(change) > 0).all(), change


@given(pixels)
@settings(max_examples=30, deadline=None)
def test_neutral_values_change_nothing(film: np.ndarray) -> None:
    for name, value in NEUTRAL.items():
        np.testing.assert_array_equal(changed(name, film, value), film, err_msg=name)


@given(pixels, st.sampled_from(CORRUPTIONS["contrast"].values))
@settings(max_examples=30, deadline=None)
def test_contrast_keeps_the_mean_and_scales_the_spread(film: np.ndarray, factor: float) -> None:
    got = changed("contrast", film, factor)
    assert got.mean(dtype=float) == pytest.approx(film.mean(dtype=float), abs=1e-3)
    assert got.std(dtype=float) == pytest.approx(factor * film.std(dtype=float), abs=1e-3)


def test_noise_has_the_stated_deviation_and_one_pattern_at_all_strengths() -> None:
    film = np.full((200, 200), 127.5, np.float32)
    first, *others = [changed("noise", film, value) - film for value in CORRUPTIONS["noise"].values]
    assert first.std() == pytest.approx(0.01 * 255, rel=0.02)
    assert first.mean() == pytest.approx(0, abs=0.05)
    for noise, times in zip(others, (2, 4, 8, 16), strict=True):
        np.testing.assert_allclose(noise, times * first, atol=1e-3)
    assert np.abs(np.corrcoef(first.ravel(), changed("noise", film, 0.01, seed=1).ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("part", CORRUPTIONS["blur"].values[2:])
def test_blur_has_the_stated_deviation(part: float) -> None:
    film = np.zeros((101, 301), np.float32)
    film[50, 150] = 255
    spread = changed("blur", film, part)
    assert spread.sum() == pytest.approx(255, rel=1e-3)
    for axis, middle in ((0, 50), (1, 150)):
        line = spread.sum(1 - axis) / spread.sum()
        assert np.sqrt(line @ (np.arange(len(line)) - middle) ** 2.0) == pytest.approx(part * 301, rel=0.03)
    flat = np.full((20, 30), 77, np.float32)
    np.testing.assert_allclose(changed("blur", flat, part), flat, rtol=1e-6)


def test_films_turn_about_their_middle_to_either_side() -> None:
    film = np.random.default_rng(0).uniform(0, 255, (31, 31)).astype(np.float32)
    np.testing.assert_allclose(rotated(film, 90), np.rot90(film), atol=1e-3)
    for degrees in CORRUPTIONS["rotation"].values:
        ways = [rotated(film, degrees), rotated(film, -degrees)]
        seen = {
            [np.array_equal(changed("rotation", film, degrees, seed), way) for way in ways].index(True)
            for seed in range(9)
        }
        assert seen == {0, 1}


@given(pixels, st.floats(0, 0.5), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_shifts_are_exact(film: np.ndarray, part: float, seed: int) -> None:
    by = round(part * max(film.shape))
    got = changed("shift", film, part, seed)
    ways = []
    for axis in (0, 1):
        for sign in (-1, 1):
            wide = np.pad(film, [(by, by) if a == axis else (0, 0) for a in (0, 1)])
            ways.append(np.roll(wide, sign * by, axis)[by:][: len(film)] if axis == 0 else
                        np.roll(wide, sign * by, axis)[:, by:][:, : film.shape[1]])  # fmt: skip
    assert any(np.array_equal(got, way) for way in ways)


@pytest.mark.parametrize("quality", CORRUPTIONS["jpeg"].values)
def test_jpeg_is_pillows(quality: int) -> None:
    film = batch(1).images[0, :, 6:42, 0]
    file = io.BytesIO()
    Image.fromarray(np.round(film).astype(np.uint8), "L").save(file, "JPEG", quality=quality)
    np.testing.assert_array_equal(changed("jpeg", film, quality), np.array(Image.open(file)))


@pytest.mark.parametrize("factor", CORRUPTIONS["resolution"].values)
def test_resolution_is_tensorflows_resize_down_and_up(factor: int) -> None:
    film = np.random.default_rng(0).uniform(0, 255, (48, 36)).astype(np.float32)
    small = tf.image.resize(film[..., None], [round(48 / factor), round(36 / factor)], antialias=True)
    expected = tf.image.resize(small, film.shape, antialias=True)[..., 0]
    np.testing.assert_allclose(changed("resolution", film, factor), expected, atol=0.01)


@given(pixels)
@settings(max_examples=30, deadline=None)
def test_polarity_falls_and_then_rises_up_to_the_negative(film: np.ndarray) -> None:
    for part in CORRUPTIONS["polarity"].values:
        ends = [255 * part, 0, 255 * (1 - part)]
        curve = np.interp(film, [0, 255 * part, 255], 255 * np.array(ends) / max(ends))
        np.testing.assert_allclose(changed("polarity", film, part), curve, atol=1e-3)
    np.testing.assert_array_equal(changed("polarity", film, 1.0), 255 - film)


@pytest.mark.parametrize(("name", "strength"), [case for case in ALL if CORRUPTIONS[case[0]].moves])
def test_masks_move_with_their_films(name: str, strength: int) -> None:
    films = batch()
    drawn = films._replace(images=255 * np.nan_to_num(films.truth))
    moved = moved_truth(films, name, strength, seed=2)
    np.testing.assert_array_equal(moved[::2], (corrupted(drawn, name, strength, seed=2) >= 127.5)[::2])
    assert np.isnan(moved[1::2]).all()
    assert (moved[::2] != films.truth[::2]).any()


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if not CORRUPTIONS[name].moves])
def test_other_masks_stay(name: str) -> None:
    films = batch(2)
    np.testing.assert_array_equal(moved_truth(films, name, 5), films.truth)


def test_what_is_no_corruption_is_named() -> None:
    with pytest.raises(CxrError, match=r'Did you mean "noise"\? Received: \'nose\''):
        corrupted(batch(1), "nose", 1)
    with pytest.raises(CxrError, match="Received: 6"):
        moved_truth(batch(1), "noise", 6)


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([0.0, 1.0, np.nan]), st.integers(0, 3)), min_size=1, max_size=15
    )
)
@settings(max_examples=100, deadline=None)
def test_auroc_of_draws_is_scikit_learns(films: list[tuple[int, float, int]]) -> None:
    scores, truth, weights = (np.array(column, float) for column in zip(*films, strict=True))
    got = Ordered(scores, truth).auroc(np.stack([weights, np.ones(len(films))], 1))
    for one, weight in zip(got, (weights, np.ones(len(films))), strict=True):
        used = ~np.isnan(truth) & (weight > 0)
        if len(np.unique(truth[used])) < 2:
            assert np.isnan(one)
        else:
            assert one == pytest.approx(roc_auc_score(truth[used], scores[used], sample_weight=weight[used]))


# --- a model ----------------------------------------------------------------------------------------------------------

SIZE, FILMS = 32, 24
OPERATING = {
    "classes": ["clear", "opacity"],
    "task": "multiclass",
    "size": SIZE,
    "temperature": 1.0,
    "thresholds": {"clear": 0.5, "opacity": 0.5},
    "mask_threshold": 0.5,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    """Every other film has a bright square, in the middle, and a label and a box for it; two films a patient."""
    root = tmp_path_factory.mktemp("films")
    boxes: list[list[list[float]]] = []
    for i in range(FILMS):
        film = np.full((SIZE, SIZE), 55, np.uint8)
        side = 8 + i % 4 if i % 2 else 0
        film[12 : 12 + side, 12 : 12 + side] = 200
        Image.fromarray(film).save(root / f"{i}.png")
        boxes.append([[12.0, 12.0, side, side]] if side else [])
    manifest = make_manifest(
        {
            "image": [str(root / f"{i}.png") for i in range(FILMS)],
            "source": ["here"] * FILMS,
            "patient_id": [str(i // 2) for i in range(FILMS)],
            "study_id": [str(i) for i in range(FILMS)],
            **{name: [None] * FILMS for name in ("view", "sex", "mask", "split")},
            "age": [float("nan")] * FILMS,
            "label:clear": [float(i % 2 == 0) for i in range(FILMS)],
            "label:opacity": [float(i % 2) for i in range(FILMS)],
            "boxes": boxes,
            "mask_known": [True] * FILMS,
        }
    )
    return prepare(manifest, root / "shards", storage_size=SIZE, workers=0)


def brightness(*heads: str, weight: float = 1.0) -> keras.Model:
    """Says "opacity" of films with a mean above 58, and sees it in pixels above 127.5."""
    image = keras.Input((SIZE, SIZE, 1))
    mean = keras.layers.GlobalAveragePooling2D()(image)
    dense = keras.layers.Dense(2)
    outputs = {"logits": dense(mean), "mask_logits": keras.layers.Rescaling(1.0, -127.5)(image)}
    dense.set_weights([np.array([[0.0, weight]]), np.array([0.0, -58.0 * weight])])
    return keras.Model(image, {head: outputs[head] for head in heads or outputs})


def judged(shards: ShardFolder, model: keras.Model, **changes: Any) -> dict[str, Any]:
    operating = OPERATING | changes.pop("operating", {})
    found = robustness(model, shards, np.arange(FILMS), operating, **({"batch_size": 8, "replicates": 50} | changes))
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.fixture(scope="module")
def found(shards: ShardFolder) -> dict[str, Any]:
    return judged(shards, brightness())


def values(estimates: list[dict[str, Any]]) -> list[float]:
    return [estimate["value"] for estimate in estimates]


def test_a_model_that_goes_by_brightness(found: dict[str, Any]) -> None:
    assert list(found["corruptions"]) == list(CORRUPTIONS)
    assert found["n"] == {"images": 24, "patients": 12, "annotated": 12}
    assert found["unchanged"]["auroc"]["value"] == 1
    by_class = {name: found["corruptions"][name]["classification"] for name in CORRUPTIONS}
    # Contrast goes about the mean, which is all that the model knows; the negative turns its order around.
    for figure, value in (("auroc", 1), ("difference", 0), ("kept", 1), ("same_call", 1)):
        assert values(by_class["contrast"][figure]) == [pytest.approx(value)] * 5
    assert by_class["contrast"]["mean_kept"]["value"] == 1
    negative = {figure: estimates[4] for figure, estimates in by_class["polarity"].items() if figure != "mean_kept"}
    assert (negative["auroc"]["value"], negative["difference"]["value"], negative["kept"]["value"]) == (0, -1, -1)
    assert negative["same_call"]["value"] == 0.5  # everything is bright, so all is called an opacity
    means = []
    for name, figures in by_class.items():
        kept = (np.array(values(figures["auroc"])) - 0.5) / 0.5
        assert values(figures["kept"]) == pytest.approx(kept)
        assert figures["mean_kept"]["value"] == pytest.approx(kept.mean()), name
        means.append(kept.mean())
    assert found["kept"]["value"] == pytest.approx(np.mean(means))
    assert found["kept"]["low"] is not None
    assert found["corruptions"]["noise"]["values"] == [0.01, 0.02, 0.04, 0.08, 0.16]


def test_masks_of_a_model_that_goes_by_brightness(shards: ShardFolder, found: dict[str, Any]) -> None:
    assert found["unchanged"]["dice"]["value"] == 1
    assert found["unchanged"]["dice"]["n"] == 12
    by_mask = {name: found["corruptions"][name]["segmentation"] for name in CORRUPTIONS}
    assert values(by_mask["shift"]["dice"]) == [1] * 5
    assert min(values(by_mask["rotation"]["dice"])) > 0.97  # the truth turns with the film
    assert by_mask["polarity"]["dice"][4]["value"] == 0
    assert by_mask["polarity"]["kept"][4]["value"] == 0
    assert by_mask["polarity"]["difference"][4]["value"] == -1
    alone = judged(shards, brightness("mask_logits"), operating={"classes": [], "thresholds": {}})
    assert alone["unchanged"].keys() == {"dice"}
    assert alone["corruptions"]["noise"].keys() == {"title", "unit", "values", "segmentation"}
    assert alone["corruptions"]["noise"]["segmentation"] == by_mask["noise"]
    assert alone["kept"]["value"] == pytest.approx(
        np.mean([by_mask[name]["mean_kept"]["value"] for name in CORRUPTIONS])
    )
    assert found["kept"] != alone["kept"]


def test_batches_of_any_size_give_the_same(shards: ShardFolder, found: dict[str, Any]) -> None:
    assert judged(shards, brightness(), batch_size=5) == found


def test_every_call_of_a_multi_label_model_counts(shards: ShardFolder) -> None:
    # "clear" is called on no film, whatever happens; "opacity" of no clear film, but of every negative.
    found = judged(
        shards, brightness("logits"), operating={"task": "multilabel", "thresholds": {"clear": 0.6, "opacity": 0.5}}
    )
    polarity = found["corruptions"]["polarity"]["classification"]
    assert polarity["same_call"][4]["value"] == 0.5
    assert values(found["corruptions"]["contrast"]["classification"]["same_call"]) == [1] * 5
    assert "segmentation" not in found["corruptions"]["polarity"]


def test_without_skill_none_can_be_kept(shards: ShardFolder) -> None:
    found = judged(shards, brightness("logits", weight=0.0))
    assert found["unchanged"]["auroc"]["value"] == 0.5
    assert (found["kept"]["value"], found["kept"]["low"]) == (None, None)
    assert "no skill on the films as they are" in found["kept"]["note"]
    assert "no skill" in found["corruptions"]["blur"]["classification"]["kept"][0]["note"]
    assert values(found["corruptions"]["blur"]["classification"]["difference"]) == [0] * 5


def test_one_outcome_is_not_measurable(shards: ShardFolder) -> None:
    found = robustness(brightness(), shards, np.arange(0, FILMS, 2), OPERATING, batch_size=8, replicates=20)
    json.dumps(found, allow_nan=False)
    assert found["kept"]["value"] is None
    assert "not measurable" in found["kept"]["note"]
    assert found["unchanged"]["dice"]["n"] == 0
    assert found["corruptions"]["contrast"]["classification"]["same_call"][0]["value"] == 1
