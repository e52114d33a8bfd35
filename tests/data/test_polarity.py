"""Films that look inverted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cxr_tf.data.phantom import phantom
from cxr_tf.data.polarity import polarity

LABELS = ("Negative for Pneumonia", "Typical Appearance", "Indeterminate Appearance", "Atypical Appearance")


def film(seed: int, label: str = LABELS[0], size: int = 128) -> np.ndarray:
    return (phantom(label, np.random.default_rng(seed), size).pixels >> 4).astype(np.uint8)


@pytest.mark.parametrize("label", LABELS)
def test_a_chest_and_its_negative(label):
    for seed in range(5):
        assert polarity(film(seed, label)) > 0.2


@given(st.integers(0, 2**32 - 1), st.integers(8, 90), st.integers(8, 90))
def test_the_negative_has_the_opposite(seed, height, width):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    # Pillow rounds to 8 bits, which moves halves.
    assert abs(polarity(pixels) + polarity(255 - pixels)) < 0.02


def test_contrast_and_brightness_do_not_matter():
    pixels = film(0).astype(float)
    assert abs(polarity(np.uint8(40 + 0.5 * pixels)) - polarity(np.uint8(pixels))) < 0.02


def test_one_gray_says_nothing():
    assert polarity(np.full((50, 40), 7, np.uint8)) == 0.0


def test_real_films(cxr_data):
    """On 1,613 it is above 0 for all."""
    images = pd.read_csv(cxr_data / "metadata.csv")["image"]
    found = [polarity(np.asarray(Image.open(cxr_data / path).convert("L"))) for path in images[::8]]
    assert min(found) > 0.0
