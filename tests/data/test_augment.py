"""Random changes: closed cases, film and mask together, and draws that depend on (seed, position) alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_tf.data.augment import _DRAWS, Augment, AugmentError, uniforms

SIZE = 32
NAMES = ("flip", "rotation", "scale", "shift_x", "shift_y", "crop", "crop_x", "crop_y", "aspect")
EVERYTHING = Augment(crop=0.3, blur=0.5, noise=0.1, erase=0.5, aspect=1.5)
ONLY = {
    "flip": {"flip": 0.5},
    "rotation": {"rotation": 20.0},
    "scale": {"scale": (0.8, 1.25)},
    "shift": {"shift": 0.2},
    "crop": {"crop": 0.5},
    "aspect": {"crop": 0.5, "aspect": 1.5},
    "brightness": {"brightness": 0.2},
    "contrast": {"contrast": 0.3},
    "gamma": {"gamma": 0.5},
    "noise": {"noise": 0.1},
    "blur": {"blur": 0.7},
    "erase": {"erase": 0.7},
}


def only(**changes) -> Augment:
    return dataclasses.replace(Augment.none(), **changes)


def films(count: int = 6, size: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 255, (count, size, size, 1)).astype(np.float32)


def places(count: int, start: int = 0) -> tf.Tensor:
    return tf.range(start, start + count, dtype=tf.int64)


def eager(augment, images, masks, seed, positions):
    images, masks = augment(tf.constant(images), tf.constant(masks), seed, positions)
    return images.numpy(), masks.numpy()


def in_pipeline(augment, images, masks, seed, positions):
    dataset = tf.data.Dataset.from_tensors((images, masks, positions))
    images, masks = next(iter(dataset.map(lambda i, m, p: augment(i, m, seed, p))))
    return images.numpy(), masks.numpy()


BOTH = pytest.mark.parametrize("run", [eager, in_pipeline])


def warped(augment: Augment, images: np.ndarray, **draws: float) -> np.ndarray:
    """A warp with draws that are given."""
    fixed = {name: tf.constant([draws.get(name, 0.5)], tf.float64) for name in NAMES}
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=augment.transforms(fixed, images.shape[1]),
        output_shape=images.shape[1:3],
        fill_value=0.0,
        interpolation="BILINEAR",
    ).numpy()


@BOTH
def test_none_changes_nothing(run):
    images = films()
    masks = (images > 128).astype(np.float32)
    out, moved = run(Augment.none(), images, masks, 0, places(6))
    np.testing.assert_array_equal(out, images)
    np.testing.assert_array_equal(moved, masks)


@BOTH
def test_the_warp_that_changes_nothing_is_exact(run):
    images = films()
    out, _ = run(only(flip=1e-9), images, images * 0, 0, places(6))
    np.testing.assert_array_equal(out, images)


@BOTH
@pytest.mark.parametrize("size", [32, 33])
def test_flip_is_numpys(run, size):
    images = films(size=size)
    masks = (images > 128).astype(np.float32)
    out, moved = run(only(flip=1.0), images, masks, 0, places(6))
    np.testing.assert_array_equal(out, np.flip(images, axis=2))
    np.testing.assert_array_equal(moved, np.flip(masks, axis=2))


def test_quarter_turns_are_numpys():
    images = films(1)
    for draw, turns in ((1.0, -1), (0.0, 1)):
        out = warped(only(rotation=90.0), images, rotation=draw)
        np.testing.assert_allclose(out, np.rot90(images, turns, axes=(1, 2)), atol=1e-2)


def test_half_turn_is_two_flips():
    images = films(1)
    np.testing.assert_allclose(warped(only(rotation=180.0), images, rotation=1.0), images[:, ::-1, ::-1], atol=1e-2)


def test_shift_by_whole_pixels():
    images = films(1)
    out = warped(only(shift=0.25), images, shift_x=1.0, shift_y=0.5)
    np.testing.assert_allclose(out[:, :, :24], images[:, :, 8:], atol=1e-3)
    assert not out[:, :, 24:].any()  # black from outside
    out = warped(only(shift=0.25), images, shift_x=0.5, shift_y=0.0)
    np.testing.assert_allclose(out[:, 8:], images[:, :24], atol=1e-3)


def test_zoom_keeps_the_center():
    images = np.zeros((1, 33, 33, 1), np.float32)
    images[0, 12:21, 12:21] = 200  # 9 pixels around the center
    out = warped(only(scale=(2.0, 2.0)), images)
    assert (out > 100).sum() == 17**2  # the edges lie at twice the distance: 8.5 -> 17 pixels, half of them inside
    np.testing.assert_array_equal(out, out[:, ::-1])
    np.testing.assert_array_equal(out, out[:, :, ::-1])


def test_crop_zooms_a_window_of_the_square():
    """The last draw cuts three quarters away: a window of half the side, here in the upper left corner."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.float32)[:, None, None], (64, 64, 1))[None]
    out = warped(only(crop=0.75), np.ascontiguousarray(ramp), crop=1.0, crop_x=0.0, crop_y=0.0)
    np.testing.assert_allclose(out[0, 1:-1, 1:-1, 0], (np.arange(64)[1:-1, None] / 2 - 0.25) * np.ones(62), atol=1e-3)
    out = warped(only(crop=0.75), np.ascontiguousarray(ramp), crop=1.0, crop_x=0.0, crop_y=1.0)
    assert out[0, 0, 5, 0] == pytest.approx(31.75, abs=1e-3) and out[0, -2, 5, 0] == pytest.approx(62.75, abs=1e-3)


def windows(augment: Augment, count: int, size: int = 64, seed: int = 0) -> np.ndarray:
    """Where crops begin and how long they are, as parts of the side: `[count, (left, top, width, height)]`."""
    draws = dict(zip(_DRAWS, tf.unstack(uniforms(seed, places(count), len(_DRAWS)), axis=1), strict=True))
    a, b, x, c, d, y, *_ = tf.transpose(augment.transforms(draws, size)).numpy()
    assert not b.any() and not c.any()  # nothing turns
    # Pixel i of the result is centered at i + 0.5, and so is a pixel of the film.
    return np.stack([(x + 0.5 - a / 2) / size, (y + 0.5 - d / 2) / size, a, d], axis=1)


@given(
    st.floats(0.01, 0.99),
    st.floats(1.0, 10.0).map(np.float64),
    st.integers(0, 2**31),
    st.sampled_from([32, 33, 224]),
)
@settings(max_examples=25, deadline=None)
def test_a_stretched_window_stays_in_the_square(crop, aspect, seed, size):
    left, top, width, height = windows(only(crop=crop, aspect=float(aspect)), 500, size, seed).T
    for start, length in ((left, width), (top, height)):
        assert start.min() >= -1e-5 and (start + length).max() <= 1 + 1e-5
    assert (1 - crop) * (1 - 1e-5) <= (width * height).min() and (width * height).max() <= 1 + 1e-5
    ratio = width / height
    assert ratio.max() <= aspect * (1 + 1e-5) and ratio.min() >= (1 - 1e-5) / aspect


def test_stretching_changes_neither_area_nor_anything_without_a_crop():
    plain, stretched = windows(only(crop=0.8), 1000), windows(only(crop=0.8, aspect=4 / 3), 1000)
    np.testing.assert_allclose(stretched[:, 2] * stretched[:, 3], plain[:, 2] ** 2, rtol=1e-5)
    np.testing.assert_array_equal(windows(only(flip=1e-9, aspect=4 / 3), 10), np.tile([0, 0, 1, 1], (10, 1)))


def test_stretches_are_those_of_torchvision_given_the_area():
    """Where each ratio has room (below 3/4 of the area), log-uniform, and no side is preferred."""
    _, _, width, height = windows(only(crop=0.8, aspect=4 / 3), 20_000).T
    ratio = np.log((width / height)[width * height < 0.75]) / np.log(4 / 3)
    np.testing.assert_allclose(np.histogram(ratio, 10, (-1, 1))[0] / len(ratio), 0.1, atol=0.01)


def test_a_stretched_window_shows_what_it_frames():
    """The last draws: 4/9 of the square, 3 to 2: all of the width, four ninths of the height, here at the top."""
    ramp = np.broadcast_to(np.arange(72, dtype=np.float32)[:, None, None], (72, 72, 1))[None]
    out = warped(only(crop=5 / 9, aspect=10.0), np.ascontiguousarray(ramp), crop=1.0, crop_y=0.0, aspect=1.0)
    np.testing.assert_allclose(
        out[0, 2:-2, :, 0], ((np.arange(72) + 0.5) * 4 / 9 - 0.5)[2:-2, None] * np.ones(72), atol=1e-3
    )


@given(st.integers(0, 2**31), st.sampled_from([0.0, 60.0]), st.sampled_from([31, 32, 224]))
@settings(max_examples=15, deadline=None)
def test_a_warp_is_tensorflows(seed, rotation, size):
    """With windows that reach the edge and what lies outside."""
    augment = only(flip=0.5, rotation=rotation, scale=(0.5, 2.0), shift=0.4, crop=0.6, aspect=2.0)
    images = films(5, size)
    draws = dict(zip(_DRAWS, tf.unstack(uniforms(seed, places(5), len(_DRAWS)), axis=1), strict=True))
    theirs = tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=augment.transforms(draws, size),
        output_shape=[size, size],
        fill_value=0.0,
        interpolation="BILINEAR",
    )
    ours = eager(augment, images, images * 0, seed, places(5))[0]
    np.testing.assert_allclose(ours, theirs, atol=0.05 if rotation else 1e-3)


@BOTH
def test_films_may_come_without_masks(run):
    images = films(6)
    out, masks = run_alone(run, EVERYTHING, images)
    assert masks is None
    np.testing.assert_array_equal(out, run(EVERYTHING, images, (images > 128).astype(np.float32), 4, places(6))[0])


def run_alone(run, augment, images):
    """As `run`, without masks."""
    if run is eager:
        out, masks = augment(tf.constant(images), None, 4, places(len(images)))
        return out.numpy(), masks
    given = []

    def change(some, positions):
        out, masks = augment(some, None, 4, positions)
        given.append(masks)
        return out

    out = next(iter(tf.data.Dataset.from_tensors((images, places(len(images)))).map(change)))
    return out.numpy(), given[-1]


@given(st.integers(0, 2**31), st.integers(0, 2**40))
@settings(max_examples=15, deadline=None)
def test_a_mask_moves_with_its_film(seed, start):
    """A film that shows its mask, warped, still shows it."""
    y, x = np.mgrid[:64, :64]
    masks = np.stack([((x - 20 - i) ** 2 + (y - 30) ** 2 < 15**2) | (x > 55) for i in range(4)])
    masks = masks[..., None].astype(np.float32)
    augment = only(flip=0.5, rotation=45, scale=(0.5, 2), shift=0.3, crop=0.5, aspect=2.0)
    images, moved = eager(augment, masks * 255, masks, seed, places(4, start))
    clear = np.abs(images - 127.5) > 0.01
    np.testing.assert_array_equal((images >= 127.5)[clear], (moved == 1)[clear])
    assert set(np.unique(moved)) <= {0.0, 1.0}


@BOTH
def test_an_unknown_mask_stays_unknown_and_an_empty_one_empty(run):
    images = films(4)
    masks = np.zeros_like(images)
    masks[1] = np.nan
    masks[2, 8:20, 8:20] = 1
    _, moved = run(EVERYTHING, images, masks, 3, places(4))
    assert np.isnan(moved[1]).all()
    assert not moved[0].any() and not moved[3].any() and moved[2].any()


def mixed(size: int) -> tuple[np.ndarray, np.ndarray, tf.Tensor]:
    images = films(8, size)
    masks = (images > 100).astype(np.float32)
    masks[2] = np.nan
    return images, masks, places(8, 1000)


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("changes", [*ONLY.values(), None], ids=[*ONLY, "everything"])
def test_what_stands_beside_a_film_does_not_matter(changes, size):
    """However films are divided among batches, replicas and workers: the same bits."""
    augment = EVERYTHING if changes is None else only(**changes)
    images, masks, positions = mixed(size)
    whole = eager(augment, images, masks, 7, positions)
    for part in ([0, 1, 2], [3, 4, 5, 6, 7], [7, 2, 5], [6]):
        some = eager(augment, images[part], masks[part], 7, tf.gather(positions, part))
        np.testing.assert_array_equal(some[0], whole[0][part])
        np.testing.assert_array_equal(some[1], whole[1][part])


@pytest.mark.parametrize("size", [32, 33])
def test_the_size_of_batches_does_not_matter_in_a_pipeline(size):
    found = []
    for batch_size in (8, 4, 3, 1):
        dataset = tf.data.Dataset.from_tensor_slices(mixed(size)).batch(batch_size)
        dataset = dataset.map(lambda i, m, p: EVERYTHING(i, m, 7, p))
        found.append([np.concatenate(parts) for parts in zip(*dataset.as_numpy_iterator(), strict=True)])
    for images, masks in found[1:]:
        np.testing.assert_array_equal(images, found[0][0])
        np.testing.assert_array_equal(masks, found[0][1])


@pytest.mark.parametrize("changes", ONLY.values(), ids=ONLY)
def test_each_change_changes_and_stays_in_range(changes):
    images = films(16)
    out, _ = eager(only(**changes), images, images * 0, 0, places(16))
    assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 255
    assert not np.array_equal(out, images)
    other = eager(only(**changes), images, images * 0, 1, places(16))[0]
    assert not np.array_equal(out, other)
    assert not np.array_equal(out, eager(only(**changes), images, images * 0, 0, places(16, 16))[0])


@pytest.mark.parametrize(("changes", "share"), [({"flip": 0.3}, 0.3), ({"blur": 0.3}, 0.3), ({"erase": 0.3}, 0.3)])
def test_probabilities(changes, share):
    images = films(2000, 8)
    out, _ = eager(only(**changes), images, images * 0, 0, places(2000))
    assert (out != images).any(axis=(1, 2, 3)).mean() == pytest.approx(share, abs=0.04)


def test_brightness_and_contrast_are_linear_around_gray():
    grays = np.tile(np.array([100, 127.5, 150], np.float32)[None, None, :, None], (64, 3, 1, 1))
    out = eager(only(brightness=0.1), grays, grays * 0, 0, places(64))[0]
    shift = (out - grays)[:, 0, 0, 0]
    np.testing.assert_allclose(out - grays, np.broadcast_to(shift[:, None, None, None], out.shape), atol=1e-3)
    assert 20 < np.abs(shift).max() <= 25.5 and abs(shift.mean()) < 6
    out = eager(only(contrast=0.2), grays, grays * 0, 0, places(64))[0][:, 0, :, 0]
    np.testing.assert_allclose(out[:, 1], 127.5, atol=1e-3)
    gain = (out[:, 2] - out[:, 1]) / 22.5
    np.testing.assert_allclose((out[:, 0] - out[:, 1]) / -27.5, gain, atol=1e-4)
    assert 0.8 <= gain.min() < 0.83 and 1.17 < gain.max() <= 1.2


def test_gamma_keeps_the_ends_and_follows_the_power():
    levels = np.linspace(0, 255, 64, dtype=np.float32)
    ramp = np.tile(levels[None, None, :, None], (64, 64, 1, 1))
    out = eager(only(gamma=0.2), ramp, ramp * 0, 0, places(64))[0][:, 0, :, 0]
    np.testing.assert_array_equal(out[:, [0, -1]], np.tile([0, 255], (64, 1)))
    assert (np.diff(out, axis=1) > 0).all()
    exponents = np.log(np.array([np.interp(127.5, levels, row) for row in out]) / 255) / np.log(0.5)
    assert 1 / 1.21 < exponents.min() < 0.86 and 1.17 < exponents.max() < 1.21
    np.testing.assert_allclose(out, 255 * (levels / 255) ** exponents[:, None], atol=6)


def test_noise_has_its_strength_and_no_offset():
    gray = np.full((400, 32, 32, 1), 127.5, np.float32)
    noise = (eager(only(noise=0.1), gray, gray * 0, 0, places(400))[0] - gray)[..., 0]
    deviation = noise.std(axis=(1, 2))
    assert (deviation > 0).mean() == pytest.approx(0.25, abs=0.07)
    assert 23 < deviation.max() < 27 and np.median(deviation[deviation > 0]) == pytest.approx(12.75, abs=3)
    strong = noise[deviation > 15] / deviation[deviation > 15][:, None, None]
    assert abs(strong.mean()) < 0.01 and (strong**4).mean() == pytest.approx(3, abs=0.15)
    assert abs((strong[:, :, 1:] * strong[:, :, :-1]).mean()) < 0.01  # neighbors know nothing of each other


def test_blur_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    images = films(16)
    out = eager(only(blur=1.0), images, images * 0, 0, places(16))[0]
    for film, blurred in zip(images[..., 0], out[..., 0], strict=True):
        error = [
            np.abs(ndimage.gaussian_filter(film, sigma, mode="reflect", radius=4) - blurred).max()
            for sigma in np.linspace(0.5, 1.5, 401)
        ]
        assert min(error) < 0.6  # half a step of sigma; it moves the worst pixel by that much


def test_erasing_leaves_a_rectangle_of_one_gray():
    images = films(64, 64)
    out = eager(only(erase=1.0), images, images * 0, 0, places(64))[0]
    for film, erased in zip(images[..., 0], out[..., 0], strict=True):
        changed = film != erased
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert len(np.unique(erased[changed])) == 1
        assert 0.015 < changed.mean() < 0.11


def test_masks_do_not_feel_what_changes_gray_levels():
    images = films(8)
    masks = (images > 128).astype(np.float32)
    augment = only(brightness=0.3, contrast=0.3, gamma=0.3, noise=0.2, blur=1.0, erase=1.0)
    np.testing.assert_array_equal(eager(augment, images, masks, 0, places(8))[1], masks)


def test_uniforms_are_splitmix64():
    """The generator's published first outputs for the states 0 and 1."""
    from cxr_tf.data.augment import _mix

    assert [int(v) for v in _mix(tf.constant([0, 1], tf.uint64))] == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]


def test_uniforms_are_uniform_and_independent():
    draws = uniforms(5, places(20_000), 4).numpy()
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(np.histogram(draws, 10, (0, 1))[0] / draws.size, 0.1, atol=0.005)
    np.testing.assert_allclose(np.corrcoef(draws, rowvar=False), np.eye(4), atol=0.03)
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03
    assert len(np.unique(np.concatenate([draws, uniforms(6, places(20_000), 4)]))) == 160_000


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"flip": 1.5}, "flip"),
        ({"rotation": -1.0}, "rotation"),
        ({"noise": float("nan")}, "noise"),
        ({"scale": (1.2, 0.8)}, "scale"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": [1.0]}, "scale"),
        ({"crop": 1.0}, "crop"),
        ({"gamma": float("inf")}, "gamma"),
        ({"aspect": 0.75}, "aspect"),
        ({"aspect": float("nan")}, "aspect"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(changes, name):
    with pytest.raises(AugmentError, match=rf"^{name} .*Received: "):
        Augment(**changes)
