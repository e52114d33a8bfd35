"""Generated chest radiographs with known findings, and a whole data set of them in SIIM's layout.

A film is drawn as X-rays would: soft tissue and bone add to what is absorbed, air in the lungs takes away, and an
opacity is lung that lost its air, so that it blurs vessels and hides behind the heart as a real one does. Anatomy,
exposure, projection and position vary from film to film; the four classes follow the appearances that radiologists
report for COVID-19 (Litmanovich et al., Journal of Thoracic Imaging 2020, the scheme of the SIIM-FISABIO-RSNA labels).
The drawings carry demos and tests. They say nothing about patients.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.pixels import get_encoder
from scipy import ndimage

from cxr_tf.errors import CxrError, nearest

CLASSES = ("Negative for Pneumonia", "Typical Appearance", "Indeterminate Appearance", "Atypical Appearance")

_IMAGES_PER_CLASS = (1736, 3007, 1108, 483)  # in the challenge's training set
_WHITE = 4095  # 12 bits


class PhantomError(CxrError):
    """A request for generated radiographs that cannot be met."""


@dataclass(frozen=True)
class Phantom:
    """One generated film and the truth about it.

    Attributes:
        pixels: uint16 `[size, size]`, 12 bits, air dark (MONOCHROME2).
        boxes: one (x, y, width, height) in pixels around each opacity or cluster of them.
        lungs: bool `[size, size]`, the lung fields, without what heart and diaphragm hide.
        opacity: bool `[size, size]`, the opacities within them.
    """

    pixels: np.ndarray
    boxes: list[tuple[float, float, float, float]]
    lungs: np.ndarray
    opacity: np.ndarray


def phantom(label: str, rng: np.random.Generator, size: int = 512) -> Phantom:
    """Draws one frontal film of a class.

    - Negative for Pneumonia: clear lungs.
    - Typical Appearance: bilateral, peripheral, lower-zone ground-glass; multifocal and rounded.
    - Indeterminate Appearance: ground-glass on one side, or central, or in the upper zones, or little of it.
    - Atypical Appearance: lobar consolidation, pleural effusion, pneumothorax or nodules.

    Args:
        label: one of `CLASSES`.
        rng: source of every draw; the same state gives the same film.
        size: height and width in pixels, at least 32.

    Returns:
        The `Phantom`.

    Raises:
        PhantomError: an unknown label or a size below 32.

    Example:
        >>> film = phantom("Typical Appearance", np.random.default_rng(0), 256)
        >>> film.pixels.shape, len(film.boxes) > 0
        ((256, 256), True)
    """
    if label not in CLASSES:
        raise PhantomError(f"label must be one of {', '.join(CLASSES)}.{nearest(label, CLASSES)} Received: {label!r}")
    if size < 32:
        raise PhantomError(f"size must be 32 pixels or more. Received: {size}")
    body, disease, exposure = (np.random.default_rng(seed) for seed in rng.integers(2**63, size=3))
    return _film(label, body, disease, exposure, size, view=_view(label, exposure), sex=_sex(body))


# --- anatomy --------------------------------------------------------------------------------------------------------
# Coordinates of the chest: a runs from the patient's right (-0.5, the film's left) to the left (0.5), b from the neck
# (0) to the abdomen (1). Lengths are fractions of the film's side. Absorption is 0 for air, about 1 for spine or liver.


@dataclass(frozen=True)
class _Body:
    """What makes one patient's chest differ from another's."""

    width: float  # from the midline to the chest wall
    apex: float
    domes: tuple[float, float]  # tops of the right and left diaphragm
    heart: float
    heart_tilt: float
    air: float
    fat: float
    breast: float
    rib_gap: float
    rib_start: float
    rib_bend: float
    bone: float
    clavicle: float
    spine_bend: float
    knob: float
    vessels: float


def _body(rng: np.random.Generator, view: str, sex: str) -> _Body:
    portable = view == "AP"
    dome = rng.normal(0.735, 0.03) - 0.045 * portable
    return _Body(
        width=rng.normal(0.365, 0.016),
        apex=rng.normal(0.085, 0.012),
        domes=(dome, dome + rng.normal(0.022, 0.01)),
        heart=rng.normal(1.0, 0.09) * (1.15 if portable else 1.0),
        heart_tilt=rng.normal(0.62, 0.12),
        air=rng.uniform(0.38, 0.6) - 0.04 * portable,
        fat=rng.uniform(-0.04, 0.09),
        breast=rng.uniform(0.04, 0.19) if sex == "F" else rng.uniform(0, 0.06),
        rib_gap=rng.normal(0.077, 0.004),
        rib_start=rng.uniform(0.0, 1.0),
        rib_bend=rng.normal(0.5, 0.08),
        bone=rng.uniform(0.75, 1.25),
        clavicle=rng.normal(0.155, 0.014) - 0.02 * portable,
        spine_bend=rng.normal(0, 0.012),
        knob=rng.uniform(0.6, 1.4),
        vessels=rng.uniform(0.7, 1.35),
    )


def _view(label: str, rng: np.random.Generator) -> str:
    """AP (portable) films are commoner among the ill, as in SIIM, but no class is without either."""
    return "AP" if rng.random() < (0.4 if label == CLASSES[0] else 0.6) else "PA"


def _sex(rng: np.random.Generator) -> str:
    return "F" if rng.random() < 0.45 else "M"


@dataclass(frozen=True)
class _Frame:
    """How the chest lies on the film: turned, shifted and scaled a little."""

    angle: float
    right: float
    down: float
    scale: float
    size: int

    def chest(self) -> tuple[np.ndarray, np.ndarray]:
        """Chest coordinates of all pixels: two float32 `[size, size]`."""
        steps = ((np.arange(self.size) + 0.5) / self.size - 0.5).astype(np.float32)
        x, y = (steps - self.right)[None, :], (steps - self.down)[:, None]
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        scale = np.float32(self.scale)
        return (x * cos + y * sin) / scale, (y * cos - x * sin) / scale + np.float32(0.5)

    def pixels(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns, as floats, of points in chest coordinates."""
        cos, sin, b = np.cos(self.angle), np.sin(self.angle), b - 0.5
        column = 0.5 + self.right + self.scale * (a * cos - b * sin)
        row = 0.5 + self.down + self.scale * (a * sin + b * cos)
        return row * self.size - 0.5, column * self.size - 0.5


def _frame(rng: np.random.Generator, view: str, size: int) -> _Frame:
    loose = 1.6 if view == "AP" else 1.0
    return _Frame(
        angle=float(np.deg2rad(rng.normal(0, 1.6) * loose)),
        right=rng.normal(0, 0.02) * loose,
        down=rng.normal(0.0, 0.022) * loose,
        scale=rng.normal(1.0, 0.055),
        size=size,
    )


def _step(distance: np.ndarray, soft: float) -> np.ndarray:
    """0 below, 1 above, smoothly over six times `soft`."""
    t = np.clip(distance * (1 / (6 * soft)) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _bump(distance: np.ndarray, width: float) -> np.ndarray:
    """1 at zero, falling on both sides: a Gaussian."""
    t = distance * (1 / width)
    return np.exp(-t * t)


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise, about `cells` hills a side, mean 0 and deviation about 1: cubic B-splines over white noise."""
    grid: np.ndarray = rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    at = (np.arange(size) + 0.5) / size * cells
    knot = at.astype(np.int64)
    t = (at - knot).astype(np.float32)[:, None]
    spline = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    for _ in range(2):  # down, then across; four taps each, as a matrix product's threads may change the last bit
        taps = [weight * grid[knot + offset] for offset, weight in enumerate(spline)]
        grid = (taps[0] + taps[1] + taps[2] + taps[3]).T / 6
    return 2.1 * grid


def _wall(body: _Body, b: Any) -> Any:
    """Distance of the inner chest wall from the midline at height b."""
    above = np.clip((0.62 - b) / (0.62 - body.apex), 0, 1)
    return 0.12 + (body.width - 0.12) * np.sqrt(1 - above**2.4) * (1 + 0.06 * np.clip(b - 0.62, 0, 1))


def _medial(body: _Body, b: Any) -> Any:
    """Distance of the mediastinal border from the midline at height b, heart aside."""
    above = np.clip((0.24 - b) / (0.24 - body.apex), 0, 1)
    return 0.12 - 0.07 * np.sqrt(1 - above**2)


def _dome(body: _Body, a: np.ndarray) -> np.ndarray:
    """Height of the diaphragm: a dome a side, falling into the costophrenic angles."""
    top = np.where(a < 0, np.float32(body.domes[0]), np.float32(body.domes[1]))
    out = (np.abs(a) - 0.17) ** 2
    return top + 1.1 * out + 55 * out * out


def _ribs(
    body: _Body, a: np.ndarray, b: np.ndarray, wall: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Posterior ribs, arched and bright; anterior ones, running down towards the middle and fading into cartilage."""
    side = np.abs(a)
    reach = side / wall
    bent = reach * reach
    posterior = b - wall * (body.rib_bend * 0.75 * bent + 0.22 * np.minimum(bent, 1.2) ** 3 - 0.16 * reach)
    anterior = b - 0.62 * wall * (1 - reach) - 0.03 * np.sin(5 * reach)
    cage = _step(wall * 1.035 + 0.004 - side, 0.002) * _step(b - body.apex + 0.035, 0.006)
    total = np.zeros_like(a)
    for height, gap, strength, half, front in (
        (posterior, body.rib_gap, 0.066, 0.0115, False),
        (anterior, body.rib_gap * 1.16, 0.04, 0.0125, True),
    ):
        phase = (height - body.apex) * (1 / gap) - body.rib_start
        number = np.round(phase)
        down, right = np.gradient(height, 1 / size)
        distance = np.abs(phase - number) * gap / np.maximum(np.sqrt(down * down + right * right), 0.5)
        each = np.clip(number.astype(np.int64) + 8, 0, 39) + 40 * (a > 0)
        width = half * rng.uniform(0.8, 1.2, 80).astype(np.float32)[each]
        bright = strength * rng.uniform(0.75, 1.25, 80).astype(np.float32)[each]
        band = _step(width - distance, max(0.001, 0.3 / size)) * (0.7 + 0.6 * _bump(distance - width * 0.9, 0.0035))
        if front:
            band *= np.clip((reach - 0.42) * 3.3, 0, 1) * _step(b - 0.2, 0.013)
        else:
            band *= _step(side - 0.03, 0.004)
        total += bright * band
    return body.bone * total * cage


def _bones(body: _Body, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spine, clavicles, shoulder blades and upper arms."""
    side = np.abs(a)
    middle = a - body.spine_bend * np.sin(3 * b)
    column = _step(0.036 + 0.008 * b - np.abs(middle), 0.005)
    phase = (b - 0.02) / 0.047
    disc = _bump(phase - np.round(phase), 0.16)
    pedicles = _bump(np.abs(middle) - 0.022, 0.006) * _bump(phase - np.round(phase) - 0.4, 0.12)
    process = _bump(middle, 0.006) * _bump(phase - np.round(phase) + 0.35, 0.15)
    spine = column * (0.06 - 0.035 * disc) + 0.028 * pedicles + 0.025 * process

    along = (side - 0.035) / 0.34
    line = body.clavicle - 0.085 * along + 0.022 * np.sin(6.0 * along) + np.sign(a) * 0.006
    across = np.abs(b - line)
    half = 0.0125 + 0.004 * np.abs(along - 0.45)
    clavicle = _step(half - across, 0.0025) * (0.75 + 0.5 * _bump(across - half, 0.004))
    clavicle *= _step(along, 0.015) * _step(1.02 - along, 0.02)

    edge = 0.335 + 0.25 * (b - 0.12) * (0.42 - b)
    blade = _step(side - edge, 0.006) * _step(0.46 - b, 0.03) * _step(b - 0.13, 0.02) * (0.4 + _bump(side - edge, 0.01))
    head = np.hypot(side - 0.475, b - 0.165)
    arm = np.maximum(_step(0.055 - head, 0.006), _step(0.036 - np.abs(side - 0.495), 0.005) * _step(b - 0.17, 0.02))
    return body.bone * (spine + 0.14 * clavicle + 0.035 * blade + 0.13 * arm)


def _ellipse(
    a: np.ndarray, b: np.ndarray, at: tuple[float, float], radii: tuple[float, float], tilt: float
) -> np.ndarray:
    """Distance from an ellipse's center, 1 on its edge."""
    cos, sin = math.cos(tilt), math.sin(tilt)
    x = (a - at[0]) * (cos / radii[0]) + (b - at[1]) * (sin / radii[0])
    y = (b - at[1]) * (cos / radii[1]) - (a - at[0]) * (sin / radii[1])
    return np.sqrt(x * x + y * y)


def _heart(body: _Body, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How much of the lung's depth the heart and great vessels take, 0-1; crisp at the borders."""
    base = body.domes[1] - 0.095
    shapes = (
        (_ellipse(a, b, (0.06, base), (0.165 * body.heart, 0.118 * body.heart), body.heart_tilt), 0.94),
        (_ellipse(a, b, (-0.022, base - 0.015), (0.078 * body.heart, 0.125), 0.1), 0.9),
        (_ellipse(a, b, (0.028, 0.325), (0.052 * body.knob**0.4, 0.05), 0), 0.85),
        (_ellipse(a, b, (0.035, 0.44), (0.05, 0.1), -0.3), 0.8),
        (_ellipse(a, b, (-0.025, 0.33), (0.042, 0.22), 0), 0.75),
    )
    taken = np.zeros_like(a)
    for shape, part in shapes:
        solid = part * _step(1 - shape, 0.025) * (0.85 + 0.15 * np.sqrt(np.clip(1 - shape * shape, 0, 1)))
        taken = np.maximum(taken, solid)
    return taken


def _vessels(body: _Body, frame: _Frame, rng: np.random.Generator) -> np.ndarray:
    """Pulmonary vessels: trees that leave the hila, branch, thin out and fade; `[size, size]`, about 0-1."""
    size, stride, steps = frame.size, 0.0088, 36
    inner = np.linspace(0, 1, max(2, size // 96), endpoint=False)[:, None]
    points, weights, widths = [], [], []
    for side in (-1, 1):
        heading = np.linspace(-1.45, 1.62, 12) + rng.normal(0, 0.12, 12)
        turn = rng.normal(0, 0.03, 12)
        a = side * (0.078 + 0.022 * np.cos(heading)) + rng.normal(0, 0.006, 12)
        b = 0.445 - 0.012 * side + 0.05 * np.sin(heading) + rng.normal(0, 0.008, 12)
        width = rng.uniform(0.5, 1.0, 12)
        for step in range(steps):
            if step in (4, 9, 14, 19, 25):
                spread = rng.uniform(0.15, 0.5, len(a))
                heading = np.concatenate([heading + spread, heading - spread * rng.uniform(0.3, 1.2, len(a))])
                a, b, width = np.tile(a, 2), np.tile(b, 2), np.tile(width, 2) * rng.uniform(0.5, 0.88, 2 * len(a))
                turn = rng.normal(0, 0.035, len(a))
            heading = heading + turn + rng.normal(0, 0.06, len(a))
            da, db = side * stride * np.cos(heading), stride * np.sin(heading)
            points.append(np.stack([(a + inner * da).ravel(), (b + inner * db).ravel()]))
            weights.append(np.tile(width**0.7 * (1 - step / (steps + 6)) / len(inner), len(inner)))
            widths.append(np.tile(width, len(inner)))
            a, b, width = a + da, b + db, width * 0.975
    row, column = frame.pixels(*np.concatenate(points, axis=1))
    weight, level = np.concatenate(weights), np.digitize(np.concatenate(widths), [0.5, 0.25, 0.11])
    inside = (row >= 0) & (row < size - 1) & (column >= 0) & (column < size - 1)
    index = ((level * size + row.astype(np.int64)) * size + column.astype(np.int64))[inside]
    layers = np.bincount(index, weight[inside], 4 * size * size).astype(np.float32).reshape(4, size, size)
    total = np.zeros((size, size), np.float32)
    for layer, sigma in zip(layers, (0.005, 0.0034, 0.0022, 0.0013), strict=True):
        pixels = max(sigma * frame.scale * size, 0.45)
        # Of points one stride apart, blurred, this is the height: a vessel is as bright at every size of film.
        total += ndimage.gaussian_filter(layer, pixels, truncate=2.5) * (pixels * 2.5 * stride * size)
    return body.vessels * np.minimum(total, 1.5)


# --- disease --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lesion:
    """A rounded opacity: center and radii in chest coordinates, and how much air it replaces."""

    at: tuple[float, float]
    radii: tuple[float, float]
    tilt: float
    density: float
    ragged: float
    soft: float


def _place(
    body: _Body, rng: np.random.Generator, side: int, outward: tuple[float, float], rows: tuple[float, float]
) -> tuple[float, float]:
    """A point in one lung: outward 0 at the mediastinum to 1 at the wall, rows 0 at the apex to 1 at the diaphragm."""
    b = body.apex + rng.uniform(*rows) * (body.domes[side > 0] - body.apex)
    inner, outer = float(_medial(body, b)), float(_wall(body, b))
    return side * (inner + rng.uniform(*outward) * (outer - inner)), b


def _ground_glass(
    body: _Body, rng: np.random.Generator, side: int, outward: tuple[float, float], rows: tuple[float, float]
) -> _Lesion:
    radius = rng.uniform(0.03, 0.075)
    return _Lesion(
        at=_place(body, rng, side, outward, rows),
        radii=(radius * rng.uniform(0.75, 1.1), radius * rng.uniform(0.9, 1.5)),
        tilt=rng.uniform(-0.5, 0.5),
        density=rng.uniform(0.26, 0.55),
        ragged=0.38,
        soft=0.16,
    )


@dataclass(frozen=True)
class _Lobe:
    """A consolidated lobe: sharp along its fissure, fading elsewhere."""

    side: int
    upper: bool
    fissure: float
    at: tuple[float, float]
    reach: float
    density: float


@dataclass(frozen=True)
class _Disease:
    """All that is wrong with one chest."""

    lesions: tuple[_Lesion, ...] = ()
    lobe: _Lobe | None = None
    effusion: tuple[int, float, float] | None = None  # side, level, climb along the wall (0: an air-fluid level)
    pneumothorax: tuple[int, float] | None = None  # side, gap at the apex


def _disease(label: str, body: _Body, rng: np.random.Generator) -> _Disease:
    side = 1 if rng.random() < 0.5 else -1
    if label == CLASSES[0]:
        return _Disease()
    if label == CLASSES[1]:
        return _Disease(
            tuple(
                _ground_glass(body, rng, each, (0.62, 0.95), (0.58, 1.0))
                for each in (-1, 1)
                for _ in range(rng.integers(2, 5))
            )
        )
    if label == CLASSES[2]:
        kind = rng.choice(["one side", "central", "upper"])
        if kind == "one side":
            spots = [(side, (0.35, 0.95), (0.3, 0.9))] * int(rng.integers(1, 4))
        elif kind == "central":
            spots = [(each, (0.1, 0.4), (0.38, 0.68)) for each in (-1, 1) for _ in range(rng.integers(1, 3))]
        else:
            spots = [
                (side if rng.random() < 0.6 else -side, (0.2, 0.9), (0.12, 0.4)) for _ in range(rng.integers(1, 4))
            ]
        return _Disease(tuple(_ground_glass(body, rng, *spot) for spot in spots))
    kind = rng.choice(["lobe", "effusion", "pneumothorax", "nodules"])
    dome = body.domes[side > 0]
    if kind == "lobe":
        upper = bool(rng.random() < 0.5)
        at = _place(body, rng, side, (0.4, 0.7), (0.28, 0.4) if upper else (0.72, 0.85))
        lobe = _Lobe(side, upper, rng.uniform(0.42, 0.48), at, rng.uniform(0.14, 0.2), rng.uniform(0.75, 0.95))
        return _Disease(lobe=lobe)
    if kind == "effusion":
        return _Disease(effusion=(side, dome - rng.uniform(-0.02, 0.1), rng.uniform(0.1, 0.2)))
    if kind == "pneumothorax":
        return _Disease(
            effusion=(side, dome - rng.uniform(-0.01, 0.04), 0.0), pneumothorax=(side, rng.uniform(0.045, 0.1))
        )
    nodules = []
    for _ in range(rng.integers(5, 13)):
        at = _place(body, rng, 1 if rng.random() < 0.5 else -1, (0.12, 0.92), (0.12, 0.95))
        radius = rng.uniform(0.012, 0.034)
        nodules.append(_Lesion(at, (radius, radius * rng.uniform(0.9, 1.15)), 0.0, rng.uniform(0.6, 0.95), 0.08, 0.12))
    return _Disease(tuple(nodules))


def _opacities(
    body: _Body,
    disease: _Disease,
    frame: _Frame,
    a: np.ndarray,
    b: np.ndarray,
    wall: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The part of the air that is replaced (0-1), and where, as an expert would outline it (bool)."""
    size = frame.size
    clear, outline = np.ones_like(a), np.zeros(a.shape, bool)
    hills, lumps, grains = (_noise(rng, size, cells) for cells in (13, 34, 90))
    texture = np.clip(0.86 + 0.2 * lumps + 0.1 * grains, 0.35, 1.25)
    for lesion in disease.lesions:
        row, column = frame.pixels(*(np.array(part) for part in lesion.at))
        reach = 1.9 * max(lesion.radii) * frame.scale * size + 2
        rows = slice(max(0, int(row - reach)), max(0, int(row + reach) + 1))
        columns = slice(max(0, int(column - reach)), max(0, int(column + reach) + 1))
        at = (rows, columns)
        distance = _ellipse(a[at], b[at], lesion.at, lesion.radii, lesion.tilt)
        inside = 1 - distance + lesion.ragged * (0.7 * hills[at] + 0.45 * lumps[at])
        shape = _step(inside, lesion.soft) * _step(1.75 - distance, 0.06)
        ball = 0.45 + 0.55 * np.sqrt(np.clip(1 - distance * distance, 0, 1))
        grain = texture[at] if lesion.ragged > 0.1 else ball
        clear[at] *= 1 - np.clip(lesion.density * shape * grain, 0, 1)
        outline[at] |= shape > 0.45
    if lobe := disease.lobe:
        distance = _ellipse(a, b, lobe.at, (lobe.reach, lobe.reach * 0.95), 0.0) - 0.2 * hills
        fissure = lobe.fissure + (0.0 if lobe.upper else 0.35) * (np.abs(a) - 0.2)
        sharp = _step((fissure - b) if lobe.upper else (b - fissure), 0.0025)
        shape = _step(1 - distance, 0.09) * sharp * (a * lobe.side > 0)
        clear *= 1 - np.clip(lobe.density * shape * np.clip(0.92 + 0.08 * lumps + 0.05 * grains, 0, 1.05), 0, 1)
        outline |= shape > 0.5
    if disease.effusion:
        side, level, climb = disease.effusion
        height = level - climb * np.exp(-np.maximum(wall - np.abs(a), 0) / 0.035)
        shape = _step(b - height, 0.007 if climb else 0.002) * (a * side > 0)
        clear *= 1 - 0.97 * shape
        outline |= shape > 0.5
    return 1 - clear, outline


def _boxes(mask: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Boxes around the parts of a mask; parts that nearly touch share one, specks get none."""
    size = mask.shape[0]
    near = ndimage.uniform_filter(mask.astype(np.float32), max(3, size // 18)) > 1e-4
    parts, _ = ndimage.label(near)
    found = []
    for number, part in enumerate(ndimage.find_objects(parts), start=1):
        inside = mask[part] & (parts[part] == number)
        rows, columns = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
        if len(rows):
            top, left = part[0].start + rows[0], part[1].start + columns[0]
            box = (float(left), float(top), float(np.ptp(columns) + 1), float(np.ptp(rows) + 1))
            found.append((int(inside.sum()), box))
    least = min(4e-4 * size * size, max((area for area, _ in found), default=0))
    return sorted(box for area, box in found if area >= least)


# --- the film -------------------------------------------------------------------------------------------------------


def _film(
    label: str,
    body_rng: np.random.Generator,
    disease_rng: np.random.Generator,
    exposure: np.random.Generator,
    size: int,
    *,
    view: str,
    sex: str,
) -> Phantom:
    """One film: who is on it, what ails them and how it was exposed are three sources of draws."""
    body = _body(body_rng, view, sex)
    frame = _frame(exposure, view, size)
    a, b = frame.chest()
    a, b = np.broadcast_arrays(a, b)
    side = np.abs(a)
    wall, medial, dome = _wall(body, b), _medial(body, b), _dome(body, a)
    lateral, inner, lower = wall - side, side - medial, dome - b
    heart = _heart(body, a, b)
    fields = (lateral > 0) & (inner > 0) & (lower > 0) & (heart < 0.45) & (b > body.apex)

    tree_rng = np.random.default_rng(body_rng.integers(2**63))
    while True:
        disease = _disease(label, body, disease_rng)
        replaced, outline = _opacities(body, disease, frame, a, b, wall, disease_rng)
        opacity = outline & fields
        if label == CLASSES[0] or opacity.sum() > 0.002 * size * size:
            break  # else it lies behind heart or diaphragm, where nobody would see it

    def depth(distance: np.ndarray, slope: float) -> np.ndarray:
        distance = np.maximum(distance, 0)
        return np.sqrt(distance / (distance + slope))

    lung = depth(lateral, 0.05) * depth(inner, 0.012) * depth(lower, 0.012) * (1 - heart)
    vessels = _vessels(body, frame, tree_rng) * np.minimum(1, 3 * lung)
    # Air bronchograms: the tree stays open in what is consolidated.
    replaced = replaced * (1 - 0.12 * np.minimum(vessels, 1))
    # Shallow breath, thick chest walls, a turned patient: they whiten bases or one side as disease does, without its
    # texture and edges, so that brightness alone does not give a film's class away.
    haze = (
        1 + exposure.normal(0, 0.3) * (b - 0.45) + exposure.normal(0, 0.35) * a + exposure.normal(0, 0.4) * (side - 0.2)
    )
    air = lung * (1 - replaced) * (0.86 + 0.17 * b) * np.clip(haze, 0.6, 1.25)
    markings = 0.12 * vessels * (1 - 0.85 * replaced)
    if disease.pneumothorax:
        which, gap = disease.pneumothorax
        edge = lateral - gap * (1.15 - 0.75 * np.clip((b - body.apex) / 0.6, 0, 1))
        free = _step(-edge, 0.0015) * (a * which > 0) * (lower > 0)
        markings = markings * (1 - free) + 0.09 * _bump(edge, 0.0028) * (a * which > 0) * (air > 0.05)
        air = air * (1 + 0.16 * free) * (1 - 0.1 * (1 - free) * (a * which > 0))

    breadth = 0.09 + 0.41 * np.clip((b + 0.02) / 0.15, 0, 1) ** 1.5 - (0.05 - 0.35 * body.fat) * _step(b - 0.34, 0.06)
    skin = _step(breadth - side, 0.003)
    chord = np.sqrt(np.clip(1 - 0.9 * (side / breadth) ** 2, 0.02, 1))
    film = skin * (0.34 + 0.33 * chord + 0.5 * body.fat)
    middle = np.maximum(_step(0.05 - side, 0.007) * (1 - 0.3 * _step(0.14 - b, 0.03)), heart)
    film += skin * (0.1 * np.maximum(middle, _step(-lower, 0.012)) + 0.06 * _bump(a, 0.1))
    film += 0.04 * _step(-lower, 0.012) * skin
    bubble = _ellipse(a, b, (0.135, body.domes[1] + 0.065), (0.06, 0.035), -0.2)
    film -= 0.16 * _step(1 - bubble, 0.12) * _step(-lower - 0.012, 0.004)
    airway = np.abs(a - 0.004 - body.spine_bend)
    fork = np.abs(side - 0.62 * (b - 0.355) - 0.004)
    film -= 0.075 * _step(0.0145 - airway, 0.004) * _step(0.37 - b, 0.01)
    film -= 0.05 * _step(0.01 - fork, 0.004) * _step(b - 0.36, 0.004) * _step(0.425 - b, 0.015)
    for each in (-1, 1):
        swell = _ellipse(a, b, (each * 0.2, body.domes[0] - 0.04), (0.16, 0.125), 0.1 * each)
        film += body.breast * np.sqrt(np.clip(1 - swell**2, 0, 1)) * (1 - 0.75 * _step(-lower, 0.02))
    hilum = _bump(np.hypot((side - 0.085) / 0.8, b - 0.435 + 0.012 * np.sign(a)), 0.045)
    film += 0.07 * hilum * (1 - heart)
    film += skin * (_bones(body, a, b) + _ribs(body, a, b, wall, size, tree_rng) * (1 - 0.75 * _step(-lower, 0.01)))
    film += markings + 0.05 * replaced * lung - body.air * air
    film += skin * (0.035 * _noise(exposure, size, 3) + 0.009 * _noise(exposure, size, 24))
    film += skin * (0.006 * _noise(exposure, size, 70) + exposure.normal(0, 0.09) * a)
    return Phantom(_develop(film, frame, view, exposure), _boxes(opacity), fields, opacity)


def _develop(film: np.ndarray, frame: _Frame, view: str, rng: np.random.Generator) -> np.ndarray:
    """Absorption to 12 bits: scatter, focal blur, grain, exposure, tone curve, collimation."""
    size = frame.size
    scatter = rng.uniform(0.08, 0.22) if view == "AP" else rng.uniform(0.0, 0.1)
    film = (1 - scatter) * film + scatter * 0.55
    film = ndimage.gaussian_filter(film, max(0.35, rng.uniform(0.0008, 0.0016) * size), truncate=3)
    grain = rng.uniform(0.006, 0.014) * (1.4 if view == "AP" else 1.0)
    film = film + grain * rng.standard_normal(film.shape, dtype=np.float32)
    film = np.clip((film - rng.uniform(-0.03, 0.05)) / rng.uniform(0.92, 1.12), 0, 1) ** rng.uniform(0.75, 1.35)
    low, high = rng.uniform(0.01, 0.12), rng.uniform(0.72, 0.98)
    if rng.random() < 0.3:  # shutters
        top, left = rng.uniform(0, 0.035, 2) * size
        film[: int(top)], film[:, : int(left)], film[:, size - int(left) :] = 0, 0, 0
    return np.rint(_WHITE * (low + (high - low) * film)).astype(np.uint16)


# --- a data set in SIIM's layout ------------------------------------------------------------------------------------


def write_siim(
    root: str | os.PathLike[str],
    *,
    studies: int = 240,
    size: int = 512,
    seed: int = 0,
    marker: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Writes a data set of generated films in the exact layout of SIIM-FISABIO-RSNA COVID-19's training half.

    `train/<study>/<series>/<image>.dcm` (12-hex ids), `train_study_level.csv` and `train_image_level.csv`, with class
    frequencies near the challenge's. Its traps are in: studies with several images, further images of positive studies
    without boxes, patients with several studies (told by the DICOM header alone). The files are DX and CR objects of 12
    bits; some are MONOCHROME1, some RLE or JPEG 2000 compressed, some without a window, and not all are square.

    The folder appears under its name when it is complete. The same arguments give the same bytes.

    Args:
        root: folder to make; it must not exist, or be empty.
        studies: number of studies, at least 1; from 8 on every class occurs and every trap of the layout.
        size: longer side of the films in pixels.
        seed: source of everything that is drawn; 0 or more.
        marker: burns a small letter into a corner of each film, one for each class: a shortcut for tests to detect.
        progress: called with (films written, films in all) after each.

    Returns:
        The folder.

    Raises:
        PhantomError: the folder holds something, or a number is out of range.

    Example:
        >>> write_siim("siim-generated", studies=16, size=128)
        PosixPath('siim-generated')
    """
    root = Path(root)
    if studies < 1:
        raise PhantomError(f"studies must be 1 or more. Received: {studies}")
    if size < 32:
        raise PhantomError(f"size must be 32 pixels or more. Received: {size}")
    if seed < 0:
        raise PhantomError(f"seed must be 0 or more. Received: {seed}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise PhantomError(f"{root} already holds something; give a folder that is empty or does not exist")
    plan = _plan(studies, seed)
    partial = root.parent / f".{root.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    image_rows = []
    for done, image in enumerate(plan, start=1):
        boxes = _write_film(partial / "train", image, size, seed, marker)
        shown = [] if image.unboxed else boxes
        corners = [f"opacity 1 {x:g} {y:g} {x + w:g} {y + h:g}" for x, y, w, h in shown]
        named = [dict(zip(("x", "y", "width", "height"), box, strict=True)) for box in shown]
        image_rows.append(
            (f"{image.image}_image", str(named) if named else "", " ".join(corners) or "none 1 0 0 1 1", image.study)
        )
        if progress:
            progress(done, len(plan))
    labels = {image.study: image.label for image in plan}
    study_rows = [(f"{study}_study", *(int(label == name) for name in CLASSES)) for study, label in labels.items()]
    _write_csv(partial / "train_study_level.csv", ("id", *CLASSES), study_rows)
    _write_csv(partial / "train_image_level.csv", ("id", "boxes", "label", "StudyInstanceUID"), image_rows)
    if root.exists():
        root.rmdir()
    partial.rename(root)
    return root


@dataclass(frozen=True)
class _Image:
    """One file to write: whose it is, what it shows, and the numbers that its draws come from."""

    patient: int
    study_number: int
    number: int
    first: bool
    label: str
    study: str
    series: str
    image: str
    unboxed: bool


def _hex(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def _plan(studies: int, seed: int) -> list[_Image]:
    """All files, patients first: which studies are whose, and which have further images."""
    rng = np.random.default_rng([seed, 0])
    share = np.array(_IMAGES_PER_CLASS) / sum(_IMAGES_PER_CLASS) * studies
    counts = np.maximum(np.floor(share), 1 if studies >= len(CLASSES) else 0).astype(int)
    while counts.sum() < studies:
        counts[np.argmax(share - counts)] += 1
    while counts.sum() > studies:
        counts[np.argmax(counts)] -= 1
    labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), counts))
    order = rng.permutation(studies)
    several = set(order[: max(1, round(0.06 * studies))] if studies >= 8 else ())
    positive = [int(study) for study in order if labels[study]]
    several |= set(positive[:1] if studies >= 8 else ())  # one positive study at least has a film without boxes
    returning = set(rng.permutation(np.arange(1, studies))[: max(1, round(0.1 * studies))] if studies >= 8 else ())
    plan: list[_Image] = []
    patient = -1
    for study in range(studies):
        patient += study not in returning
        for number in range(1 + (study in several) * (1 + int(rng.random() < 0.2))):
            ids = (_hex("study", seed, study)[:12], _hex("series", seed, study, number)[:12])
            plan.append(
                _Image(
                    patient=patient,
                    study_number=study,
                    number=number,
                    first=number == 0,
                    label=CLASSES[labels[study]],
                    study=ids[0],
                    series=ids[1],
                    image=_hex("image", seed, study, number)[:12],
                    unboxed=number > 0 and (number > 1 or study in positive[:1] or rng.random() < 0.75),
                )
            )
    return sorted(plan, key=lambda image: (image.study, image.number))


def _write_csv(path: Path, header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> None:
    ordered = sorted(rows, key=lambda row: str(row[0]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(ordered)


# 5 x 7 letters, one a class: a reader of radiographs meets them as side, portable, series and upright markers.
_LETTERS = {
    CLASSES[0]: ("11110", "10001", "10001", "11110", "10100", "10010", "10001"),  # R
    CLASSES[1]: ("11110", "10001", "10001", "11110", "10000", "10000", "10000"),  # P
    CLASSES[2]: ("01111", "10000", "10000", "01110", "00001", "00001", "11110"),  # S
    CLASSES[3]: ("10001", "10001", "10001", "10001", "10001", "10001", "01110"),  # U
}


def _burn(pixels: np.ndarray, label: str, rng: np.random.Generator) -> None:
    scale = max(1, round(max(pixels.shape) / 110))
    letter = np.kron(np.array([[int(dot) for dot in row] for row in _LETTERS[label]]), np.ones((scale, scale), int))
    top, left = (int(rng.uniform(0.03, 0.07) * side) for side in pixels.shape)
    pixels[top : top + letter.shape[0], left : left + letter.shape[1]][letter == 1] = _WHITE


def _write_film(
    train: Path, image: _Image, size: int, seed: int, marker: bool
) -> list[tuple[float, float, float, float]]:
    """Draws and writes one file; returns its boxes."""
    body = np.random.default_rng([seed, 1, image.patient])
    disease = np.random.default_rng([seed, 2, image.study_number])
    exposure = np.random.default_rng([seed, 3, image.study_number, image.number])
    sex, view = _sex(body), _view(image.label, exposure)
    film = _film(image.label, body, disease, exposure, size, view=view, sex=sex)

    # Detectors are not square: some films lose a part of both sides, some of top and bottom.
    left, top, right, bottom = 0, 0, size, size
    shape, less = exposure.random(), int(size * exposure.uniform(0.03, 0.12))
    if shape < 0.35:
        left, right = less // 2, size - less + less // 2
    elif shape < 0.6:
        top, bottom = less // 4, size - less + less // 4
    pixels = np.ascontiguousarray(film.pixels[top:bottom, left:right])
    boxes = []
    for x, y, width, height in film.boxes:
        x1, x2 = np.clip((x, x + width), left, right).tolist()
        y1, y2 = np.clip((y, y + height), top, bottom).tolist()
        if x2 > x1 and y2 > y1:
            boxes.append((x1 - left, y1 - top, x2 - x1, y2 - y1))
    if marker:
        _burn(pixels, image.label, np.random.default_rng([seed, 4, image.study_number, image.number]))

    path = train / image.study / image.series / f"{image.image}.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    _dicom(image, pixels, sex, view, seed, exposure).save_as(path, enforce_file_format=True)
    return boxes


def _uid(*parts: object) -> uid.UID:
    return uid.UID(f"2.25.{int(_hex(*parts)[:32], 16)}")


def _dicom(
    image: _Image, pixels: np.ndarray, sex: str, view: str, seed: int, rng: np.random.Generator
) -> pydicom.Dataset:
    """A film as a DX object (PA, on the stand) or a CR object (AP, portable), of a patient who never was."""
    who = int(_hex("patient", seed, image.patient), 16)
    taken = date(2020, 3, 1) + timedelta(days=who % 200 + 4 * image.study_number % 90)
    born = date(2000, 1, 1) - timedelta(days=(who >> 16) % 23_000)
    age = (taken - born).days * 100 // 36525
    inverted = bool(rng.random() < 0.25)
    low, high = np.percentile(pixels, (1, 99))
    center = round(float((low + high) / 2 + rng.uniform(-60, 60)))
    width = round(float((high - low) * rng.uniform(0.95, 1.2)) + 64)

    dataset = pydicom.Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.SOPClassUID = (
        uid.DigitalXRayImageStorageForPresentation if view == "PA" else uid.ComputedRadiographyImageStorage
    )
    dataset.SOPInstanceUID = _uid("image", seed, image.study_number, image.number)
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = taken.strftime("%Y%m%d")
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = f"{8 + who % 10:02d}1500"
    dataset.AccessionNumber = f"A{image.study_number:07d}"
    dataset.Modality = "DX" if view == "PA" else "CR"
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.Manufacturer = "cxr_tf (generated)"
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = "Generated chest radiograph"
    dataset.PatientName = f"Phantom^{image.patient:05d}"
    dataset.PatientID = _hex("patient", seed, image.patient)[:12]
    dataset.PatientBirthDate = born.strftime("%Y%m%d")
    dataset.PatientSex = sex
    dataset.PatientAge = f"{age:03d}Y"
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = view
    dataset.StudyInstanceUID = _uid("study", seed, image.study_number)
    dataset.SeriesInstanceUID = _uid("series", seed, image.study_number, image.number)
    dataset.StudyID = str(image.study_number)
    dataset.SeriesNumber = image.number + 1
    dataset.InstanceNumber = 1
    dataset.PatientOrientation = ["L", "F"]
    dataset.ImageLaterality = "U"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.ImagerPixelSpacing = [round(430 / max(pixels.shape), 4)] * 2  # of a 43 cm detector
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.BurnedInAnnotation = "NO"
    dataset.PixelIntensityRelationship = "LOG"
    dataset.PixelIntensityRelationshipSign = 1 if inverted else -1
    if rng.random() < 0.85:
        dataset.WindowCenter = _WHITE + 1 - center if inverted else center
        dataset.WindowWidth = width
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = 0, 1, "US"
    dataset.LossyImageCompression = "00"
    dataset.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    dataset.PixelData = (_WHITE - pixels if inverted else pixels).astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    packing = rng.random()
    if packing < 0.35:
        syntax = uid.RLELossless if packing < 0.2 else uid.JPEG2000Lossless
        if "pylibjpeg" in get_encoder(syntax).available_plugins:  # one encoder alone, for the same bytes everywhere
            dataset.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    return dataset
