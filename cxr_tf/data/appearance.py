"""Does a film look like what it should be? Some files hold negatives, films on their side or no chest, unmarked."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

# The mean of 16 generated films without a finding (`cxr_tf.data.phantom`), darkest 0 to brightest 9: lungs and what is
# beside the neck dark, spine and belly bright.
_CHEST_ROWS = """
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
_CHEST = np.array([list(row) for row in _CHEST_ROWS.split()], np.float64)
_MARGIN = 0.1  # by which another reading must fit better
_LEAST = 0.18  # likeness of 99.5 % of frontal films
_LEVELS = 8  # by which the grays of a border may differ
_PLAIN = 0.95  # part of a line of a border that has its gray
_BORDER = 0.1  # part of a side


def oddities(pixels: np.ndarray) -> list[str]:
    """What a person should look at in a film that ought to be an upright frontal chest with air dark.

    A film is compared with a generated chest as it is, turned by 90, 180 and 270 degrees, and each of these inverted:
    correlations at 16 x 16 pixels. It is never changed by what is found.

    On 1,613 frontal films of four sources, children among them, 18 are called something as they are: one is upside
    down, one shows an arm, most have wide white borders. All are if they are inverted (97 % rightly), 99 % on their
    side and 95 % upside down. How many lateral films are found is not known: there were none to measure on.

    Args:
        pixels: uint8 `[height, width]`, as `read_radiograph` gives them or smaller.

    Returns:
        Short sentences without a subject: the film is inverted, turned, or hardly a frontal chest; it has a border of
        one gray.

    Example:
        >>> oddities(255 - read_radiograph("film.dcm"))  # doctest: +SKIP
        ['looks inverted: more like the negative of a frontal chest (0.61) than like one']
    """
    found = []
    likeness = _likeness(pixels)
    turned, sign = best = max(likeness, key=lambda reading: likeness[reading])
    own = likeness[0, 1]
    better = likeness[best] > own + _MARGIN
    if better and best == (0, -1):
        found.append(f"looks inverted: more like the negative of a frontal chest ({-own:.2f}) than like one")
    elif better and sign == 1:
        found.append(
            f"looks turned by {turned} degrees: more like a frontal chest if that is undone "
            f"({likeness[best]:.2f}) than as it is ({own:.2f})"
        )
    elif better or own < _LEAST:
        found.append(
            f"is little like a frontal chest ({own:.2f}): another view, another part of the body, a wide border, or "
            "badly exposed"
        )
    borders = {side: part for side, part in _borders(pixels).items() if part > _BORDER}
    if len(borders) == 4 and min(borders.values()) == 1:
        found.append("is one gray all over")
    elif borders:
        parts = ", ".join(f"{100 * part:.0f} % from the {side}" for side, part in borders.items())
        found.append(f"has a border of one gray: {parts}")
    return found


def _likeness(pixels: np.ndarray) -> dict[tuple[int, int], float]:
    """Correlation with a chest of each reading: turned clockwise by so many degrees, inverted (-1) or not (1)."""
    small = np.asarray(Image.fromarray(pixels).resize(_CHEST.shape, Image.Resampling.BOX), np.float64)
    found: dict[tuple[int, int], float] = {}
    for quarter in range(4):
        turned = np.rot90(small, quarter)  # counter-clockwise, which undoes it
        same = float(np.corrcoef(turned.ravel(), _CHEST.ravel())[0, 1]) if small.std() else 0.0
        found |= {(90 * quarter, 1): same, (90 * quarter, -1): -same}
    return found


def _borders(pixels: np.ndarray) -> dict[str, float]:
    """How far from each side the film is one gray, but for letters in it, as part of its height or width."""
    found = {}
    for sides, lines in ((("top", "bottom"), pixels), (("left", "right"), pixels.T)):
        for side, inwards in zip(sides, (lines, lines[::-1]), strict=True):
            gray = np.median(inwards[0])
            # Whole numbers are compared without a copy of the film in floats.
            near = (inwards >= math.ceil(gray - _LEVELS)) & (inwards <= math.floor(gray + _LEVELS))
            broken = near.mean(axis=1) < _PLAIN
            found[side] = float(broken.argmax() if broken.any() else len(broken)) / len(broken)
    return found
