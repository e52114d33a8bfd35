from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from cxr_tf.evaluate.overlay import outline


@given(
    arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=25)), st.integers(0, 4), st.integers(1, 4)
)
def test_the_rim_is_what_erosion_takes_away(seeds, grown, thick):
    region = ndimage.binary_dilation(seeds, iterations=grown) if grown else seeds
    before = region.copy()
    expected = region & ~ndimage.binary_erosion(region, iterations=thick)
    np.testing.assert_array_equal(outline(region, thick), expected)
    np.testing.assert_array_equal(region, before)
