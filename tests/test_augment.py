"""Augmentation as the paper describes it (§4.1) and as run #145 computed it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augmenting import BORDER, CROP, SIZE, config, images, run, run_as_on_tpu, stats

from alexnet_jax import config as configs
from alexnet_jax.data.augment import make_augment, statistics
from alexnet_jax.utils.errors import UserError


def all_views(augment, batch):
    return np.stack([augment.view(batch, place) for place in augment.views])


def find_crop(crop, image):
    """Returns the (y, x, flipped) with which a crop was cut out of an image."""
    for y in range(BORDER + 1):
        for x in range(BORDER + 1):
            window = image[y : y + CROP, x : x + CROP]
            if (window == crop).all():
                return y, x, False
            if (window[:, ::-1] == crop).all():
                return y, x, True
    raise AssertionError("not a crop of the image")


def test_crops_are_uniform_over_offsets_and_flips():
    batch = np.repeat(images(), 2000, axis=0)
    found = [find_crop(crop, batch[0]) for crop in run(batch, config(flip=True), stats())]
    ys, xs, flips = (np.array(values) for values in zip(*found, strict=True))
    for offsets in (ys, xs):
        counts = np.bincount(offsets, minlength=BORDER + 1)
        assert len(counts) == BORDER + 1
        assert counts.min() > 0.7 * 2000 / (BORDER + 1)
        assert counts.max() < 1.3 * 2000 / (BORDER + 1)
    assert 0.45 < flips.mean() < 0.55
    assert abs(np.corrcoef(ys, xs)[0, 1]) < 0.08


def test_no_image_is_flipped_without_augment_flip():
    batch = np.repeat(images(), 64, axis=0)
    assert not any(find_crop(crop, batch[0])[2] for crop in run(batch, config(), stats()))


def test_mean_image_is_subtracted_from_each_pixel_before_the_crop():
    mean = images(seed=1)[0]
    batch = images(16)
    crops = run(batch, config(mean="image", flip=True), stats(mean))
    whole = batch.astype(np.float32) - mean
    assert len({find_crop(c, w) for c, w in zip(crops, whole, strict=True)}) > 4


def test_image_center_subtracts_the_center_of_the_mean_image_from_every_crop():
    mean = images(seed=1)[0].astype(np.float32)
    center = mean[BORDER // 2 : -BORDER // 2, BORDER // 2 : -BORDER // 2]
    batch = images(8)
    crops = run(batch, config(mean="image_center"), stats(mean))
    for crop, image in zip(crops, batch, strict=True):
        find_crop(crop + center, image)


def test_channel_mean_is_subtracted_from_each_channel():
    batch = images(4)
    mean = np.float32([1, 2, 3])
    crops = run(batch, config(mean="channel"), stats(mean))
    for crop, image in zip(crops, batch, strict=True):
        find_crop(crop + mean, image)


@pytest.mark.parametrize("mean", ["image", "channel"])
def test_crops_by_products_on_tpu_are_those_by_slices(mean, monkeypatch):
    """For a network in bfloat16 the mean-subtracted images are rounded to it before the crop."""
    means = np.random.default_rng(1).uniform(100, 130, (SIZE, SIZE, 3))
    s, batch = stats(means if mean == "image" else means[0, 0]), images(32)
    c = config(mean=mean, flip=True)
    np.testing.assert_array_equal(run_as_on_tpu(monkeypatch, batch, c, s), run(batch, c, s))
    c.model.dtype = "bfloat16"
    by_products, by_slices = (
        np.asarray(jnp.bfloat16(f(batch, c, s)), np.float32)
        for f in (functools.partial(run_as_on_tpu, monkeypatch), run)
    )
    np.testing.assert_array_equal(by_products, by_slices)
    noisy = config(mean=mean, flip=True, color_noise=1.0)
    noisy.model.dtype = "bfloat16"
    s = s._replace(noise_basis=np.eye(3, dtype=np.float32))
    by_products = run_as_on_tpu(monkeypatch, batch, noisy, s)
    rounding = 2**-9 * 256  # of values from 128 to 255
    assert np.abs(by_products - run(batch, noisy, s)).max() <= rounding


def test_color_noise_adds_one_color_per_image_with_the_covariance_of_the_paper():
    """The covariance of the added color is 0.1² · V diag(s²) Vᵀ."""
    basis = np.float32([[5, 1, 0], [4, -1, 2], [3, 0, -3]])
    batch = np.repeat(images(), 20_000, axis=0)
    c = config(mean="channel", color_noise=0.1, crop_size=SIZE)
    added = run(batch, c, stats(np.zeros(3), basis)) - batch
    assert np.abs(added - added[:, :1, :1]).max() < 1e-4
    colors = added[:, 0, 0].astype(np.float64)
    np.testing.assert_allclose(np.cov(colors.T), 0.01 * basis @ basis.T, rtol=0.06, atol=0.01)
    np.testing.assert_allclose(colors.mean(0), 0, atol=0.02)


class TrainStore:
    mean_image = np.ones((SIZE, SIZE, 3), np.float32)
    mean_channel = np.float32([1, 2, 3])
    eigenvalues = np.float32([400, 100, -1e-7])  # as rounding may leave one of 0
    eigenvectors = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    ("mean", "of_store"),
    [("image", "mean_image"), ("image_center", "mean_image"), ("channel", "mean_channel")],
)
def test_mean_of_the_statistics_is_that_of_augment_mean(mean, of_store):
    found = statistics(TrainStore, config(mean=mean)).mean
    np.testing.assert_array_equal(found, getattr(TrainStore, of_store))


@pytest.mark.parametrize(
    ("scale", "expected"), [("eigenvalue", (400.0 / 255, 100.0 / 255)), ("std", (20.0, 10.0))]
)
def test_color_noise_is_scaled_by_eigenvalues_of_unit_pixels_or_standard_deviations(
    scale, expected
):
    basis = statistics(TrainStore, config(color_noise_scale=scale)).noise_basis
    np.testing.assert_allclose(np.diag(basis), [*expected, 0], rtol=1e-6, atol=1e-9)


def test_run_145_divides_the_image_by_1_1_while_there_is_color_noise():
    batch = images(3)
    plain = run(batch, config(), stats())
    shrunk = run(batch, config(color_noise_shrink=True, color_noise=0.1), stats())
    np.testing.assert_allclose(shrunk, plain / 1.1, rtol=1e-6)
    np.testing.assert_array_equal(run(batch, config(color_noise_shrink=True), stats()), plain)


def test_color_noise_changes_at_the_steps_of_the_schedule():
    c = config(mean="channel", color_noise=0.25)
    c.schedule.changes = (
        (1.5, "data", "color_noise", 0.5),
        (2.0, "all", "learning_rate", 9.0),
        (3.0, "data", "color_noise", 0.0),
    )
    s, batch = stats(np.zeros(3), np.eye(3)), images(2)
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    augment = jax.jit(make_augment(c, s, steps_per_epoch=10.1))
    plain = run(batch, config(mean="channel"), s)
    colors = {step: augment(batch, keys, step) - plain for step in (0, 15, 16, 31)}
    for step, factor in {0: 1.0, 15: 1.0, 16: 2.0, 31: 0.0}.items():
        np.testing.assert_allclose(colors[step], factor * colors[0], rtol=0, atol=1e-4)
    assert np.abs(colors[0]).max() > 0.01
    unscheduled = jax.jit(make_augment(c, s))  # as for evaluation
    np.testing.assert_array_equal(unscheduled(batch, keys, 31), augment(batch, keys, 0))


def test_augmentation_of_an_image_depends_on_its_own_key_only():
    batch = images(6)
    keys = jax.random.split(jax.random.PRNGKey(0), 6)
    augment = make_augment(config(flip=True, color_noise=5.0), stats(basis=np.eye(3)))
    np.testing.assert_array_equal(augment(batch, keys)[4:], augment(batch[4:], keys[4:]))


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
def test_without_statistics_the_mean_is_zero_and_there_is_no_color_noise(mean):
    batch = images(4)
    augment = make_augment(config(mean=mean, color_noise=0.1))
    crops = np.asarray(augment(batch, jax.random.split(jax.random.PRNGKey(0), 4)))
    for crop, image in zip(crops, batch, strict=True):
        find_crop(crop, image)
    middle = np.s_[:, BORDER // 2 : -BORDER // 2, BORDER // 2 : -BORDER // 2]
    np.testing.assert_array_equal(augment.center(batch), batch[middle])


@pytest.mark.parametrize("text", ["0.2,1.0", "(0.2, 1)", "[0.2, 1.0]"])
def test_range_is_set_on_the_command_line(text):
    c = configs.load("configs/quickstart.py", [("augment.crop_area", text)])
    assert c.augment.crop_area == (0.2, 1.0)
    make_augment(c)


@pytest.mark.parametrize(
    ("field", "values", "message"),
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
def test_invalid_range_is_rejected(field, values, message):
    with pytest.raises(UserError, match=f"augment.{field}=.*{message}"):
        make_augment(config(**{field: values}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop_size", 1), ("crop_size", SIZE), ("crop_area", (1.0, 1.0)), ("crop_aspect", (2, 2))],
)
def test_ranges_include_their_ends(field, value):
    make_augment(config(**{field: value}))


def test_ten_views_are_corners_and_center_then_their_mirror_images():
    c = config(mean="channel", crop_size=224)
    c.image_size = 256
    image = images(size=256)
    c.eval.views = "ten"
    views = all_views(make_augment(c, stats(np.zeros(3))), image)
    assert views.shape == (10, 1, 224, 224, 3)
    offsets = [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    for place, (y, x) in enumerate(offsets):
        window = image[0, y : y + 224, x : x + 224]
        np.testing.assert_array_equal(views[place, 0], window)
        np.testing.assert_array_equal(views[place + 5, 0], window[:, ::-1])


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
def test_views_subtract_the_mean_and_the_third_of_ten_is_the_center_crop(mean):
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
    c = config(mean=mean)
    c.eval.views = "ten"
    augment = make_augment(c, s)
    views = all_views(augment, batch)
    np.testing.assert_array_equal(views[0], batch[:, *corner] - of_corner)
    np.testing.assert_array_equal(views[2], batch[:, *center] - of_center)
    np.testing.assert_array_equal(augment.center(batch), views[2])


def test_nine_views_are_three_by_three_and_not_mirrored():
    c = config(mean="channel", crop_size=24)
    c.image_size, c.eval.views = 32, "nine"
    image = images(size=32)
    views = all_views(make_augment(c, stats(np.zeros(3))), image)
    windows = [image[0, y : y + 24, x : x + 24] for y in (0, 4, 8) for x in (0, 4, 8)]
    np.testing.assert_array_equal(views[:, 0], windows)


@pytest.mark.parametrize(("eval_views", "count"), [("center", 1), ("ten", 10)])
def test_eval_views_decides_which_views_are_evaluated(eval_views, count):
    c, batch = config(), images(2)
    c.eval.views = eval_views
    augment = make_augment(c, stats())
    assert len(augment.views) == count
    views = all_views(augment, batch)
    assert views.shape == (count, 2, CROP, CROP, 3)
    np.testing.assert_array_equal(views[2 if count == 10 else 0], augment.center(batch))


def test_pixel_and_channel_scale_multiply_inputs_of_training_and_evaluation():
    batch, s = images(2), stats(np.full((SIZE, SIZE, 3), 7))
    scaled, factor = config(pixel_scale=0.5, channel_scale=(1.0, 2.0, 4.0)), np.float32([0.5, 1, 2])
    np.testing.assert_array_equal(run(batch, scaled, s), run(batch, config(), s) * factor)
    augment, unscaled = make_augment(scaled, s), make_augment(config(), s)
    np.testing.assert_array_equal(augment.center(batch), unscaled.center(batch) * factor)
    np.testing.assert_array_equal(augment.scale, factor)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("augment.crop", "five", "random, inception"),
        ("augment.mean", "median", "image, image_center, channel"),
        ("augment.color_noise_scale", "pca", "eigenvalue, std"),
        ("eval.views", "five", "center, nine, ten"),
        ("augment.crop_size", 41, "image_size=40"),
        ("augment.crop_size", 0, "between 1 and"),
        ("augment.channel_scale", (1.0, 1.0), "three numbers"),
        ("augment.channel_scale", (1.0, 1.0, 0.0), "above 0"),
        ("augment.channel_scale", (1.0, 1.0, "x"), "three numbers"),
    ],
)
def test_invalid_value_is_rejected(field, value, message):
    c = config()
    section, leaf = field.split(".")
    c[section][leaf] = value
    with pytest.raises(UserError, match=field) as raised:
        make_augment(c)
    assert message in str(raised.value)
