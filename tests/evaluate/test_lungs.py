"""Lungs: found by the path of their film, or predicted by a run; each film gets its own, and never of two kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from scipy.special import expit

import cxr_tf
from cxr_tf.config import Experiment
from cxr_tf.data.readers.table import read_table
from cxr_tf.data.shards import ShardFolder, prepare
from cxr_tf.evaluate.lungs import LungError, dilated, lung_masks
from cxr_tf.models.outputs import load_model
from cxr_tf.preprocess import mask_to_input, mask_to_storage
from cxr_tf.run import RunError, claim_run, create_run, write_json

SIZE, STORED = 64, 48
OPERATING = {
    "classes": [],
    "task": "multiclass",
    "size": SIZE,
    "storage_size": STORED,
    "temperature": 1.0,
    "thresholds": {},
    "mask_threshold": 0.5,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven films; lungs are drawn on all but film 2, and nothing is drawn on film 4."""
    root = tmp_path_factory.mktemp("lungs")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(7):
        height, width = (60, 50) if i % 2 else (50, 60)
        Image.fromarray(rng.integers(0, 256, (height, width), np.uint8)).save(root / f"{i}.png")
        mask = np.zeros((height, width), np.uint8)
        if i != 4:
            mask[10 + i : 40, 5 : 45 - i] = 255
        Image.fromarray(mask).save(root / f"lungs-{i}.png")
        rows.append({"image": f"{i}.png", "patient_id": str(i), "lungs": "" if i == 2 else f"lungs-{i}.png"})
    pd.DataFrame(rows).to_csv(root / "films.csv", index=False)
    pd.DataFrame(rows[:0:-1]).to_csv(root / "lungs.csv", index=False)  # another order, and without film 0
    return root


@pytest.fixture(scope="module")
def shards(root: Path) -> ShardFolder:
    return prepare(read_table(root / "films.csv"), root / "shards", storage_size=STORED, workers=0)


def finished_run(folder: Path, shards: ShardFolder, **model: object) -> None:
    """A finished run folder of an untrained model."""
    experiment = Experiment(
        name="fields",
        data={"shards": str(shards.folder)},
        model={"encoder": "small_resnet", "size": SIZE, "hidden": 0, "decoder_channels": [8] * 5, **model},
    )
    create_run(claim_run(folder, experiment))
    made = cxr_tf.multitask(
        "small_resnet",
        (SIZE, SIZE, 1),
        2,
        hidden=0,
        decoder_channels=[8] * 5,
        classification=experiment.model.classification,
        segmentation=experiment.model.segmentation,
    )
    made.save(folder / "model.keras")
    write_json(folder / "operating.json", OPERATING)


def test_annotated_lungs_are_found_by_the_path_of_their_film(root, shards):
    table = read_table(root / "lungs.csv", mask="lungs")
    prepare(table, root / "lungs", storage_size=STORED, workers=0)
    keys = np.array([5, 0, 1, 2, 4, 3, 6])
    lungs = lung_masks(root / "lungs", shards, keys, SIZE, batch_size=2)
    assert lungs.kind == "annotated"
    assert lungs.masks.shape == (7, SIZE, SIZE) and lungs.masks.dtype == bool
    # 0 is not among them, 2 has no mask, and 4 an empty one: a chest without lungs is no annotation.
    assert lungs.known.tolist() == [True, False, True, False, False, True, True]
    for mask, known, key in zip(lungs.masks, lungs.known, keys, strict=True):
        drawn = np.asarray(Image.open(root / f"lungs-{key}.png"))
        expected = mask_to_input(mask_to_storage(drawn, STORED), SIZE)[..., 0] if known else np.zeros((SIZE, SIZE))
        np.testing.assert_array_equal(mask, expected == 1)


def test_other_films_lungs_are_nobodys(root, shards, tmp_path):
    for name in ("7.png", "lungs-7.png"):
        Image.fromarray(np.full((50, 60), 255, np.uint8)).save(tmp_path / name)
    (tmp_path / "lungs.csv").write_text("image,patient_id,lungs\n7.png,7,lungs-7.png\n", encoding="utf-8")
    prepare(read_table(tmp_path / "lungs.csv", mask="lungs"), tmp_path / "shards", workers=0)
    lungs = lung_masks(tmp_path / "shards", shards, np.arange(7), SIZE)
    assert not lungs.known.any() and not lungs.masks.any()


def test_a_run_predicts_lungs_at_its_own_size_and_threshold(shards, tmp_path):
    finished_run(tmp_path / "run", shards, classification=False)
    model = load_model(tmp_path / "run" / "model.keras")
    keys = np.array([3, 0, 6])
    images, _ = next(iter(cxr_tf.batches(shards, keys, size=SIZE, batch_size=3, shuffle=False)))
    said = model(images, training=False)["mask_logits"].numpy()[..., 0]
    cut = float(np.median(said))
    write_json(tmp_path / "run" / "operating.json", OPERATING | {"mask_threshold": float(expit(cut))})
    lungs = lung_masks(tmp_path / "run", shards, keys, SIZE, batch_size=2)
    assert lungs.kind == "predicted by fields"
    assert lungs.known.all()
    assert (lungs.masks == (said >= cut)).mean() > 0.999  # but for what rounds to the threshold
    larger = lung_masks(tmp_path / "run", shards, keys, 2 * SIZE).masks
    assert larger.shape == (3, 2 * SIZE, 2 * SIZE)
    same = larger[:, ::2, ::2] == lungs.masks
    edge = ndimage.binary_dilation(lungs.masks, np.ones((1, 3, 3))) & ~ndimage.binary_erosion(
        lungs.masks, np.ones((1, 3, 3)), border_value=1
    )
    assert same[~edge].all()


def test_where_no_lungs_can_come_from(shards, tmp_path):
    with pytest.raises(LungError, match=r"a config\.toml\)\. Received: a folder with neither"):
        lung_masks(tmp_path, shards, np.arange(2), SIZE)
    with pytest.raises(LungError, match="Received: no folder"):
        lung_masks(tmp_path / "none", shards, np.arange(2), SIZE)
    finished_run(tmp_path / "classes", shards, segmentation=False)
    with pytest.raises(LungError, match="no segmentation head"):
        lung_masks(tmp_path / "classes", shards, np.arange(2), SIZE)
    (tmp_path / "classes" / "operating.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        lung_masks(tmp_path / "classes", shards, np.arange(2), SIZE)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(20, 60), st.floats(0.0, 0.2))
def test_dilation_is_that_by_a_disc(seed, size, part):
    masks = np.random.default_rng(seed).random((3, size, size)) > 0.995
    masks[0] = False
    reach = int(part * size) + 1
    down, right = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = np.hypot(down, right) <= part * size
    grown = dilated(masks, part)
    for mask, found in zip(masks, grown, strict=True):
        np.testing.assert_array_equal(found, ndimage.binary_dilation(mask, disc))
