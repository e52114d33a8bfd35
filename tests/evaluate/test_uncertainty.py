"""Selective prediction by hand, out-of-distribution scores against other libraries, and the whole on small models."""

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
from scipy.special import logit
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score

import cxr_tf
from cxr_tf.data.manifest import make_manifest
from cxr_tf.data.shards import ShardFolder, prepare
from cxr_tf.errors import CxrError
from cxr_tf.evaluate.calibration import probabilities_of
from cxr_tf.evaluate.inference import Films, predict_changed, predict_films
from cxr_tf.evaluate.uncertainty import (
    LATERAL,
    MILD,
    NON_CHEST,
    TURNED,
    Referred,
    aurc,
    aurc_of,
    certainty,
    energy,
    error_at_of,
    excess_aurc,
    mahalanobis,
    outside,
    uncertainty,
)
from cxr_tf.pretrain.features import features, reader

# --- selective prediction ---------------------------------------------------------------------------------------------

SURE, WRONG = (
    np.array([0.7, 0.9, 0.5, 0.8, 0.6]),
    np.array([1.0, 0, 1, 0, 0]),
)  # falling: right, right, wrong, right, wrong

films_of = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 3)), min_size=1, max_size=12
)


def split(films: list[tuple[int, float, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sure, error, weights = (np.array(column, float) for column in zip(*films, strict=True))
    return sure, error, weights


def test_five_films_by_hand() -> None:
    assert aurc(SURE, WRONG) == pytest.approx((0 / 1 + 0 / 2 + 1 / 3 + 1 / 4 + 2 / 5) / 5)
    best = (0 + 0 + 0 + 1 / 4 + 2 / 5) / 5
    assert excess_aurc(SURE, WRONG) == pytest.approx(aurc(SURE, WRONG) - best)
    counts = Referred(SURE, WRONG).counts(np.ones((1, 5)))
    got = error_at_of(*counts, np.array([0.2, 0.4, 0.5, 0.6, 0.8, 1.0]))[0]
    assert got == pytest.approx([0, 0, 0.5 / 2.5, 1 / 3, 1 / 4, 2 / 5])


def test_unknown_films_are_left_out() -> None:
    assert aurc(np.append(SURE, 0.95), np.append(WRONG, np.nan)) == pytest.approx(aurc(SURE, WRONG))
    assert np.isnan(aurc(SURE, np.full(5, np.nan)))
    assert np.isnan(error_at_of(*Referred(SURE, np.full(5, np.nan)).counts(np.ones((1, 5))), np.array([0.8]))).all()


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 1.0])), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_films_of_equal_confidence_are_referred_in_random_order(films: list[tuple[int, float]]) -> None:
    sure, error = (np.array(column, float) for column in zip(*films, strict=True))
    every = [
        np.mean(np.cumsum(error[list(order)]) / np.arange(1, len(films) + 1))
        for order in itertools.permutations(range(len(films)))
        if (np.diff(sure[list(order)]) <= 0).all()
    ]
    assert aurc(sure, error) == pytest.approx(np.mean(every))


@given(films_of)
@settings(max_examples=60, deadline=None)
def test_weights_are_copies(films: list[tuple[int, float, int]]) -> None:
    sure, error, weights = split(films)
    copies = weights.astype(int)
    order = Referred(sure, error)
    weighted = aurc_of(*order.counts(np.stack([weights, np.ones(len(films))])))
    again = aurc(np.repeat(sure, copies), np.repeat(error, copies)) if copies.any() else np.nan
    assert weighted == pytest.approx([again, aurc(sure, error)], nan_ok=True)


@given(films_of)
@settings(max_examples=60, deadline=None)
def test_no_order_is_better_than_the_best(films: list[tuple[int, float, int]]) -> None:
    sure, error, _ = split(films)
    assert excess_aurc(sure, error) >= -1e-12
    assert excess_aurc(-error, error) == pytest.approx(0, abs=1e-12)
    assert aurc(np.zeros(len(films)), error) == pytest.approx(error.mean())
    order = np.random.default_rng(0).permutation(len(films))
    assert aurc(sure[order], error[order]) == pytest.approx(aurc(sure, error))


@pytest.mark.parametrize(
    ("sure", "error", "text"),
    [
        (SURE, WRONG[:3], "one a film"),
        (SURE[None], WRONG[None], "one a film"),
        (SURE * np.nan, WRONG, "Confidences are numbers"),
        (SURE, 2 * WRONG, "errors lie in 0-1"),
    ],
)
def test_what_is_no_error_is_refused(sure: np.ndarray, error: np.ndarray, text: str) -> None:
    with pytest.raises(CxrError, match=text):
        aurc(sure, error)


def test_confidence_of_one_class_a_film() -> None:
    z = np.log([[0.7, 0.2, 0.1], [0.3, 0.3001, 0.4], [0.1, 0.8, 0.1]])
    y = np.array([[1, 0, 0], [0, 1, 0], [np.nan, np.nan, np.nan]])
    sure, wrong = certainty(z, y, "multiclass", 1.0, np.full(3, 0.5))
    assert sure == pytest.approx([0.7, 0.4 / 1.0001, 0.8])
    np.testing.assert_array_equal(wrong, [0, 1, np.nan])
    assert certainty(z, y, "multiclass", 2.0, np.full(3, 0.5))[0][0] == pytest.approx(
        probabilities_of(z, "multiclass", 2)[0, 0]
    )


def test_confidence_of_several_labels_is_that_of_the_least_certain_call() -> None:
    p = np.array([[0.9, 0.25], [0.5, 0.1], [0.2, 0.8]])
    y = np.array([[1, 1], [0, np.nan], [np.nan, np.nan]])
    cuts = np.array([0.6, 0.2])
    sure, wrong = certainty(2 * logit(p), y, "multilabel", 2.0, cuts)
    assert sure == pytest.approx(np.abs(logit(p) - logit(cuts)).min(1))
    np.testing.assert_array_equal(wrong, [0, 0, np.nan])
    assert certainty(2 * logit(p), 1 - y, "multilabel", 2.0, cuts)[1][:2].tolist() == [1, 1]
    half = np.array([[1, 0], [1, 0], [0, 1]])
    assert certainty(2 * logit(p), half, "multilabel", 2.0, cuts)[1].tolist() == [0.5, 0.5, 0]
    extreme = certainty(np.array([[800.0, -800.0]]), half[:1], "multilabel", 1.0, np.array([np.nextafter(1, 2), 0.0]))
    assert np.isfinite(extreme[0]).all()


# --- out of distribution ----------------------------------------------------------------------------------------------


def test_energy_is_its_formula() -> None:
    z = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(energy(z, "multiclass"), -np.log(np.exp(z).sum(1)))
    np.testing.assert_allclose(energy(z, "multilabel"), -np.log1p(np.exp(z)).sum(1))
    assert np.isfinite(energy(1e4 * z, "multiclass")).all()


def test_mahalanobis_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    training, new = rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)) + 3, rng.normal(size=(9, 6))
    away, inverse = new - training.mean(0), np.linalg.inv(ledoit_wolf(training)[0])
    np.testing.assert_allclose(mahalanobis(training, new), np.sqrt(np.einsum("ni,ij,nj->n", away, inverse, away)))
    assert mahalanobis(training, training.mean(0)[None]) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(
        mahalanobis(np.repeat(training[:3], 2, 1), np.repeat(new, 2, 1))
    ).all()  # fewer films than channels


def batch(films: int = 8, size: int = 48, width: int = 37) -> Films:
    content = np.zeros((films, size, size, 1), bool)
    content[:, :, 5 : 5 + width] = True
    images = np.random.default_rng(0).uniform(0, 255, content.shape).astype(np.float32) * content
    return Films(images, np.arange(films), content, np.zeros_like(images))


@pytest.mark.parametrize("kind", [*NON_CHEST, TURNED])
def test_other_images_are_made_of_seed_and_row(kind: str) -> None:
    films = batch()
    got = outside(films, kind, seed=4)
    assert (got.shape, got.dtype) == (films.images.shape, np.float32)
    assert 0 <= got.min() < got.max() <= 255
    one = Films(*(part[5:6] for part in films))
    np.testing.assert_array_equal(outside(one, kind, seed=4), got[5:6])
    if kind == TURNED:
        np.testing.assert_array_equal(got[3, ..., 0], np.rot90(films.images[3, ..., 0]))
    else:
        np.testing.assert_array_equal(got[~films.content], 0)
        assert (got[0] != got[1]).any()
        assert (outside(films, kind, seed=5) != got).any()


def test_no_tile_of_a_scrambled_film_stays() -> None:
    films = batch()
    got = outside(films, "scrambled film")
    for before, after in zip(films.images[..., 0], got[..., 0], strict=True):
        tiles = [np.s_[12 * i : 12 * i + 12, 5 + 9 * j : 14 + 9 * j] for i in range(4) for j in range(4)]
        place = [[np.array_equal(before[a], after[b]) for b in tiles].index(True) for a in tiles]
        assert sorted(place) == list(range(16))
        assert all(to != at for at, to in enumerate(place))


# --- a model ----------------------------------------------------------------------------------------------------------

SIZE, FILMS = 32, 40
TEST, TRAIN, LATERALS = np.arange(12, 30), np.arange(12), np.arange(30, FILMS)
OPERATING: dict[str, Any] = {
    "classes": ["dark", "bright"],
    "task": "multiclass",
    "size": SIZE,
    "temperature": 1.5,
    "thresholds": {"dark": 0.5, "bright": 0.4},
    "mask_threshold": 0.5,
}


def made(root: Path, lateral: bool) -> ShardFolder:
    """Films of some gray and noise, two a patient; the last ten may be marked as laterals, and are stripes."""
    rng = np.random.default_rng(0)
    for i in range(FILMS):
        film = rng.normal(90 + 60 * (i % 2), 30, (SIZE, SIZE - 4)).clip(0, 255)
        if i >= 30:
            film[::2] = 255
        Image.fromarray(film.astype(np.uint8)).save(root / f"{i}.png")
    return prepare(
        make_manifest(
            {
                "image": [str(root / f"{i}.png") for i in range(FILMS)],
                "source": ["here"] * FILMS,
                "patient_id": [str(i // 2) for i in range(FILMS)],
                "study_id": [str(i) for i in range(FILMS)],
                "view": ["LATERAL" if lateral and i >= 30 else "PA" for i in range(FILMS)],
                **{name: [None] * FILMS for name in ("sex", "mask", "split")},
                "age": [float("nan")] * FILMS,
                "label:dark": [float(i % 2 == 0) for i in range(FILMS)],
                "label:bright": [float(i % 2) for i in range(FILMS)],
                "boxes": [[] for _ in range(FILMS)],
                "mask_known": [False] * FILMS,
            }
        ),
        root / "shards",
        storage_size=SIZE,
        workers=0,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    return made(tmp_path_factory.mktemp("films"), lateral=True)


def encoder() -> keras.Model:
    """The smallest there is: five convolutions."""
    image = keras.Input((SIZE, SIZE, 1))
    x, levels = keras.layers.Rescaling(1 / 128, -1.0)(image), {}
    for stride in (2, 4, 8, 16, 32):
        x = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="elu")(x)
        levels[f"stride_{stride}"] = x
    return keras.Model(image, levels)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(1)
    return cxr_tf.multitask(encoder(), (SIZE, SIZE, 1), 2, hidden=0, segmentation=False)


def judged(model: keras.Model, shards: ShardFolder, keys=TEST, training=TRAIN, **changes: Any) -> dict[str, Any]:
    found = uncertainty(model, shards, keys, training, OPERATING | changes, batch_size=8, replicates=30)
    return json.loads(json.dumps(found, allow_nan=False))


def test_figures_are_those_of_the_functions(model: keras.Model, shards: ShardFolder) -> None:
    found = judged(model, shards)
    settings = {"size": SIZE, "batch_size": 7}
    predicted = predict_films(model, shards, TEST, classes=OPERATING["classes"], **settings)
    p = probabilities_of(predicted.logits, "multiclass", 1.5)
    sure, wrong = p.max(1), (p.argmax(1) != predicted.labels.argmax(1)).astype(float)
    selective = found["selective"]
    assert selective["error"]["value"] == pytest.approx(wrong.mean())
    assert selective["aurc"]["value"] == pytest.approx(aurc(sure, wrong))
    assert selective["excess_aurc"]["value"] == pytest.approx(excess_aurc(sure, wrong))
    assert selective["auroc"]["value"] == pytest.approx(roc_auc_score(wrong, -sure))
    curve = selective["curve"]
    assert [point["coverage"] for point in curve] == pytest.approx(np.arange(1, 21) / 20)
    assert curve[-1]["error"] == pytest.approx(wrong.mean())
    assert curve[15]["error"] == pytest.approx(selective["error_at_80"]["value"])
    assert all(point["best"] <= point["error"] + 1e-12 for point in curve)
    assert curve[-1]["low"] <= curve[-1]["error"] <= curve[-1]["high"]

    agreement = found["agreement"]
    assert list(agreement["changes"]) == list(MILD)
    mirrored = {"mirrored": lambda films: films.images[:, :, ::-1]}  # films of even width: the padding is the same
    said = predict_changed(model, shards, TEST, mirrored, classes=OPERATING["classes"], **settings)["mirrored"]
    assert agreement["changes"]["mirrored"]["value"] == pytest.approx((said.argmax(1) == p.argmax(1)).mean())
    each = [agreement["changes"][name]["value"] for name in MILD]
    assert agreement["mean"]["value"] == pytest.approx(np.mean(each))

    out = found["out_of_distribution"]
    read = reader(model.encoder)
    train, test, lateral = (features(read, shards, keys, **settings) for keys in (TRAIN, TEST, LATERALS))
    own, others = mahalanobis(train, test), mahalanobis(train, lateral)
    expected = roc_auc_score(np.repeat([0, 1], [len(own), len(others)]), np.append(own, others))
    assert out["mahalanobis"]["kinds"][LATERAL]["value"] == pytest.approx(expected)
    assert out["auroc"] == out["mahalanobis"]["non_chest"]
    assert list(out["energy"]["kinds"]) == [*NON_CHEST, TURNED, LATERAL]
    turn = {"turned": lambda films: np.rot90(films.images, axes=(1, 2))}
    turned = energy(
        predict_changed(model, shards, TEST, turn, classes=OPERATING["classes"], **settings)["turned"], "multiclass"
    )
    plain = energy(predicted.logits, "multiclass")
    expected = roc_auc_score(np.repeat([0, 1], len(TEST)), np.append(plain, turned))
    assert out["energy"]["kinds"][TURNED]["value"] == pytest.approx(expected)
    assert out["auroc"]["n"] == len(TEST) * (1 + len(NON_CHEST))
    assert "10 real lateral films" in out["note"]
    assert out["fitted_on"] == 12


def test_laterals(model: keras.Model, shards: ShardFolder, tmp_path: Path) -> None:
    # Laterals among the reported films count as laterals.
    among = judged(model, shards, keys=np.arange(12, FILMS))["out_of_distribution"]
    assert among["energy"]["kinds"][LATERAL]["n"] == len(TEST) + len(LATERALS)
    assert among["energy"]["kinds"]["noise"]["n"] == 2 * len(TEST)
    # A model that was trained on some knows them.
    known = judged(model, shards, training=np.arange(20, 34), keys=np.arange(12))["out_of_distribution"]
    assert "trained on lateral films" in known["note"]
    assert known["energy"]["kinds"][LATERAL]["value"] is None
    without = judged(model, made(tmp_path, lateral=False))["out_of_distribution"]
    assert "Real laterals were not available" in without["note"]
    assert without["mahalanobis"]["kinds"][LATERAL]["value"] is None
    assert "not measurable: no film" in without["mahalanobis"]["kinds"][LATERAL]["note"]
    assert without["mahalanobis"]["kinds"][TURNED]["value"] is not None


def test_several_labels(model: keras.Model, shards: ShardFolder) -> None:
    found = judged(model, shards, task="multilabel")
    predicted = predict_films(model, shards, TEST, classes=OPERATING["classes"], size=SIZE, batch_size=8)
    p = probabilities_of(predicted.logits, "multilabel", 1.5)
    wrong = ((p >= [0.5, 0.4]) != predicted.labels).mean(1)
    assert found["selective"]["error"]["value"] == pytest.approx(wrong.mean())


def test_a_model_that_only_segments(shards: ShardFolder) -> None:
    model = cxr_tf.multitask(encoder(), (SIZE, SIZE, 1), classification=False, decoder_channels=(8, 8, 8, 8, 8))
    found = judged(model, shards, classes=[], thresholds={})
    assert found.keys() == {"out_of_distribution"}
    assert found["out_of_distribution"]["auroc"]["value"] is not None
    assert "energy" not in found["out_of_distribution"]
