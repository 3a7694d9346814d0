"""Augmentation is the paper's section 4.1, and where asked, run #145's or the inception crop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augmenting import BORDER, CROP, SIZE, config, images, run, stats

from alexnet_jax import config as configs
from alexnet_jax.data import augment
from alexnet_jax.utils.errors import UserError


def where_from(crop, image):
    """The (y, x, flipped) at which a crop was taken out of an image."""
    for y in range(BORDER + 1):
        for x in range(BORDER + 1):
            window = image[y : y + CROP, x : x + CROP]
            if (window == crop).all():
                return y, x, False
            if (window[:, ::-1] == crop).all():
                return y, x, True
    raise AssertionError("not a crop of the image")


def test_crops_reach_every_offset_and_both_mirrorings_about_equally():
    batch = np.repeat(images(), 2000, axis=0)
    found = [where_from(crop, batch[0]) for crop in run(batch, config(flip=True), stats())]
    ys, xs, flips = (np.array(values) for values in zip(*found, strict=True))
    for offsets in (ys, xs):
        counts = np.bincount(offsets, minlength=BORDER + 1)
        assert len(counts) == BORDER + 1
        assert counts.min() > 0.7 * 2000 / (BORDER + 1)
        assert counts.max() < 1.3 * 2000 / (BORDER + 1)
    assert 0.45 < flips.mean() < 0.55
    assert abs(np.corrcoef(ys, xs)[0, 1]) < 0.08


def test_without_flip_none_is_mirrored():
    batch = np.repeat(images(), 64, axis=0)
    assert not any(where_from(crop, batch[0])[2] for crop in run(batch, config(), stats()))


def test_mean_image_is_subtracted_pixel_for_pixel_before_the_crop():
    mean = images(seed=1)[0]
    batch = images(16)
    crops = run(batch, config(mean="image", flip=True), stats(mean))
    whole = batch.astype(np.float32) - mean
    assert len({where_from(c, w) for c, w in zip(crops, whole, strict=True)}) > 4


def test_image_center_subtracts_the_central_window_wherever_the_crop_was():
    mean = images(seed=1)[0].astype(np.float32)
    center = mean[BORDER // 2 : -BORDER // 2, BORDER // 2 : -BORDER // 2]
    batch = images(8)
    crops = run(batch, config(mean="image_center"), stats(mean))
    for crop, image in zip(crops, batch, strict=True):
        where_from(crop + center, image)


def test_channel_mean_is_subtracted_from_each_channel():
    batch = images(4)
    mean = np.float32([1, 2, 3])
    crops = run(batch, config(mean="channel"), stats(mean))
    for crop, image in zip(crops, batch, strict=True):
        where_from(crop + mean, image)


def test_colour_noise_is_one_colour_for_each_image_with_the_facts_covariance():
    """Before the 1/1.1, the added term's covariance is 0.01 · V diag(s²) Vᵀ."""
    basis = np.float32([[5, 1, 0], [4, -1, 2], [3, 0, -3]])
    batch = np.repeat(images(), 20_000, axis=0)[:, :, :, :]
    c = config(mean="channel")
    c.augment.crop_size = SIZE
    noisy = run(batch[:, :, :], c, stats(np.zeros(3), basis), noise=0.1)
    added = noisy - batch
    assert np.abs(added - added[:, :1, :1]).max() < 1e-4
    colours = added[:, 0, 0].astype(np.float64)
    np.testing.assert_allclose(np.cov(colours.T), 0.01 * basis @ basis.T, rtol=0.06, atol=0.01)
    np.testing.assert_allclose(colours.mean(0), 0, atol=0.02)


@pytest.mark.parametrize(
    ("scale", "expected"), [("eigenvalue", (400.0 / 255, 100.0 / 255)), ("std", (20.0, 10.0))]
)
def test_noise_is_scaled_by_eigenvalues_of_unit_pixels_or_by_standard_deviations(scale, expected):
    class TrainSplit:
        mean_image = np.zeros((SIZE, SIZE, 3), np.float32)
        eigenvalues = np.float32([400, 100, -1e-7])  # as rounding may leave one of 0
        eigenvectors = np.eye(3, dtype=np.float32)

    basis = augment.statistics(TrainSplit, config(color_noise_scale=scale)).noise_basis
    np.testing.assert_allclose(np.diag(basis), [*expected, 0], rtol=1e-6, atol=1e-9)


def test_run_145_divides_the_noisy_image_by_1_1_and_only_while_there_is_noise():
    batch = images(3)
    plain = run(batch, config(), stats())
    shrunk = run(batch, config(color_noise_shrink=True), stats(), noise=0.1)
    np.testing.assert_allclose(shrunk, plain / 1.1, rtol=1e-6)
    np.testing.assert_array_equal(run(batch, config(color_noise_shrink=True), stats()), plain)


def test_each_image_is_augmented_by_its_own_key_alone():
    batch = images(6)
    keys = jax.random.split(jax.random.PRNGKey(0), 6)
    c, s = config(flip=True), stats(basis=np.eye(3))
    whole = augment.augment(batch, keys, jnp.float32(5), s, c)
    part = augment.augment(batch[4:], keys[4:], jnp.float32(5), s, c)
    np.testing.assert_array_equal(whole[4:], part)


@pytest.mark.parametrize("text", ["0.2,1.0", "(0.2, 1)", "[0.2, 1.0]"])
def test_a_range_is_set_on_the_command_line(text):
    c = configs.load("configs/quickstart.py", [("augment.crop_area", text)])
    assert c.augment.crop_area == (0.2, 1.0)
    augment.check(c)


@pytest.mark.parametrize(
    ("field", "values", "told"),
    [
        ("crop_area", (0.0, 1.0), "0 < low <= high <= 1"),
        ("crop_area", (0.5, 0.4), "0 < low <= high <= 1"),
        ("crop_area", (0.5, 1.5), "0 < low <= high <= 1"),
        ("crop_area", (0.5,), "two numbers"),
        ("crop_area", (0.1, 0.2, 0.3), "two numbers"),
        ("crop_area", ("a", "b"), "two numbers"),
        ("crop_aspect", (0, 1), "0 < low <= high"),
        ("crop_aspect", (-1.0, 1.0), "0 < low <= high"),
        ("crop_aspect", (4 / 3, 3 / 4), "0 < low <= high"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused_by_name(field, values, told):
    with pytest.raises(UserError, match=f"augment.{field}=.*{told}"):
        augment.check(config(**{field: values}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop_size", 1), ("crop_size", SIZE), ("crop_area", (1.0, 1.0)), ("crop_aspect", (2, 2))],
)
def test_a_range_includes_its_ends(field, value):
    augment.check(config(**{field: value}))


def test_ten_views_are_corners_and_centre_then_their_mirrors():
    c = config(mean="channel")
    c.image_size, c.augment.crop_size = 256, 224
    image = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    views = np.asarray(augment.ten_views(image, stats(np.zeros(3)), c))
    assert len(views) == augment.TEN_VIEWS
    offsets = [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    for place, (y, x) in enumerate(offsets):
        window = image[0, y : y + 224, x : x + 224]
        np.testing.assert_array_equal(views[place, 0], window)
        np.testing.assert_array_equal(views[place + 5, 0], window[:, ::-1])


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
def test_views_are_less_the_mean_and_the_third_is_the_centre_crop(mean):
    c = config(mean=mean)
    s = stats(np.float32([1, 2, 3]) if mean == "channel" else images(seed=1)[0])
    batch = images(2)
    corner, center = (
        np.s_[start : start + CROP, start : start + CROP] for start in (0, BORDER // 2)
    )
    of_corner, of_center = {
        "image": lambda: (s.mean[corner], s.mean[center]),
        "image_center": lambda: (s.mean[center], s.mean[center]),
        "channel": lambda: (s.mean, s.mean),
    }[mean]()
    views = augment.ten_views(batch, s, c)
    np.testing.assert_array_equal(views[0], batch[:, *corner] - of_corner)
    np.testing.assert_array_equal(views[2], batch[:, *center] - of_center)
    np.testing.assert_array_equal(augment.center_crop(batch, s, c), views[2])


def test_pixel_scale_multiplies_what_training_and_evaluation_see():
    batch, s = images(2), stats(np.full((SIZE, SIZE, 3), 7))
    scaled, times = config(pixel_scale=0.5, channel_scale=(1.0, 2.0, 4.0)), np.float32([0.5, 1, 2])
    np.testing.assert_array_equal(run(batch, scaled, s), run(batch, config(), s) * times)
    np.testing.assert_array_equal(
        augment.center_crop(batch, s, scaled), augment.center_crop(batch, s, config()) * times
    )


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("augment.crop", "five", "random, inception"),
        ("augment.mean", "median", "image, image_center, channel"),
        ("augment.color_noise_scale", "pca", "eigenvalue, std"),
        ("eval.views", "five", "center or ten"),
        ("augment.crop_size", 41, "image_size=40"),
        ("augment.crop_size", 0, "between 1 and"),
        ("augment.channel_scale", (1.0, 1.0), "three numbers"),
        ("augment.channel_scale", (1.0, 1.0, 0.0), "above 0"),
        ("augment.channel_scale", (1.0, 1.0, "x"), "three numbers"),
    ],
)
def test_a_value_that_does_not_exist_is_refused_by_name(field, value, names):
    c = config()
    section, leaf = field.split(".")
    c[section][leaf] = value
    with pytest.raises(UserError, match=field) as refused:
        augment.check(c)
    assert names in str(refused.value)
