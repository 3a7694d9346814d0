"""The inception crop, as Szegedy et al. drew it and Pillow resizes it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augmenting import BORDER, CROP, SIZE, config, images, run, stats
from PIL import Image

from alexnet_jax.config import default_config
from alexnet_jax.data import augment
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import train_step as step


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
