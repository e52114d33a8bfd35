"""How well holes are filled: figures in the hole, what to beat, and a picture for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from cxr_tf.errors import CxrError
from cxr_tf.files import replacing

# An exact fill would have no finite ratio: 100 dB is an error of a four-hundredth of a gray level.
_LEAST_ERROR = 1e-10
_WINDOW = 11  # of SSIM, in pixels

_GRAY = "#5F6368"
_MARK = (255, 140, 0)


class FillingError(CxrError):
    """Films or holes from which no figure and no picture can be made."""


def psnr(filled: Any, original: Any, hole: Any) -> Any:
    """Peak signal-to-noise ratio in the hole: -10 log10 of the mean squared error, on a scale where white is 1.

    Args:
        filled: `[batch, height, width, 1]`, 0-255.
        original: of that shape, 0-255.
        hole: of that shape, 1 in the hole and 0 elsewhere.

    Returns:
        float32 `[batch]` in dB, at most 100; NaN for a film without a hole.

    Example:
        >>> psnr(np.full([1, 2, 2, 1], 25.5), np.zeros([1, 2, 2, 1]), np.ones([1, 2, 2, 1])).numpy()
        array([20.], dtype=float32)
    """
    filled, original, hole = (tf.cast(x, tf.float32) for x in (filled, original, hole))
    errors = tf.square((filled - original) / 255.0) * hole
    mse = tf.reduce_sum(errors, axis=(1, 2, 3)) / tf.reduce_sum(hole, axis=(1, 2, 3))
    return -10.0 * tf.math.log(tf.maximum(mse, _LEAST_ERROR)) / tf.math.log(10.0)


def ssim(filled: Any, original: Any, hole: Any) -> Any:
    """Structural similarity in the hole (Wang et al., IEEE Trans. Image Processing 2004).

    The index of a pixel is that of the window around it, Gaussian with a standard deviation of 1.5 pixels and 11 pixels
    wide, and so takes in what is near the hole; the figure is the mean over the pixels of the hole. Pixels within 5 of
    the border have no whole window and do not count.

    Args:
        filled: `[batch, height, width, 1]`, 0-255, sides of at least 11.
        original: of that shape, 0-255.
        hole: of that shape, 1 in the hole and 0 elsewhere.

    Returns:
        float32 `[batch]`, at most 1; NaN for a film without a hole.

    Raises:
        FillingError: when the films are smaller than a window.
    """
    filled, original, hole = (tf.cast(x, tf.float32) for x in (filled, original, hole))
    if min(original.shape[1:3]) < _WINDOW:
        raise FillingError(f"SSIM takes films of at least {_WINDOW} pixels a side. Received: {original.shape[1:3]}")
    index = tf.image.ssim(original, filled, max_val=255.0, filter_size=_WINDOW, return_index_map=True)
    rim = _WINDOW // 2
    inside = hole[:, rim:-rim, rim:-rim, 0]
    return tf.reduce_sum(index * inside, axis=(1, 2)) / tf.reduce_sum(inside, axis=(1, 2))


def mean_fill(images: Any, holes: Any) -> np.ndarray:
    """The least to beat: each hole filled with the mean of its film outside of it.

    Args:
        images: `[batch, height, width, 1]`, 0-255.
        holes: of that shape, 1 in the hole and 0 elsewhere.

    Returns:
        float32 of that shape, 0-255.
    """
    images, inside = np.asarray(images, np.float32), np.asarray(holes) > 0
    means = np.mean(images, axis=(1, 2, 3), keepdims=True, where=~inside)
    return np.where(inside, means, images)


def classical_fill(images: Any, holes: Any) -> np.ndarray:
    """What to beat without learning: each hole filled by the smoothest surface that continues its rim.

    It solves the biharmonic equation in the hole (Damelin & Hoang, Int. J. Mathematics and Mathematical Sciences 2018,
    scikit-image's `inpaint_biharmonic`).

    Args:
        images: `[batch, height, width, 1]`, 0-255.
        holes: of that shape, 1 in the hole and 0 elsewhere.

    Returns:
        float32 of that shape, 0-255.
    """
    from skimage.restoration import inpaint_biharmonic  # 0.3 s, and training alone does not need it

    images, inside = np.asarray(images, np.float32), np.asarray(holes) > 0
    filled = images.copy()
    for i in np.flatnonzero(inside.any(axis=(1, 2, 3))):
        film = np.clip(inpaint_biharmonic(images[i, ..., 0] / 255.0, inside[i, ..., 0]), 0.0, 1.0)
        filled[i, ..., 0] = np.where(inside[i, ..., 0], 255.0 * film, images[i, ..., 0])
    return filled


def evaluate_filling(model: Any, dataset: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How well a model fills the holes of a data set.

    Args:
        model: an `Inpainting`.
        dataset: finite, of dictionaries of "image" and "hole" as for training.

    Returns:
        "psnr" in dB and "ssim", both in the hole and the mean over all films that have one.

    Raises:
        FillingError: when no film has a hole.

    Example:
        >>> baselines = evaluate_baselines(dataset)
        >>> evaluate_filling(inpainting, dataset) | baselines
    """

    @tf.function(reduce_retracing=True)
    def fill(images: Any, holes: Any) -> Any:
        return model.fill(images, holes)

    return _means(dataset, {"": fill})


def evaluate_baselines(dataset: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How well `mean_fill` and `classical_fill` do on a data set: worked out once, since they do not learn.

    On one core `classical_fill` takes about 20 ms a film at 128 pixels with a hole over the lung, 0.3 s at 256.

    Args:
        dataset: finite, of dictionaries of "image" and "hole" as for training.

    Returns:
        "mean_psnr", "mean_ssim", "classical_psnr" and "classical_ssim", as `evaluate_filling` measures them.

    Raises:
        FillingError: when no film has a hole.
    """
    return _means(dataset, {"mean_": mean_fill, "classical_": classical_fill})


def _means(dataset: Iterable[Mapping[str, Any]], fillers: Mapping[str, Callable[[Any, Any], Any]]) -> dict[str, float]:
    found: dict[str, list[np.ndarray]] = {f"{name}{figure}": [] for name in fillers for figure in ("psnr", "ssim")}
    for data in dataset:
        images, holes = tf.cast(data["image"], tf.float32), tf.cast(data["hole"], tf.float32)
        for name, fill in fillers.items():
            filled = fill(images, holes)
            found[f"{name}psnr"].append(psnr(filled, images, holes).numpy())
            found[f"{name}ssim"].append(ssim(filled, images, holes).numpy())
    values = {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in found.items()}
    known = {name: each[~np.isnan(each)] for name, each in values.items()}
    if not all(each.size for each in known.values()):
        raise FillingError("There is nothing to measure: no film has a hole farther than 5 pixels from its border.")
    return {name: float(np.mean(each, dtype=np.float64)) for name, each in known.items()}


def filling_grid(
    path: str | Path,
    originals: Any,
    holed: Any,
    filled: Any,
    holes: Any,
    *,
    titles: Sequence[str] = (),
    title: str = "",
    side: int = 288,
) -> Path:
    """A picture of holes and how they are filled: a row a film, beside `mean_fill` and `classical_fill`.

    Under each filled film stand PSNR and SSIM in its hole, the best of the row in black.

    Args:
        path: file to write, .png.
        originals: `[films, height, width, 1]`, 0-255.
        holed: of that shape, 0-255: what the model sees. The hole is outlined in orange.
        filled: of that shape, 0-255: by the model.
        holes: of that shape, 1 in the hole and 0 elsewhere.
        titles: of the films, under the originals; never a patient's name.
        title: on top.
        side: longer side of a film in the picture, in pixels.

    Returns:
        The path.

    Raises:
        FillingError: without a film, for shapes that differ, or for another ending.
        WriteError: when the file cannot be written.

    Example:
        >>> images, holes = data["image"], data["hole"]
        >>> filling_grid("filling.png", images, model.cut(images, holes), model.fill(images, holes), holes)
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise FillingError(f"A picture of filled films ends in .png. Received: {target.name}")
    originals, holed, filled, holes = (np.asarray(x, np.float32) for x in (originals, holed, filled, holes))
    shapes = [x.shape for x in (originals, holed, filled, holes)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 4 or not shapes[0][0]:
        raise FillingError(f"Films are [films, height, width, 1], with one film or more, and all alike. Got: {shapes}")
    columns = {
        "original": originals,
        "with hole": holed,
        "filled by the model": filled,
        "filled with the mean": mean_fill(originals, holes),
        "filled smoothly (biharmonic)": classical_fill(originals, holes),
    }
    figures = {
        name: np.stack([psnr(films, originals, holes), ssim(films, originals, holes)], axis=1)
        for name, films in list(columns.items())[2:]
    }

    scale = side / max(shapes[0][1:3])
    height, width = (round(n * scale) for n in shapes[0][1:3])
    huge, large, small = (ImageFont.load_default(max(11, round(side / n))) for n in (14, 18, 21))
    gap, line = max(6, side // 36), max(16, side // 15)
    top = gap + (2 * line if title else 0) + line + gap // 2
    row = height + gap // 2 + line + gap
    bottom = line + gap
    sheet = Image.new("RGB", (gap + len(columns) * (width + gap), top + len(originals) * row + bottom), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap), title, "black", huge)
    for column, (name, films) in enumerate(columns.items()):
        left = gap + column * (width + gap)
        draw.text((left, top - line - gap // 2), name, "black", large)
        for i, film in enumerate(films):
            up = top + i * row
            sheet.paste(_shown(film, width, height), (left, up))
            if name == "with hole":
                sheet.paste(_MARK, (left, up), _rim(holes[i, ..., 0] > 0, width, height))
            text, color = (titles[i] if not column and i < len(titles) else ""), _GRAY
            if name in figures:
                ratio, index = figures[name][i]
                best = max(found[i, 0] for found in figures.values())
                text = "no hole" if np.isnan(ratio) else f"{ratio:.1f} dB   SSIM {index:.2f}"
                color = "black" if ratio == best else _GRAY
            draw.text((left, up + height + gap // 2), text, color, small)
    note = "PSNR and SSIM inside the hole, higher is better; black: highest PSNR of the row."
    draw.text((gap, sheet.height - bottom + gap // 2), note, _GRAY, small)
    with replacing(target) as temporary:
        sheet.save(temporary)
    return target


def _shown(film: np.ndarray, width: int, height: int) -> Image.Image:
    image = Image.fromarray(np.rint(film[..., 0]).clip(0, 255).astype(np.uint8))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _rim(hole: np.ndarray, width: int, height: int) -> Image.Image:
    """The inner rim of a hole at the picture's size, two pixels wide, as a mask to paste through."""
    inside = np.asarray(Image.fromarray(hole).resize((width, height), Image.Resampling.NEAREST))
    return Image.fromarray(inside & ~ndimage.binary_erosion(inside, iterations=2))
