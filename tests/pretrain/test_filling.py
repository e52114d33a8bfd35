"""Figures in the hole against closed forms and scikit-image, the baselines, and the picture."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from skimage.metrics import structural_similarity

from cxr_tf.pretrain.filling import (
    FillingError,
    classical_fill,
    evaluate_baselines,
    evaluate_filling,
    filling_grid,
    mean_fill,
    psnr,
    ssim,
)
from cxr_tf.pretrain.holes import Holes


def films(count: int, size: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(seed).uniform(0, 255, (count, size, size, 1)).astype("float32")
    return images, Holes()(seed, tf.range(count, dtype=tf.int64), size).numpy()


class Shifting:
    """Fills with the truth, made a little brighter."""

    def fill(self, images, holes):
        return images + 25.5 * holes


def test_psnr_is_that_of_the_hole_alone():
    images, holes = films(3)
    holes[2] = 0
    changed = images + 25.5 * holes + 100 * (1 - holes)
    np.testing.assert_allclose(psnr(changed, images, holes), [20.0, 20.0, np.nan], rtol=1e-5)
    np.testing.assert_allclose(psnr(images, images, holes), [100.0, 100.0, np.nan])
    white = np.where(holes > 0, 255, 0)
    np.testing.assert_allclose(psnr(white, np.zeros_like(images), holes)[:2], [0.0, 0.0], atol=1e-5)


def test_ssim_is_scikit_images_over_the_hole():
    images, holes = films(3)
    filled = np.where(holes > 0, films(3, seed=1)[0] * 0.3 + images * 0.7, images)
    found = ssim(filled, images, holes).numpy()
    for i in range(3):
        index = structural_similarity(
            images[i, ..., 0].astype("float64"),
            filled[i, ..., 0].astype("float64"),
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )[1]
        inside = holes[i, ..., 0] > 0
        rim = np.ones_like(inside)
        rim[5:-5, 5:-5] = False
        assert found[i] == pytest.approx(index[inside & ~rim].mean(), abs=1e-4)
    np.testing.assert_allclose(ssim(images, images, holes), 1.0, atol=1e-5)


def test_ssim_counts_whole_windows_alone():
    images, _ = films(2)
    at_the_border, reaching_in = np.zeros_like(images), np.zeros_like(images)
    at_the_border[:, :5, :8] = 1
    reaching_in[:, :12, :12] = 1
    assert np.isnan(ssim(images, images, at_the_border)).all()
    np.testing.assert_allclose(ssim(images, images, reaching_in), 1.0, atol=1e-5)
    with pytest.raises(FillingError, match="at least 11 pixels"):
        ssim(images[:, :10], images[:, :10], reaching_in[:, :10])


@pytest.mark.parametrize("fill", [mean_fill, classical_fill])
def test_a_baseline_does_not_look_into_the_hole_and_leaves_the_rest(fill):
    images, holes = films(3)
    holes[2] = 0
    filled = fill(images, holes)
    other = fill(np.where(holes > 0, 3.0, images), holes)
    assert (filled.dtype, filled.shape) == (np.float32, images.shape)
    np.testing.assert_allclose(filled, other, atol=1e-3)
    np.testing.assert_array_equal(filled[holes == 0], images[holes == 0])
    assert filled.min() >= 0 and filled.max() <= 255


def test_the_mean_is_that_outside_of_the_hole():
    images = np.full([1, 4, 4, 1], 10.0, "float32")
    images[0, 0] = 50.0
    holes = np.zeros_like(images)
    holes[0, 1:3, 1:3] = 1
    filled = mean_fill(images, holes)
    np.testing.assert_allclose(filled[holes > 0], (4 * 50 + 8 * 10) / 12, rtol=1e-6)


def test_the_classical_fill_goes_on_with_a_slope():
    rows, columns = np.mgrid[:32, :32]
    images = (40 + 3 * rows + 2 * columns).astype("float32").reshape(1, 32, 32, 1)
    holes = films(1)[1]
    np.testing.assert_allclose(classical_fill(images, holes), images, atol=0.5)
    assert psnr(classical_fill(images, holes), images, holes) > psnr(mean_fill(images, holes), images, holes) + 20


def test_figures_of_a_dataset_are_means_over_films_with_a_hole():
    images, holes = films(5)
    holes[1] = 0
    dataset = tf.data.Dataset.from_tensor_slices({"image": images, "hole": holes})
    for batch in (2, 5):
        found = evaluate_filling(Shifting(), dataset.batch(batch))
        assert found["psnr"] == pytest.approx(20.0, abs=1e-3)
        expected = ssim(images + 25.5 * holes, images, holes).numpy()
        assert found["ssim"] == pytest.approx(expected[[0, 2, 3, 4]].mean(), abs=1e-4)
        baselines = evaluate_baselines(dataset.batch(batch))
        assert set(baselines) == {"mean_psnr", "mean_ssim", "classical_psnr", "classical_ssim"}
        by_hand = psnr(mean_fill(images, holes), images, holes).numpy()
        assert baselines["mean_psnr"] == pytest.approx(np.nanmean(by_hand), abs=1e-3)
    nothing = tf.data.Dataset.from_tensors({"image": images, "hole": np.zeros_like(holes)})
    for data in (nothing, nothing.take(0)):
        with pytest.raises(FillingError, match="no film has a hole"):
            evaluate_filling(Shifting(), data)


def test_the_picture_has_a_row_a_film_and_is_the_same_each_time(tmp_path):
    images, holes = films(2, 64)
    holes[1] = 0
    holed, filled = np.where(holes > 0, 128, images), images + 20 * holes
    options = {"titles": ["one"], "title": "After 100 steps", "side": 128}
    for name in ("a.png", "b.png"):
        assert filling_grid(tmp_path / name, images, holed, filled, holes, **options) == tmp_path / name
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = Image.open(tmp_path / "a.png")
    assert picture.width > 5 * 128 and 2 * 128 < picture.height < 2 * 128 + 200
    colors = np.asarray(picture).reshape(-1, 3)
    assert (colors == (255, 140, 0)).all(1).any(), "the hole is outlined"


def test_a_picture_that_cannot_be_drawn_is_said(tmp_path):
    images, holes = films(2)
    with pytest.raises(FillingError, match=r"ends in .png. Received: a.svg"):
        filling_grid(tmp_path / "a.svg", images, images, images, holes)
    with pytest.raises(FillingError, match="all alike"):
        filling_grid(tmp_path / "a.png", images, images, images[:1], holes)
    with pytest.raises(FillingError, match="one film or more"):
        filling_grid(tmp_path / "a.png", *[images[:0]] * 4)
