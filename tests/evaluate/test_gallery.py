"""Films to look at: the right ones are chosen, drawn with their overlays, and put into words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

import cxr_tf
from cxr_tf.data.manifest import make_manifest
from cxr_tf.data.shards import ShardFolder, prepare
from cxr_tf.evaluate.gallery import AT_RANDOM, EXTREMES, gallery
from cxr_tf.evaluate.inference import predict_films
from cxr_tf.evaluate.saliency import saliency_of

FILMS, SIZE = 30, 64
CLASSES = ["ill", "well"]
OPERATING: dict[str, Any] = {
    "classes": CLASSES, "task": "multiclass", "size": SIZE, "temperature": 1.0, "mask_threshold": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    root = tmp_path_factory.mktemp("gallery")
    rng = np.random.default_rng(0)
    for i in range(FILMS):
        Image.fromarray(rng.integers(256, size=(48, 64), dtype=np.uint8)).save(root / f"{i}.png")
    ill = np.arange(FILMS) % 3 == 0
    table = make_manifest(
        {
            "image": [str(root / f"{i}.png") for i in range(FILMS)],
            "source": ["here"] * FILMS,
            "patient_id": [str(i) for i in range(FILMS)],
            "study_id": [str(i) for i in range(FILMS)],
            "view": ["PA"] * FILMS,
            "sex": [None] * FILMS,
            "age": [float("nan")] * FILMS,
            "label:ill": ill.astype(float),
            "label:well": (~ill).astype(float),
            "boxes": [[[8.0, 8.0, 16.0, 12.0]] if i else [] for i in ill],
            "mask": [None] * FILMS,
            "mask_known": [True] * FILMS,
            "split": [None] * FILMS,
        }
    )
    return prepare(table, root / "shards", storage_size=64, workers=0)


def made(shards: ShardFolder, out: Path, *, classification: bool, segmentation: bool) -> dict[str, Any]:
    """The gallery of an untrained model, with probabilities made up: film i is right by i / FILMS."""
    keras.utils.set_random_seed(0)
    model = cxr_tf.multitask(
        "small_resnet", (SIZE, SIZE, 1), CLASSES, hidden=0, classification=classification, segmentation=segmentation,
        decoder_channels=(8, 8, 8, 8, 8),
    )  # fmt: skip
    keys = np.arange(FILMS)
    found = predict_films(model, shards, keys, classes=CLASSES, size=SIZE, batch_size=8)
    right = (keys + 0.5) / FILMS
    ill = found.labels[:, 0]
    p = np.where(ill == 1, right, 1 - right)
    probabilities = np.stack([p, 1 - p], 1) if classification else None
    shown = gallery(
        model, shards, keys, found, probabilities, OPERATING, out, classes=CLASSES, batch_size=8, seed=0
    )  # fmt: skip
    return {"shown": json.loads(json.dumps(shown, allow_nan=False)), "model": model, "found": found}


@pytest.fixture(scope="module")
def both(shards: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("both")
    return made(shards, out, classification=True, segmentation=True) | {"out": out}


def test_films_are_chosen_by_how_right_the_model_was(both):
    shown = both["shown"]
    films = {kind: [film["film"] for film in entries] for kind, entries in shown.items()}
    assert films["worst"] == list(range(EXTREMES))
    assert films["best"] == list(range(FILMS - 1, FILMS - 1 - EXTREMES, -1))
    assert sorted(films["uncertain"]) == list(range(FILMS // 2 - EXTREMES // 2, FILMS // 2 + EXTREMES // 2))
    assert len(set(films["films"])) == AT_RANDOM
    truths = [film["truth"] for film in shown["films"]]
    assert truths == ["ill"] * (AT_RANDOM // 2) + ["well"] * (AT_RANDOM // 2)


def test_each_film_is_drawn_twice_and_said_in_words(shards, both):
    case, out = both, both["out"]
    images, _ = next(iter(cxr_tf.batches(shards, np.arange(FILMS), size=SIZE, batch_size=FILMS, shuffle=False)))
    logits = case["found"].logits
    maps = saliency_of(case["model"], images.numpy(), logits.argmax(1))[:, 8:56]  # films are 48 x 64
    bytes_in_all = 0
    for kind, entries in case["shown"].items():
        with Image.open(out / f"{kind}.png") as sheet:
            assert sheet.width > 3 * 2 * 300
        for film in entries:
            path, i = out / film["picture"], film["film"]
            bytes_in_all += path.stat().st_size
            with Image.open(path) as picture:
                assert picture.width > 2 * 220 and picture.height == 224
            row, column = np.unravel_index(maps[i].argmax(), maps[i].shape)
            place = f"{('upper', 'middle', 'lower')[3 * row // 48]} {('left', 'center', 'right')[3 * column // 64]}"
            said = f"says {CLASSES[logits[i].argmax()]}: "
            assert film["says"].startswith(said)
            assert film["text"].startswith(f"Film {i}: {film['truth']}. The model {said}")
            assert f"the evidence is strongest in the {place} of the picture" in film["text"]
            drew = 16 * 12 / (48 * 64)
            assert (f"Annotators drew {100 * drew:.0f} %." if film["truth"] == "ill" else "drew nothing") in film[
                "text"
            ]
            dice = case["found"].masks.dice[i]
            assert ("Dice" in film["text"]) == (not np.isnan(dice))
            assert np.isnan(dice) or f"The Dice of the two is {dice:.2f}." in film["text"]
    assert bytes_in_all < 30 * 50_000  # of noise, which JPEG cannot make small


def test_a_model_that_only_segments_is_certain_of_nothing_and_shown_once(shards, tmp_path):
    case = made(shards, tmp_path, classification=False, segmentation=True)
    assert set(case["shown"]) == {"best", "worst", "films"}
    dice = case["found"].masks.dice
    assert case["shown"]["worst"][0]["film"] == np.nanargmin(dice)
    for film in case["shown"]["best"]:
        assert film["says"] == "" and "evidence" not in film["text"]
        with Image.open(tmp_path / film["picture"]) as picture:
            assert picture.size == (224, 224)


def test_a_model_that_only_classifies_marks_nothing(shards, tmp_path):
    shown = made(shards, tmp_path, classification=True, segmentation=False)["shown"]
    text = shown["best"][0]["text"]
    assert "marks" not in text and "evidence is strongest" in text
