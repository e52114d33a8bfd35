"""Shortcuts: films whose signal is known to lie in the lungs or in a corner, and models that read one or the other."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

import cxr_tf
from cxr_tf.data.phantom import write_siim
from cxr_tf.data.readers.table import read_table
from cxr_tf.data.shards import ShardFolder, prepare
from cxr_tf.evaluate.calibration import probabilities_of
from cxr_tf.evaluate.inference import Films, predict_films
from cxr_tf.evaluate.lungs import Lungs, dilated
from cxr_tf.evaluate.shortcuts import (
    blanking,
    blanks,
    by_source,
    mean_intensity,
    source_classifier,
    thumbnail_baseline,
    thumbnail_probabilities,
)

SIZE = 64
FILMS = 60  # of each source
LUNGS, CORNER = np.s_[22:42, 20:44], np.s_[11:14, 3:7]  # in the model's square; films are 48 x 64, so 8 rows are above
OPERATING: dict[str, Any] = {"classes": ["ill", "well"], "task": "multiclass", "size": SIZE, "temperature": 1.0}
DRAWS: dict[str, Any] = {"replicates": 200, "seed": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    """Films that are brighter in the lungs and in a corner if somebody is ill; less so in the second source."""
    root = tmp_path_factory.mktemp("shortcuts")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(2 * FILMS):
        ill, there = i % 2, i >= FILMS
        film = rng.normal(110 + 30 * there, 8, (48, 64))
        square = np.zeros((SIZE, SIZE))
        for place in (LUNGS, CORNER):
            square[place] = 20 * ill + rng.normal(0, 20 if there else 12)
        film += square[8:56]
        Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(root / f"{i}.png")
        rows.append(
            {
                "image": f"{i}.png",
                "patient_id": f"{i // 2 - i % 2}-{there}",
                "label": "ill" if ill else "well",
                "source": "there" if there else "here",
                "view": "AP" if i % 3 == 0 else "PA",
            }
        )
    pd.DataFrame(rows).to_csv(root / "films.csv", index=False)
    table = read_table(root / "films.csv", label="label", classes=OPERATING["classes"], source="source", view="view")
    return prepare(table, root / "shards", storage_size=64, workers=0)


HERE, THERE = np.arange(FILMS), np.arange(FILMS, 2 * FILMS)


def reading(*places: tuple[slice, slice]) -> keras.Model:
    """A model that sees the mean of some places, and nothing else."""
    image = keras.Input((SIZE, SIZE, 1))
    dense = keras.layers.Dense(2)
    model = keras.Model(image, {"logits": dense(keras.layers.Flatten()(image))})
    kernel = np.zeros((SIZE, SIZE, 2), np.float32)
    for place in places:
        kernel[*place, 0] += 0.1 / kernel[*place, 0].size
    dense.set_weights([kernel.reshape(-1, 2), np.array([-11.0 * len(places), 0], np.float32)])
    return model


def said_of(model: keras.Model, shards: ShardFolder, keys: np.ndarray, task: Any = "multiclass") -> np.ndarray:
    found = predict_films(model, shards, keys, classes=OPERATING["classes"], size=SIZE, batch_size=32)
    assert found.logits is not None
    return probabilities_of(found.logits, task)


def lungs_of(films: int) -> Lungs:
    masks = np.zeros((films, SIZE, SIZE), bool)
    masks[:, *LUNGS] = True
    return Lungs(masks, np.ones(films, bool), "annotated")


def truth(keys: np.ndarray) -> np.ndarray:
    return keys % 2


def in_json(found: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(found, allow_nan=False))


def blanked(model: keras.Model, shards: ShardFolder, **settings: Any) -> dict[str, Any]:
    settings = {"fill": 110.0, "lungs": lungs_of(FILMS), **DRAWS, **settings}
    return in_json(blanking(model, shards, HERE, said_of(model, shards, HERE), OPERATING, **settings))


def test_what_a_model_does_not_look_at_is_not_missed(shards):
    lungs, corner = blanked(reading(LUNGS), shards), blanked(reading(CORNER), shards)
    kept = {
        name: [found[name]["kept"]["value"] for found in (lungs, corner)]
        for name in ("lungs_blanked", "all_but_lungs_blanked", "borders_blanked")
    }
    assert kept["lungs_blanked"] == pytest.approx([0, 1])
    assert kept["all_but_lungs_blanked"] == pytest.approx([1, 0])
    assert kept["borders_blanked"] == pytest.approx([1, 0])
    assert (lungs["fill"], lungs["lungs"]) == (110.0, "annotated")


def test_kept_skill_is_that_of_scikit_learn_with_a_paired_interval(shards):
    model = reading(LUNGS, CORNER)
    found = blanked(model, shards)["borders_blanked"]
    before = said_of(model, shards, HERE)[:, 0]
    after = said_of(reading(LUNGS), shards, HERE)[:, 0]
    a, b = (roc_auc_score(truth(HERE), said) for said in (before, after))
    assert found["auroc"]["value"] == pytest.approx(a)
    assert found["auroc_blanked"]["value"] == pytest.approx(b)
    kept = found["kept"]
    assert kept["value"] == pytest.approx((b - 0.5) / (a - 0.5))
    assert kept["low"] < kept["value"] < kept["high"]
    assert kept["n"] == FILMS and kept["patients"] == len(np.unique(shards.manifest["patient_key"][:FILMS]))


def test_lungs_are_blanked_on_the_films_where_they_are_known(shards):
    lungs = lungs_of(FILMS)
    known = np.arange(FILMS) < 40
    lungs.masks[~known] = False
    found = blanked(reading(LUNGS, CORNER), shards, lungs=lungs._replace(known=known, kind="predicted by a run"))
    said = said_of(reading(LUNGS, CORNER), shards, HERE)[known, 0]
    for name in ("lungs_blanked", "all_but_lungs_blanked"):
        assert found[name]["auroc"]["n"] == found[name]["kept"]["n"] == 40
        assert found[name]["auroc"]["value"] == pytest.approx(roc_auc_score(truth(HERE)[known], said))
    assert found["borders_blanked"]["auroc"]["n"] == FILMS
    assert found["lungs"] == "predicted by a run"


@pytest.mark.parametrize(
    ("lungs", "why"),
    [
        (None, "no lung masks were given"),
        (lungs_of(FILMS)._replace(known=np.zeros(FILMS, bool)), "the lungs of none of these films are known"),
    ],
)
def test_without_lungs_nothing_is_said_of_them(shards, lungs, why):
    found = blanked(reading(LUNGS), shards, lungs=lungs)
    for name in ("lungs_blanked", "all_but_lungs_blanked"):
        for figure in ("auroc", "auroc_blanked", "kept"):
            assert found[name][figure]["value"] is None
            assert found[name][figure]["note"] == f"not measurable: {why}"
    assert found["borders_blanked"]["kept"]["value"] == pytest.approx(1)


def test_a_model_without_skill_keeps_none_of_it(shards):
    """Its AUROC is somewhere about .5, and a ratio to nothing means nothing."""
    found = blanked(reading(np.s_[50:52, 50:52]), shards)["borders_blanked"]
    assert found["auroc"]["low"] < 0.5
    assert found["kept"]["value"] is found["kept"]["low"] is None
    assert "reaches .5" in found["kept"]["note"]


def test_what_is_blanked_has_the_fill_and_the_rest_is_as_it_was():
    rng = np.random.default_rng(0)
    content = np.zeros((2, SIZE, SIZE, 1), bool)
    content[0, 8:56], content[1, :, 10:40] = True, True
    films = Films(
        np.where(content, rng.uniform(1, 255, content.shape), 0).astype(np.float32),
        np.array([1, 0]),
        content,
        np.full(content.shape, np.nan, np.float32),
    )
    lungs = lungs_of(2)
    lungs.masks[1, 30:], lungs.masks[0, 30:, 50:] = False, True
    changes = {name: change(films) for name, change in blanks(7.0, lungs).items()}
    grown = dilated(lungs.masks)[films.rows][..., None]
    np.testing.assert_array_equal(changes["lungs_blanked"], np.where(grown, np.float32(7), films.images))
    np.testing.assert_array_equal(changes["all_but_lungs_blanked"], np.where(grown, films.images, np.float32(7)))
    middle = np.zeros(content.shape, bool)
    middle[0, 8 + 8 : 56 - 8, 11 : 64 - 11] = True  # a sixth of 48 and of 64, rounded up
    middle[1, 11 : 64 - 11, 10 + 5 : 40 - 5] = True
    plain = blanks(7.0)["borders_blanked"](films)
    np.testing.assert_array_equal(plain, np.where(middle, films.images, np.float32(7)))
    left = middle | grown  # lungs that reach into the border are no shortcut
    np.testing.assert_array_equal(changes["borders_blanked"], np.where(left, films.images, np.float32(7)))
    assert (grown & ~middle).any()
    assert all(changed.dtype == np.float32 for changed in changes.values())


@pytest.mark.parametrize("size", [84, 96, 166, 276])
def test_blanked_borders_cover_the_planted_letter(size, tmp_path):
    """166 is where the letter is largest beside its film: 14 rows."""
    pixels = []
    for marker in (False, True):
        root = write_siim(tmp_path / str(marker), studies=16, size=size, seed=2, marker=marker)
        films = sorted(root.rglob("*.dcm"))
        pixels.append([pydicom.dcmread(path).pixel_array.astype(np.float32) for path in films])
    for without, with_letter in zip(*pixels, strict=True):
        assert (without != with_letter).any()
        letter = np.abs(with_letter - without)[None, ..., None]
        content = np.ones(letter.shape, bool)
        assert not blanks(0.0)["borders_blanked"](Films(letter, np.zeros(1, int), content, letter)).any()


def test_the_mean_of_films_is_that_of_their_pixels_without_padding(shards):
    images, _ = next(iter(cxr_tf.batches(shards, HERE, size=SIZE, batch_size=FILMS, shuffle=False)))
    assert mean_intensity(shards, HERE, size=SIZE, batch_size=7) == pytest.approx(images.numpy()[:, 8:56].mean())


# --- thumbnails -----------------------------------------------------------------------------------------------------


def parts_of(train: np.ndarray, test: np.ndarray, shards: ShardFolder) -> pd.DataFrame:
    """As `Run.parts` gives them; a tenth of what trains validates."""
    keys = np.concatenate([train, test])
    part = ["validation" if i % 10 == 9 else "train" for i in range(len(train))] + ["test"] * len(test)
    return shards.manifest.loc[keys, ["patient_key", "study_key"]].assign(part=part)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_thumbnails_are_read_by_logistic_regression(shards, task):
    parts = parts_of(HERE[:40], HERE[40:], shards)
    images, _ = next(iter(cxr_tf.batches(shards, HERE, size=8, batch_size=FILMS, shuffle=False)))
    x = images.numpy().reshape(FILMS, -1)
    scale = StandardScaler().fit(x[:40])
    by_hand = LogisticRegression(max_iter=5000).fit(scale.transform(x[:40]), truth(HERE[:40]))
    expected = by_hand.predict_proba(scale.transform(x[40:]))[:, 1]
    said = thumbnail_probabilities(shards, parts, OPERATING["classes"], task)
    np.testing.assert_allclose(said[:, 0], expected, atol=1e-3)

    model = said_of(reading(LUNGS), shards, HERE[40:])
    found = in_json(thumbnail_baseline(shards, parts, model, OPERATING | {"task": task}, **DRAWS))
    y = np.stack([truth(HERE[40:]), 1 - truth(HERE[40:])], axis=1)
    aurocs = [roc_auc_score(y, one, average="macro") for one in (said, model)]
    assert [found[name]["value"] for name in ("auroc", "model")] == pytest.approx(aurocs)
    assert found["difference"]["value"] == pytest.approx(aurocs[1] - aurocs[0])
    assert found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"]
    assert (found["side"], found["fitted_on"], found["auroc"]["n"]) == (8, 40, 20)


def test_thumbnails_of_one_class_only(shards):
    parts = parts_of(HERE[:40], HERE[40::2], shards)
    found = in_json(thumbnail_baseline(shards, parts, np.full((10, 2), 0.5), OPERATING, **DRAWS))
    assert found["difference"]["note"] == "not measurable: no class has both outcomes"


# --- sources --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> cxr_tf.models.multitask.MultiTask:
    keras.utils.set_random_seed(0)
    return cxr_tf.multitask("small_resnet", (SIZE, SIZE, 1), 2, segmentation=False, hidden=0)


def test_the_source_is_read_from_features(shards, network):
    everything = np.concatenate([HERE, THERE])
    found = in_json(source_classifier(network, shards, everything, OPERATING, **DRAWS))
    assert found["auroc"]["value"] > 0.95  # films from there are brighter
    assert set(found["sources"]) == {"here", "there"}
    assert found["sources"]["there"]["films"] == FILMS
    assert found["sources"]["there"]["auroc"]["value"] == pytest.approx(found["auroc"]["value"])


def test_one_source_is_nothing_to_tell_apart(shards, network):
    few = np.concatenate([HERE, THERE[:4]])
    found = in_json(source_classifier(network, shards, few, OPERATING, **DRAWS))
    assert found["auroc"]["value"] is None
    assert found["auroc"]["note"].startswith("not measurable")
    assert found["left_out"] == ["there"]


def test_skill_on_a_source_that_was_not_trained_on(shards):
    model = reading(LUNGS)
    parts = parts_of(HERE[:20], HERE[20:], shards)
    test = said_of(model, shards, HERE[20:])
    found = in_json(by_source(model, shards, parts, test, OPERATING, **DRAWS))
    here = roc_auc_score(truth(HERE[20:]), test[:, 0])
    there = roc_auc_score(truth(THERE), said_of(model, shards, THERE)[:, 0])
    assert found["trained_on"] == ["here"]
    assert list(found["tested"]) == ["here"]
    assert found["tested"]["here"]["value"] == pytest.approx(here)
    unseen = found["unseen_source"]
    assert unseen["auroc"]["value"] == pytest.approx(there)
    assert unseen["difference"]["value"] == pytest.approx(there - here)
    assert unseen["difference"]["low"] < unseen["difference"]["value"] < unseen["difference"]["high"]
    assert unseen["sources"]["there"]["auroc"]["value"] == pytest.approx(there)
    assert (unseen["auroc"]["n"], unseen["difference"]["n"]) == (FILMS, FILMS + 40)


def test_unseen_films_are_held_to_the_filters_of_the_run(shards):
    model = reading(LUNGS)
    parts = parts_of(HERE[:20], HERE[20:], shards)
    where = {"source": ["here"], "view": ["PA"]}
    test = said_of(model, shards, HERE[20:])
    found = in_json(by_source(model, shards, parts, test, OPERATING, where=where, **DRAWS))
    frontal = THERE[(shards.manifest["view"] == "PA")[THERE]]
    there = roc_auc_score(truth(frontal), said_of(model, shards, frontal)[:, 0])
    assert found["unseen_source"]["auroc"]["value"] == pytest.approx(there)
    assert found["unseen_source"]["auroc"]["n"] == len(frontal)


def test_a_source_that_is_only_tested_on_is_unseen(shards):
    model = reading(LUNGS)
    parts = parts_of(HERE, THERE[:40], shards)
    test = said_of(model, shards, THERE[:40])
    found = in_json(by_source(model, shards, parts, test, OPERATING, **DRAWS))
    assert found["unseen_source"]["auroc"]["value"] == pytest.approx(roc_auc_score(truth(THERE[:40]), test[:, 0]))
    assert found["unseen_source"]["difference"]["value"] is None  # nothing was tested where it trained


def test_a_source_of_few_patients_is_not_judged(shards):
    model = reading(LUNGS)
    parts = parts_of(HERE[:20], np.concatenate([HERE[20:], THERE[:6]]), shards)
    test = said_of(model, shards, parts.index[parts["part"] == "test"].to_numpy())
    unseen = in_json(by_source(model, shards, parts, test, OPERATING, **DRAWS))["unseen_source"]
    assert unseen["left_out"] == ["there"]
    assert unseen["auroc"]["note"] == "not measurable: no other source has 5 patients with a class and 5 without"


def test_no_source_is_left_to_test_on(shards):
    model = reading(LUNGS)
    parts = parts_of(np.concatenate([HERE[:40], THERE[:40]]), np.concatenate([HERE[40:], THERE[40:]]), shards)
    test = said_of(model, shards, parts.index[parts["part"] == "test"].to_numpy())
    found = in_json(by_source(model, shards, parts, test, OPERATING, **DRAWS))
    assert list(found["tested"]) == ["here", "there"]
    assert found["unseen_source"]["auroc"]["note"].startswith("not measurable: no labeled film is from another")
    assert found["unseen_source"]["sources"] == {}
