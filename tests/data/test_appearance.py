"""Films that do not look like what they should be."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_tf.data.appearance import oddities
from cxr_tf.data.phantom import phantom

LABELS = ("Negative for Pneumonia", "Typical Appearance", "Indeterminate Appearance", "Atypical Appearance")


def film(seed: int, label: str = LABELS[0], size: int = 128) -> np.ndarray:
    return (phantom(label, np.random.default_rng(seed), size).pixels >> 4).astype(np.uint8)


@pytest.mark.parametrize("label", LABELS)
def test_a_chest_its_negative_and_one_on_its_side(label):
    for seed in range(5):
        pixels = film(seed, label)
        assert oddities(pixels) == []
        (said,) = oddities(255 - pixels)
        assert said.startswith("looks inverted")
        for quarter, degrees in ((3, 90), (2, 180), (1, 270)):
            (said,) = oddities(np.rot90(pixels, quarter).copy())
            assert said.startswith(f"looks turned by {degrees} degrees")


def test_clockwise_is_what_turned_means():
    pixels = film(0)
    turned = np.asarray(Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_270))  # Pillow's is counter-clockwise
    assert "turned by 90 degrees" in oddities(turned)[0]


def test_contrast_and_brightness_do_not_matter():
    pixels = film(0).astype(float)
    assert oddities(np.uint8(40 + 0.5 * pixels)) == []
    assert "inverted" in oddities(np.uint8(200 - 0.5 * pixels))[0]


@pytest.mark.parametrize("gray", [0, 255, 97])
def test_a_border_of_one_gray(gray):
    framed = np.full((160, 128), gray, np.uint8)
    framed[24:, :120] = film(1, size=136)[:, :120]
    assert any(said == "has a border of one gray: 15 % from the top" for said in oddities(framed))
    # Up to the tenth of a side that collimation leaves on many films nothing is said.
    narrow = np.full((150, 150), gray, np.uint8)
    narrow[14:-14, 14:-14] = film(1, size=122)
    assert not any("one gray" in said for said in oddities(narrow))


def test_grains_in_a_border_do_not_hide_it():
    framed = np.random.default_rng(0).integers(0, 6, (128, 160), np.uint8)
    framed[:, 32:] = film(1)
    assert "has a border of one gray: 20 % from the left" in oddities(framed)


def test_letters_in_a_border_do_not_hide_it():
    framed = np.zeros((128, 168), np.uint8)
    framed[:, 40:] = film(1)
    framed[10:15, 3:9] = 255  # a letter
    framed[100:104, 20:38] = 200  # a date
    assert "has a border of one gray: 24 % from the left" in oddities(framed)


@pytest.mark.parametrize("shape", [(50, 40), (1, 1), (3, 700)])
def test_one_gray_says_so(shape):
    said = oddities(np.full(shape, 7, np.uint8))
    assert said[-1] == "is one gray all over"


def test_noise_is_little_like_a_chest():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    assert any("little like a frontal chest" in said or "turned" in said for said in oddities(pixels))


def test_real_films(cxr_data):
    """Of 1,613, 18 are called something besides a border as they are, and 99 % of those on their side are."""
    images = pd.read_csv(cxr_data / "metadata.csv")["image"][::8]
    films = [np.asarray(Image.open(cxr_data / path).convert("L")) for path in images]

    def odd(pixels: np.ndarray) -> str:
        return next((said for said in oddities(np.ascontiguousarray(pixels)) if "of one gray" not in said), "")

    assert np.mean([bool(odd(pixels)) for pixels in films]) < 0.03
    assert not any("inverted" in odd(pixels) for pixels in films)
    assert all(odd(255 - pixels) for pixels in films)
    assert np.mean([odd(255 - pixels).startswith("looks inverted") for pixels in films]) > 0.95
    assert np.mean(["by 90" in odd(np.rot90(pixels, -1)) for pixels in films]) > 0.94
