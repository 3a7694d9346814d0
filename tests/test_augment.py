"""Augmentation is the paper's section 4.1, and where asked, run #145's or the inception crop."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import augment, optim, step
from alexnet_jax import config as configs
from alexnet_jax.config import default_config
from alexnet_jax.errors import UserError

SIZE, CROP = 40, 32
BORDER = SIZE - CROP


def config(**fields):
    c = default_config()
    c.image_size = SIZE
    c.augment.crop_size = CROP
    c.augment.update({"color_noise": 0.0, "flip": False} | fields)
    return c


def images(count=1, seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def stats(mean=None, basis=None):
    return augment.Statistics(
        np.zeros((SIZE, SIZE, 3), np.float32) if mean is None else np.float32(mean),
        np.zeros((3, 3), np.float32) if basis is None else np.float32(basis),
    )


def run(batch, c, s, noise=0.0, seed=0):
    keys = jax.random.split(jax.random.PRNGKey(seed), len(batch))
    return np.asarray(jax.jit(lambda b: augment.augment(b, keys, jnp.float32(noise), s, c))(batch))


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


def inception(size=SIZE, crop_size=CROP, **fields):
    c = config(crop="inception", **{"mean": "channel", "crop_size": crop_size} | fields)
    c.image_size = size
    return c


def drawn_boxes(keys, size, area, aspect):
    draw = functools.partial(augment.inception_box, size=size, area=area, aspect=aspect)
    return np.asarray(jax.jit(jax.vmap(draw))(keys))


def boxes(count, c, seed=0):
    """The boxes of a batch that `run` augments: the first of an image's three keys draws its."""
    keys = jax.random.split(jax.random.PRNGKey(seed), count)
    crop_keys = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
    return drawn_boxes(crop_keys, c.image_size, c.augment.crop_area, c.augment.crop_aspect)


def by_pillow(image, box, size):
    top, left, height, width = box
    part = Image.fromarray(image).crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR), np.float32)


def by_loops(image, box, size):
    """The same, one new pixel after the other, in float64 and without rounding."""

    def resized_rows(pixels):
        scale = len(pixels) / size
        reach = max(scale, 1.0)
        rows = []
        for center in (np.arange(size) + 0.5) * scale:
            first, end = max(0, int(center - reach + 0.5)), int(center + reach + 0.5)
            near = pixels[first:end]
            weights = 1 - np.abs(first + np.arange(len(near)) + 0.5 - center) / reach
            rows.append(np.tensordot(weights / weights.sum(), near, 1))
        return np.stack(rows)

    top, left, height, width = box
    part = image[top : top + height, left : left + width].astype(np.float64)
    return resized_rows(resized_rows(part).swapaxes(0, 1)).swapaxes(0, 1)


BOXES_AND_CROPS = {
    "as configs/imagenet.py has it": {"size": 256, "crop_size": 224},
    "parts made larger": {"crop_area": (0.08, 0.2)},
    "parts made smaller": {"crop_area": (0.8, 0.9)},
    "parts made much smaller": {"crop_size": 7},
    "far from square, one side made larger and one smaller": {"crop_aspect": (2.0, 3.0)},
}


@pytest.mark.parametrize("fields", BOXES_AND_CROPS.values(), ids=BOXES_AND_CROPS)
def test_inception_crops_are_the_drawn_boxes_resized_as_pillow_resizes(fields):
    c = inception(**fields)
    batch = images(16, size=c.image_size)
    crops = run(batch, c, stats(np.zeros(3)))
    assert crops.shape == (16, c.augment.crop_size, c.augment.crop_size, 3)
    assert crops.dtype == np.float32
    for crop, image, box in zip(crops, batch, boxes(16, c), strict=True):
        from_pillow = crop - by_pillow(image, box, c.augment.crop_size)
        # Pillow rounds twice, by half a grey level each; float32 adds some 1e-5.
        assert np.abs(from_pillow).max() <= 1.001
        assert np.abs(from_pillow).mean() < 0.5
        np.testing.assert_allclose(
            crop, by_loops(image, box, c.augment.crop_size), rtol=0, atol=1e-3
        )


def test_an_inception_crop_of_the_whole_image_at_its_own_size_is_the_image():
    batch = images(4)
    whole = {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0)}
    crops = run(batch, inception(crop_size=SIZE, **whole), stats(np.zeros(3)))
    np.testing.assert_array_equal(crops, batch)


def test_inception_crops_are_mirrored_about_half_of_the_time():
    batch = np.repeat(images(), 400, axis=0)
    crops = run(batch, inception(flip=True), stats(np.zeros(3)))
    unmirrored = run(batch, inception(), stats(np.zeros(3)))
    mirrored = [(a == b[:, ::-1]).all() for a, b in zip(crops, unmirrored, strict=True)]
    plain = [(a == b).all() for a, b in zip(crops, unmirrored, strict=True)]
    assert np.logical_xor(plain, mirrored).all()
    assert 0.4 < np.mean(mirrored) < 0.6


@pytest.mark.parametrize("flip", [False, True])
def test_the_mean_image_is_resized_with_the_inception_crops_own_box(flip):
    mean = images(seed=1)[0]
    batch = images(16)
    nothing = stats(np.zeros((SIZE, SIZE, 3)))
    c = inception(mean="image", flip=flip)
    of_mean = run(np.repeat(mean[None], 16, axis=0), c, nothing)
    np.testing.assert_allclose(
        run(batch, c, stats(mean)), run(batch, c, nothing) - of_mean, rtol=0, atol=1e-3
    )


def test_other_means_are_subtracted_from_inception_crops_as_from_windows():
    batch, mean = images(4), images(seed=1)[0].astype(np.float32)
    center = mean[BORDER // 2 : -BORDER // 2, BORDER // 2 : -BORDER // 2]
    raw = run(batch, inception(), stats(np.zeros(3)))
    centered = run(batch, inception(mean="image_center"), stats(mean))
    np.testing.assert_allclose(centered, raw - center, rtol=0, atol=1e-4)
    by_channel = run(batch, inception(), stats([1, 2, 3]))
    np.testing.assert_allclose(by_channel, raw - np.float32([1, 2, 3]), rtol=0, atol=1e-4)


def test_each_image_is_cropped_by_its_own_key_alone():
    batch = images(6)
    keys = jax.random.split(jax.random.PRNGKey(0), 6)
    augmented = functools.partial(
        augment.augment,
        color_noise=jnp.float32(5),
        stats=stats(basis=np.eye(3)),
        config=inception(mean="image", flip=True),
    )
    np.testing.assert_allclose(
        augmented(batch, keys)[4:], augmented(batch[4:], keys[4:]), rtol=0, atol=1e-4
    )
    same = np.asarray(augmented(np.repeat(batch[:1], 6, axis=0), keys))
    assert len(np.unique(same.reshape(6, -1), axis=0)) == 6


def test_a_batch_of_inception_crops_is_made_without_loops():
    keys = jax.random.split(jax.random.PRNGKey(0), 8)
    program = jax.make_jaxpr(
        lambda b: augment.augment(b, keys, jnp.float32(0), stats(np.zeros(3)), inception())
    )(images(8))
    assert "dot_general" in str(program)
    assert not any(loop in str(program) for loop in ("while", "scan"))


LARGE = 256
SZEGEDY = {"area": (0.08, 1.0), "aspect": (3 / 4, 4 / 3)}


def many_boxes(area, aspect, count=20_000):
    """Tops, lefts, heights and widths of boxes of a LARGE image."""
    return drawn_boxes(jax.random.split(jax.random.PRNGKey(0), count), LARGE, area, aspect).T


def box_by_loop(random, area, aspect):
    """Height and width as torchvision's RandomResizedCrop draws them."""
    for _ in range(10):
        share, ratio = random.uniform(*area), np.exp(random.uniform(*np.log(aspect)))
        height, width = round(LARGE * (share / ratio) ** 0.5), round(LARGE * (share * ratio) ** 0.5)
        if 0 < height <= LARGE and 0 < width <= LARGE:
            return height, width
    return LARGE, LARGE


def test_the_fields_defaults_are_those_of_szegedy_et_al():
    fields = default_config().augment
    assert {"area": fields.crop_area, "aspect": fields.crop_aspect} == SZEGEDY


def test_inception_boxes_lie_in_the_image_and_keep_to_the_ranges():
    tops, lefts, heights, widths = many_boxes(**SZEGEDY)
    assert min(tops.min(), lefts.min()) == 0
    assert (tops + heights).max() == (lefts + widths).max() == LARGE
    # A side is rounded by up to half a pixel.
    assert ((heights + 0.5) * (widths + 0.5) >= 0.08 * LARGE**2).all()
    assert ((widths + 0.5) / (heights - 0.5) >= 3 / 4).all()
    assert ((widths - 0.5) / (heights + 0.5) <= 4 / 3).all()


def test_inception_boxes_are_uniform_in_area_and_log_aspect_where_all_fit():
    _, _, heights, widths = many_boxes((0.1, 0.5), (3 / 4, 2.0))
    areas, logs = heights * widths / LARGE**2, np.log(widths / heights)
    quantiles = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(np.quantile(areas, quantiles), 0.1 + 0.4 * quantiles, atol=0.015)
    assert abs(areas.mean() - 0.3) < 0.005
    low, high = np.log([3 / 4, 2])
    np.testing.assert_allclose(
        np.quantile(logs, quantiles), low + (high - low) * quantiles, atol=0.02
    )
    assert abs(np.corrcoef(areas, logs)[0, 1]) < 0.03


def test_inception_boxes_are_distributed_as_those_drawn_in_a_loop():
    _, _, heights, widths = many_boxes(**SZEGEDY)
    random = np.random.default_rng(0)
    loop = np.array([box_by_loop(random, **SZEGEDY) for _ in range(20_000)])
    quantiles = [0.05, 0.25, 0.5, 0.75, 0.95]
    for ours, theirs in (
        (heights * widths / LARGE**2, loop.prod(axis=1) / LARGE**2),
        (widths / heights, loop[:, 1] / loop[:, 0]),
    ):
        np.testing.assert_allclose(
            np.quantile(ours, quantiles), np.quantile(theirs, quantiles), atol=0.015
        )


def test_inception_boxes_of_one_shape_reach_every_offset_about_equally():
    side = 250
    tops, lefts, heights, widths = many_boxes(((side / LARGE) ** 2,) * 2, (1.0, 1.0))
    assert set(heights) == set(widths) == {side}
    for offsets in (tops, lefts):
        counts = np.bincount(offsets, minlength=LARGE - side + 1)
        assert len(counts) == LARGE - side + 1
        assert counts.min() > 0.9 * 20_000 / (LARGE - side + 1)
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("aspect", "height", "width"),
    [
        *[((3 / 4, 4 / 3), LARGE, LARGE), ((2.0, 4.0), LARGE // 2, LARGE)],
        *[((0.1, 0.5), LARGE, LARGE // 2), ((1e3, 1e4), 1, LARGE)],
    ],
)
def test_where_no_draw_fits_the_box_is_the_largest_of_the_nearest_aspect(aspect, height, width):
    """Of the whole area, only a square fits."""
    _, _, heights, widths = many_boxes((1.0, 1.0), aspect, count=100)
    assert set(heights) == {height}
    assert set(widths) == {width}


def test_the_whole_image_is_shown_where_ten_draws_have_not_fitted():
    """Of 0.97 of the area, only boxes fit that are nearly square."""
    _, _, heights, widths = many_boxes((0.97, 0.97), SZEGEDY["aspect"])
    fitting = (2 * np.log((LARGE + 0.5) / LARGE) - np.log(0.97)) / np.log(4 / 3)
    whole = (heights == LARGE) & (widths == LARGE)
    assert whole.mean() == pytest.approx((1 - fitting) ** 10, abs=0.01)


def test_sides_of_one_pixel_and_of_the_whole_image_are_drawn():
    keys = jax.random.split(jax.random.PRNGKey(0), 200)
    assert (drawn_boxes(keys, 8, (0.001, 0.02), (1.0, 1.0))[:, 2:] == 1).all()
    _, _, heights, widths = drawn_boxes(keys, 8, (0.25, 0.25), (2.0, 4.0)).T
    assert set(zip(heights, widths, strict=True)) == {(3, 6), (2, 6), (2, 7), (2, 8)}


class MeanColour(nn.Module):
    """A network that sees no more than the mean colour."""

    batch_axes = ()

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(10, name="fc8")(x.mean((1, 2)))


def test_a_train_step_takes_inception_crops():
    c = inception(mean="image", flip=True)
    c.learning_rate = 1e-4
    model, s = MeanColour(), stats(images(seed=1)[0])
    train_step = jax.jit(step.make_train_step(model, c, s, optim.make_schedule(c, 10.0)))
    state, batch = step.init_state(model, c), {"image": images(8), "label": jnp.arange(8)}
    seen = step.augmented(state.key, state.step, batch["image"], jnp.float32(0), s, c)
    logits = model.apply({"params": state.params}, seen, train=True)
    loss = -jax.nn.log_softmax(logits)[jnp.arange(8), batch["label"]].mean()
    state, metrics = train_step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-3)
    assert int(state.step) == 1


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
