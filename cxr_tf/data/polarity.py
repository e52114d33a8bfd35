"""Does a film look inverted? Some files hold negatives and do not say so."""

from __future__ import annotations

import numpy as np
from PIL import Image

# The mean of 16 generated films without a finding (`cxr_tf.data.phantom`), darkest 0 to brightest 9: lungs and what is
# beside the neck dark, spine and belly bright.
_CHEST = """
0001236775321000
1234556886554321
3556545875456653
4665445874445664
4664335874445663
3554335884444552
3554345885334552
3554345885434551
2554345886433541
2554456998644541
2554557998854541
2555667998864541
2567888998776541
2578888998787641
2678888998887751
2678888998887752
"""


def polarity(pixels: np.ndarray) -> float:
    """How much a frontal film looks like a chest with air dark (towards 1), or like its negative (towards -1).

    The correlation with a generated chest at 16 x 16 pixels. On 1,613 frontal films of four hospitals, children among
    them, it is above 0 for all (.05 at least), so that a value below 0 is worth a look. What lies on its side or is no
    frontal chest may be anywhere near 0.

    Args:
        pixels: uint8 `[height, width]`, as `read_radiograph` gives them.

    Returns:
        -1 to 1; 0 for a film of one gray.

    Example:
        >>> polarity(255 - read_radiograph("film.dcm"))  # doctest: +SKIP
        -0.61
    """
    chest = np.array([list(row) for row in _CHEST.split()], np.float64)
    small = np.asarray(Image.fromarray(pixels).resize(chest.shape, Image.Resampling.BOX), np.float64)
    if small.std() == 0:
        return 0.0
    return float(np.corrcoef(small.ravel(), chest.ravel())[0, 1])
