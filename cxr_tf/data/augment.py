"""Random changes of a batch of films and masks: in graph, batched, a mask always moved with its film.

Every draw is a function of (seed, position), where a film's position is its number in the run's whole sequence of
films. So replicas and workers draw what one device would, and a run that is taken up again draws what it would have.
The results are the same bit for bit however films are divided into batches: kernels take the tail of an array through
other code than its body, which shows in the last digit of sin or exp. What there is one of per film is therefore worked
out in float64 and rounded, and pixels meet nothing but sums, products and quotients, in code that is the same for any
number of films.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import tensorflow as tf

from cxr_tf.errors import CxrError

_NOISY = 0.25  # part of the films that get noise: of all changes it costs most
_SIGMA = (0.5, 1.5)  # standard deviations of the blur, in pixels
_TAPS = 4  # of the blur to either side
_ERASED = (0.02, 0.1)  # part of the square that a rectangle takes
_ASPECT = 3.0  # largest of a rectangle

# A new draw goes to the end, so that the others stay as they are.
_DRAWS = (
    *("flip", "rotation", "scale", "shift_x", "shift_y", "crop", "crop_x", "crop_y"),
    *("brightness", "contrast", "gamma", "noise", "blur", "sigma"),
    *("erase", "erase_area", "erase_aspect", "erase_x", "erase_y", "erase_gray"),
    "aspect",
)


class AugmentError(CxrError):
    """A range that makes no sense."""


@dataclass(frozen=True)
class Augment:
    """Ranges of the random changes; the defaults suit supervised training.

    One projective warp does flip, rotation, scale, shift and crop, in film and mask. Brightness, contrast, gamma, blur,
    noise and an erased rectangle (Zhong et al. 2017, arXiv:1708.04896) change the film alone; it stays in 0-255.
    0 switches a change off.

    Attributes:
        flip: probability of a left-right flip.
        rotation: largest angle to either side, in degrees.
        scale: smallest and largest zoom, log-uniform; (1, 1) switches it off.
        shift: largest shift to either side, along each axis, as part of the side.
        crop: largest part of the square that is cut away: a random window of the rest is zoomed to the full side.
        brightness: largest change up or down, as part of the range.
        contrast: largest change up or down around mid-gray, as part of the contrast.
        gamma: the exponent is drawn from 1 / (1 + gamma) to 1 + gamma, log-uniform. The curve is Schlick's quotient
            (Graphics Gems IV, 1994), which meets the power at black, white and mid-gray.
        noise: largest standard deviation of noise, as part of the range; a quarter of the films get some.
        blur: probability of a Gaussian blur with a standard deviation of 0.5 to 1.5 pixels.
        erase: probability that a rectangle of 2 to 10 % of the square becomes one gray.
        aspect: largest ratio of the sides of the window that `crop` leaves: drawn log-uniform from 1 / aspect to
            aspect, as far as a window of that area fits into the square. 1 leaves it a square.

    Raises:
        AugmentError: a value outside of its range.

    Example:
        >>> augment = Augment(rotation=15.0, flip=0.0)
        >>> positions = tf.range(8, dtype=tf.int64)
        >>> images, masks = augment(tf.zeros([8, 64, 64, 1]), tf.zeros([8, 64, 64, 1]), 0, positions)
    """

    flip: float = 0.5
    rotation: float = 10.0
    scale: tuple[float, float] = (0.9, 1.1)
    shift: float = 0.05
    crop: float = 0.0
    brightness: float = 0.1
    contrast: float = 0.2
    gamma: float = 0.2
    noise: float = 0.02
    blur: float = 0.1
    erase: float = 0.0
    aspect: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise AugmentError(f"scale must be two numbers above 0, the smaller first. Received: {self.scale}")
        ranges = {"rotation": (0.0, 180.0), "gamma": (0.0, 10.0), "aspect": (1.0, 10.0)}
        for field in fields(self):
            value, (least, most) = getattr(self, field.name), ranges.get(field.name, (0.0, 1.0))
            if field.name != "scale" and not least <= value <= most:
                raise AugmentError(f"{field.name} must be {least:g} to {most:g}. Received: {value}")
        if self.crop == 1:
            raise AugmentError("crop must be below 1: a window must be left. Received: 1")

    @classmethod
    def none(cls) -> Augment:
        """The one that changes nothing."""
        return cls(flip=0, rotation=0, scale=(1, 1), shift=0, brightness=0, contrast=0, gamma=0, noise=0, blur=0)

    def __call__(self, images: Any, masks: Any, seed: Any, positions: Any) -> tuple[Any, Any]:
        """Changes a batch.

        Args:
            images: float32 `[batch, size, size, 1]`, 0-255.
            masks: float32 `[batch, size, size, 1]` of 0 and 1; NaN all over where there is no annotation. None for
                films alone.
            seed: int64, of the run.
            positions: int64 `[batch]`, of the films in the run's sequence.

        Returns:
            Images and masks of the same shapes and ranges, None for None. What a warp brings in from outside is
            black, and 0. The films are the same with masks and without.
        """
        shape = images.shape
        draws = dict(zip(_DRAWS, tf.unstack(uniforms(seed, positions, len(_DRAWS)), axis=1), strict=True))
        tone = self._tone(draws)
        if self.flip or self.rotation or self.shift or self.crop or self.scale != (1, 1):
            images, masks = _warp(images, masks, self.transforms(draws, shape[1]), tone, turned=self.rotation > 0)
        else:
            images = _toned(images, tone[:, :, None, None, None])
        if self.blur:

            def blurred(some: Any, index: Any) -> Any:
                return _blur(some, _between(*_SIGMA, tf.gather(draws["sigma"], index)))

            images = _change(images, draws["blur"] < self.blur, blurred)
        if self.noise:

            def noisy(some: Any, index: Any) -> Any:
                deviation = self.noise * 255.0 * tf.gather(draws["noise"], index) / _NOISY
                return _add_noise(some, deviation, seed, tf.gather(positions, index))

            images = _change(images, draws["noise"] < _NOISY, noisy)
        if self.erase:

            def erased(some: Any, index: Any) -> Any:
                return _erase(some, {name: tf.gather(draw, index) for name, draw in draws.items()})

            images = _change(images, draws["erase"] < self.erase, erased)
        return tf.ensure_shape(images, shape), None if masks is None else tf.ensure_shape(masks, shape)

    def transforms(self, draws: Mapping[str, Any], size: int) -> Any:
        """The warps: where each pixel of the result comes from.

        Args:
            draws: uniform float64 `[batch]` in [0, 1) by name.
            size: side of the square in pixels.

        Returns:
            float32 `[batch, 8]`, as `tf.raw_ops.ImageProjectiveTransformV3` takes them: output to input, (x, y).
        """
        sign = tf.where(draws["flip"] < self.flip, tf.constant(-1.0, tf.float64), 1.0)
        angle = _between(-self.rotation, self.rotation, draws["rotation"]) * (math.pi / 180)
        area = 1 - self.crop * draws["crop"]  # of the window that a crop leaves
        side, stretch = tf.sqrt(area), tf.ones_like(area)
        if self.aspect != 1:
            # Wider or higher than 1 / area it would leave the square.
            stretch = tf.sqrt(
                tf.minimum(tf.constant(self.aspect, tf.float64), 1 / area) ** _between(-1, 1, draws["aspect"])
            )
        width, height = side * stretch, side / stretch
        zoom = self.scale[0] * (self.scale[1] / self.scale[0]) ** draws["scale"] / side
        cosine, sine = tf.cos(angle) / zoom, tf.sin(angle) / zoom
        a, b, c, d = sign * cosine * stretch, sine / stretch, -sign * sine * stretch, cosine / stretch
        center = (size - 1) / 2
        x = size * (_between(-self.shift, self.shift, draws["shift_x"]) + (1 - width) * (draws["crop_x"] - 0.5))
        y = size * (_between(-self.shift, self.shift, draws["shift_y"]) + (1 - height) * (draws["crop_y"] - 0.5))
        zero = tf.zeros_like(a)
        rows = [a, b, x + (center - center * (a + b)), c, d, y + (center - center * (c + d)), zero, zero]
        return tf.cast(tf.stack(rows, axis=1), tf.float32)

    def _tone(self, draws: Mapping[str, Any]) -> Any:
        """What `_toned` takes: float32 `[3, batch]`."""
        gain = 1 + _between(-self.contrast, self.contrast, draws["contrast"])
        offset = 127.5 * (1 - gain) + 255 * _between(-self.brightness, self.brightness, draws["brightness"])
        bend = 2 ** ((1 + self.gamma) ** _between(-1, 1, draws["gamma"])) - 2
        return tf.cast(tf.stack([gain, offset, bend]), tf.float32)


def uniforms(seed: Any, positions: Any, count: int) -> Any:
    """Uniform numbers that depend on the seed and each film's position alone.

    A counter-based generator, SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"):
    TensorFlow's own stateless generators take one seed a call, not one a film.

    Args:
        seed: int64 scalar.
        positions: int64 `[batch]`.
        count: numbers per position.

    Returns:
        float64 `[batch, count]` in [0, 1), multiples of 2^-53.
    """
    stream = _mix(tf.cast(tf.convert_to_tensor(seed, tf.int64), tf.uint64))
    films = _mix(stream ^ tf.cast(positions, tf.uint64))
    numbers = _mix(films[:, None] ^ tf.cast(tf.range(count), tf.uint64))
    return tf.cast(tf.bitwise.right_shift(numbers, tf.constant(11, tf.uint64)), tf.float64) * 2.0**-53


def _mix(x: Any) -> Any:
    """One SplitMix64 step: the increment and the finalizer, a bijection of 64 bits."""
    x += tf.constant(0x9E3779B97F4A7C15, tf.uint64)
    x = (x ^ tf.bitwise.right_shift(x, tf.constant(30, tf.uint64))) * tf.constant(0xBF58476D1CE4E5B9, tf.uint64)
    x = (x ^ tf.bitwise.right_shift(x, tf.constant(27, tf.uint64))) * tf.constant(0x94D049BB133111EB, tf.uint64)
    return x ^ tf.bitwise.right_shift(x, tf.constant(31, tf.uint64))


def _between(low: float, high: float, draw: Any) -> Any:
    return low + (high - low) * draw


def _per_film(values: Any) -> Any:
    return tf.cast(values, tf.float32)[:, None, None, None]


def _change(images: Any, chosen: Any, change: Callable[[Any, Any], Any]) -> Any:
    """Puts `change(the chosen films, their index)` in their place; what is not chosen costs a copy."""
    index = tf.where(chosen)[:, 0]
    return tf.tensor_scatter_nd_update(images, index[:, None], change(tf.gather(images, index), index))


def _toned(images: Any, tone: Any) -> Any:
    """Brightness and contrast, then Schlick's quotient. (1, 0, 0) changes nothing, to the last bit."""
    gain, offset, bend = tf.unstack(tone)
    images = tf.clip_by_value(images * gain + offset, 0.0, 255.0)
    return images / (bend * (1 - images / 255) + 1)


def _warp(images: Any, masks: Any, transforms: Any, tone: Any, *, turned: bool) -> tuple[Any, Any]:
    """Films and masks alike, and films toned; a mask that is empty or unknown stays what it is."""

    def project(some: Any, transforms: Any, tone: Any) -> Any:
        if turned:
            return _project(some, transforms, tone)
        return _toned(_project_upright(some, transforms), tone[:, :, None, None, None])

    moved = project(images, transforms, tone)
    if masks is None:
        return moved, None
    index = tf.where(tf.reduce_any(masks > 0, axis=[1, 2, 3]))[:, 0]
    unchanged = tf.tile([[1.0], [0.0], [0.0]], [1, tf.size(index)])
    drawn = project(tf.gather(masks, index), tf.gather(transforms, index), unchanged)
    return moved, tf.tensor_scatter_nd_update(masks, index[:, None], tf.cast(drawn >= 0.5, masks.dtype))


def _project(images: Any, transforms: Any, tone: Any) -> Any:
    """`tf.raw_ops.ImageProjectiveTransformV3`, bilinear with black outside, in half of its time; then `_toned`.

    Compiled for one film: compiled for a batch, the last digits would depend on how many films there are. And compiled
    in three parts: in one, all arithmetic would be done pixel by pixel beside the gathers, which do not vectorize.
    """

    def project(image: Any, transform: Any, tone: Any) -> Any:
        index, x, y = _sources(image.shape[0], transform)
        return _interpolate(_corners(image, index), x, y, tone)

    film = tf.TensorSpec(images.shape[1:], images.dtype)
    inputs = images, transforms, tf.transpose(tone)
    return tf.map_fn(lambda one: project(*one), inputs, fn_output_signature=film)


@tf.function(jit_compile=True)
def _sources(size: int, transform: Any) -> tuple[Any, Any, Any]:
    """Where each pixel comes from: the upper left of four neighbours in `_corners`' frame, and how far from it."""
    a, b, x, c, d, y, *_ = tf.unstack(transform)
    steps = tf.range(size, dtype=tf.float32)
    across, down = steps[None, :], steps[:, None]
    x = tf.clip_by_value(a * across + b * down + x, -1.0, float(size))
    y = tf.clip_by_value(c * across + d * down + y, -1.0, float(size))
    left, upper = tf.floor(x), tf.floor(y)
    return (tf.cast(upper, tf.int32) + 1) * (size + 3) + tf.cast(left, tf.int32) + 1, x - left, y - upper


@tf.function(jit_compile=True)
def _corners(image: Any, index: Any) -> list[Any]:
    side = image.shape[0] + 3
    framed = tf.reshape(tf.pad(image[..., 0], [[1, 2], [1, 2]]), [-1])
    return [tf.gather(framed, index + step) for step in (0, 1, side, side + 1)]


@tf.function(jit_compile=True)
def _interpolate(corners: list[Any], x: Any, y: Any, tone: Any) -> Any:
    top = (1 - x) * corners[0] + x * corners[1]
    bottom = (1 - x) * corners[2] + x * corners[3]
    return _toned((1 - y) * top + y * bottom, tone)[..., None]


def _project_upright(images: Any, transforms: Any) -> Any:
    """`_project` where nothing turns: one axis after the other moves whole rows, in a quarter of the op's time."""
    across = _interpolate_rows(tf.transpose(images[..., 0], [0, 2, 1]), transforms[:, 0], transforms[:, 2])
    return _interpolate_rows(tf.transpose(across, [0, 2, 1]), transforms[:, 4], transforms[:, 5])[..., None]


def _interpolate_rows(images: Any, scale: Any, start: Any) -> Any:
    """Row i of a result is what lies at `scale` · i + `start` between the rows of its image; black outside."""
    size = images.shape[1]
    at = scale[:, None] * tf.range(size, dtype=tf.float32) + start[:, None]
    at = tf.clip_by_value(at, -1.0, float(size))
    before = tf.floor(at)
    part = (at - before)[:, :, None]
    framed = tf.pad(images, [[0, 0], [1, 2], [0, 0]])
    index = tf.cast(before, tf.int32) + 1
    upper = tf.gather(framed, index, axis=1, batch_dims=1)
    lower = tf.gather(framed, index + 1, axis=1, batch_dims=1)
    return (1 - part) * upper + part * lower


def _blur(images: Any, sigma: Any) -> Any:
    """Gaussian, one axis after the other; edges are mirrored. Compiled, and film by film, as `_project` is."""
    steps = tf.range(-_TAPS, _TAPS + 1, dtype=tf.float64)
    weights = tf.cast(tf.nn.softmax(-0.5 * tf.square(steps[None, :] / sigma[:, None])), tf.float32)
    film = tf.TensorSpec(images.shape[1:], images.dtype)
    return tf.map_fn(lambda pair: _blur_one(*pair), (images, weights), fn_output_signature=film)


@tf.function(jit_compile=True)
def _blur_one(image: Any, weights: Any) -> Any:
    size = image.shape[0]
    for axis in (0, 1):
        padded = tf.pad(image, [[_TAPS, _TAPS] if i == axis else [0, 0] for i in range(3)], "SYMMETRIC")
        shifted = [padded[i : i + size] if axis == 0 else padded[:, i : i + size] for i in range(2 * _TAPS + 1)]
        image = tf.add_n([weights[i] * film for i, film in enumerate(shifted)])
    return image


def _add_noise(images: Any, deviation: Any, seed: Any, positions: Any) -> Any:
    """Sums of 32 coin tosses: as good as Gaussian at these strengths, and drawn in half the time."""
    shape = images.shape[1:]

    def tosses(position: Any) -> Any:
        key = tf.stack([tf.cast(seed, tf.int64), position])
        bits = tf.random.stateless_uniform(shape, key, minval=None, maxval=None, dtype=tf.int32, alg="philox")
        return tf.raw_ops.PopulationCount(x=bits)

    heads = tf.map_fn(tosses, positions, fn_output_signature=tf.TensorSpec(shape, tf.uint8))
    noise = (tf.cast(heads, tf.float32) - 16.0) * 8**-0.5
    return tf.clip_by_value(images + _per_film(deviation) * noise, 0.0, 255.0)


def _erase(images: Any, draws: Mapping[str, Any]) -> Any:
    size = images.shape[1]
    side = tf.sqrt(_between(*_ERASED, draws["erase_area"]))
    stretch = _ASPECT ** _between(-0.5, 0.5, draws["erase_aspect"])
    inside = []
    for length, at in ((side * stretch, draws["erase_y"]), (side / stretch, draws["erase_x"])):
        pixels = tf.round(length * size)
        start = tf.round(at * (size - pixels))
        steps = tf.range(size, dtype=tf.float64)
        inside.append((steps >= start[:, None]) & (steps < (start + pixels)[:, None]))
    rectangle = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return tf.where(rectangle, _per_film(255 * draws["erase_gray"]), images)
