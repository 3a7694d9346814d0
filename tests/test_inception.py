"""The inception crop: boxes as torchvision draws them, resized as Pillow resizes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augmenting import BORDER, CROP, SIZE, config, images, run, run_as_on_tpu, stats
from PIL import Image

from alexnet_jax.config import default_config
from alexnet_jax.data.augment import inception_box, make_augment
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.train_step import augment_batch, init_state, make_train_step


def inception(size=SIZE, crop_size=CROP, **fields):
    c = config(crop="inception", **{"mean": "channel", "crop_size": crop_size} | fields)
    c.image_size = size
    return c


def drawn_boxes(keys, size, area, aspect):
    draw = functools.partial(inception_box, sides=jnp.full(2, size), area=area, aspect=aspect)
    return np.asarray(jax.jit(jax.vmap(draw))(keys))


def boxes(count, c, seed=0):
    """Returns the boxes of a batch that `run` augments. An image's first of three keys draws."""
    keys = jax.random.split(jax.random.PRNGKey(seed), count)
    crop_keys = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
    return drawn_boxes(crop_keys, c.image_size, c.augment.crop_area, c.augment.crop_aspect)


def by_pillow(image, box, size):
    top, left, height, width = box
    part = Image.fromarray(image).crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR), np.float32)


def by_loops(image, box, size):
    """Does the same in float64 without rounding, one new pixel after the other."""

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
    "sizes of ImageNet": {"size": 256, "crop_size": 224},
    "enlarged": {"crop_area": (0.08, 0.2)},
    "reduced": {"crop_area": (0.8, 0.9)},
    "reduced to a fifth": {"crop_size": 7},
    "one side enlarged, one reduced": {"crop_aspect": (2.0, 3.0)},
}


@pytest.mark.parametrize("fields", BOXES_AND_CROPS.values(), ids=BOXES_AND_CROPS)
def test_crop_is_the_drawn_box_resized_as_pillow_resizes(fields):
    c = inception(**fields)
    batch = images(16, size=c.image_size)
    crops = run(batch, c, stats(np.zeros(3)))
    assert crops.shape == (16, c.augment.crop_size, c.augment.crop_size, 3)
    assert crops.dtype == np.float32
    for crop, image, box in zip(crops, batch, boxes(16, c), strict=True):
        from_pillow = crop - by_pillow(image, box, c.augment.crop_size)
        # Pillow rounds twice, by half a gray level each. float32 adds about 1e-5.
        assert np.abs(from_pillow).max() <= 1.001
        assert np.abs(from_pillow).mean() < 0.5
        np.testing.assert_allclose(
            crop, by_loops(image, box, c.augment.crop_size), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_crops_by_products_on_tpu_are_those_by_taps(dtype, tolerance, monkeypatch):
    for fields in BOXES_AND_CROPS.values():
        c = inception(flip=True, **fields)
        c.model.dtype = dtype
        batch = images(8, size=c.image_size)
        on_tpu = run_as_on_tpu(monkeypatch, batch, c, stats(np.zeros(3)))
        np.testing.assert_allclose(
            on_tpu, run(batch, c, stats(np.zeros(3))), rtol=0, atol=tolerance
        )


def test_crop_of_the_whole_image_at_its_own_size_is_the_image():
    batch = images(4)
    whole = {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0)}
    crops = run(batch, inception(crop_size=SIZE, **whole), stats(np.zeros(3)))
    np.testing.assert_array_equal(crops, batch)


def test_half_of_the_crops_are_flipped():
    batch = np.repeat(images(), 400, axis=0)
    crops = run(batch, inception(flip=True), stats(np.zeros(3)))
    unflipped = run(batch, inception(), stats(np.zeros(3)))
    flipped = [(a == b[:, ::-1]).all() for a, b in zip(crops, unflipped, strict=True)]
    plain = [(a == b).all() for a, b in zip(crops, unflipped, strict=True)]
    assert np.logical_xor(plain, flipped).all()
    assert 0.4 < np.mean(flipped) < 0.6


@pytest.mark.parametrize("flip", [False, True])
def test_mean_image_is_cropped_with_the_box_of_the_image(flip):
    mean = images(seed=1)[0]
    batch = images(16)
    zero = stats(np.zeros((SIZE, SIZE, 3)))
    c = inception(mean="image", flip=flip)
    of_mean = run(np.repeat(mean[None], 16, axis=0), c, zero)
    np.testing.assert_allclose(
        run(batch, c, stats(mean)), run(batch, c, zero) - of_mean, rtol=0, atol=1e-3
    )


def test_other_means_are_subtracted_from_the_resized_crop():
    batch, mean = images(4), images(seed=1)[0].astype(np.float32)
    center = mean[BORDER // 2 : -BORDER // 2, BORDER // 2 : -BORDER // 2]
    raw = run(batch, inception(), stats(np.zeros(3)))
    centered = run(batch, inception(mean="image_center"), stats(mean))
    np.testing.assert_allclose(centered, raw - center, rtol=0, atol=1e-4)
    by_channel = run(batch, inception(), stats([1, 2, 3]))
    np.testing.assert_allclose(by_channel, raw - np.float32([1, 2, 3]), rtol=0, atol=1e-4)


def test_crop_of_an_image_depends_on_its_own_key_only():
    batch = images(6)
    keys = jax.random.split(jax.random.PRNGKey(0), 6)
    augment = make_augment(
        inception(mean="image", flip=True, color_noise=5.0), stats(basis=np.eye(3))
    )
    np.testing.assert_allclose(
        augment(batch, keys)[4:], augment(batch[4:], keys[4:]), rtol=0, atol=1e-4
    )
    same = np.asarray(augment(np.repeat(batch[:1], 6, axis=0), keys))
    assert len(np.unique(same.reshape(6, -1), axis=0)) == 6


def test_batch_of_crops_is_computed_without_loops():
    keys = jax.random.split(jax.random.PRNGKey(0), 8)
    augment = make_augment(inception(), stats(np.zeros(3)))
    program = str(jax.make_jaxpr(augment)(images(8), keys))
    assert not any(loop in program for loop in ("while", "scan"))


LARGE = 256
SZEGEDY = {"area": (0.08, 1.0), "aspect": (3 / 4, 4 / 3)}


def many_boxes(area, aspect, count=20_000):
    """Returns tops, lefts, heights and widths of boxes in a LARGE image."""
    return drawn_boxes(jax.random.split(jax.random.PRNGKey(0), count), LARGE, area, aspect).T


def box_by_loop(random, area, aspect):
    """Returns a height and width as torchvision's RandomResizedCrop draws them."""
    for _ in range(10):
        share, ratio = random.uniform(*area), np.exp(random.uniform(*np.log(aspect)))
        height, width = round(LARGE * (share / ratio) ** 0.5), round(LARGE * (share * ratio) ** 0.5)
        if 0 < height <= LARGE and 0 < width <= LARGE:
            return height, width
    return LARGE, LARGE


def test_default_ranges_are_those_of_szegedy_et_al():
    fields = default_config().augment
    assert {"area": fields.crop_area, "aspect": fields.crop_aspect} == SZEGEDY


def test_boxes_are_inside_the_image_and_the_ranges():
    tops, lefts, heights, widths = many_boxes(**SZEGEDY)
    assert min(tops.min(), lefts.min()) == 0
    assert (tops + heights).max() == (lefts + widths).max() == LARGE
    # A side is rounded by up to half a pixel.
    assert ((heights + 0.5) * (widths + 0.5) >= 0.08 * LARGE**2).all()
    assert ((widths + 0.5) / (heights - 0.5) >= 3 / 4).all()
    assert ((widths - 0.5) / (heights + 0.5) <= 4 / 3).all()


def test_boxes_are_uniform_in_area_and_log_aspect_where_all_fit():
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


def test_boxes_have_the_distribution_of_torchvision():
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


def test_boxes_of_one_shape_are_uniform_over_offsets():
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
def test_largest_box_of_the_nearest_aspect_is_used_where_no_draw_fits(aspect, height, width):
    """Only a square has the whole area."""
    _, _, heights, widths = many_boxes((1.0, 1.0), aspect, count=100)
    assert set(heights) == {height}
    assert set(widths) == {width}


def test_whole_image_is_used_with_the_probability_that_ten_draws_do_not_fit():
    """Only nearly square boxes fit if their area is 0.97 of the image's."""
    _, _, heights, widths = many_boxes((0.97, 0.97), SZEGEDY["aspect"])
    fitting = (2 * np.log((LARGE + 0.5) / LARGE) - np.log(0.97)) / np.log(4 / 3)
    whole = (heights == LARGE) & (widths == LARGE)
    assert whole.mean() == pytest.approx((1 - fitting) ** 10, abs=0.01)


def test_boxes_can_have_sides_of_one_pixel_and_of_the_whole_image():
    keys = jax.random.split(jax.random.PRNGKey(0), 200)
    assert (drawn_boxes(keys, 8, (0.001, 0.02), (1.0, 1.0))[:, 2:] == 1).all()
    _, _, heights, widths = drawn_boxes(keys, 8, (0.25, 0.25), (2.0, 4.0)).T
    assert set(zip(heights, widths, strict=True)) == {(3, 6), (2, 6), (2, 7), (2, 8)}


class MeanColor(nn.Module):
    """A network that sees only the mean color."""

    axis_name = None
    frozen = ()

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(10, name="fc8")(x.mean((1, 2)))


def test_train_step_uses_inception_crops():
    c = inception(mean="image", flip=True)
    c.learning_rate = 1e-4
    model, augment, tx = (
        MeanColor(),
        make_augment(c, stats(images(seed=1)[0])),
        make_optimizer(c, 10),
    )
    state = init_state(model, tx, c.seed, (CROP, CROP, 3))
    batch = {"image": images(8), "label": jnp.arange(8)}
    seen = augment_batch(augment, jax.random.fold_in(state.key, 0), batch, 0)["image"]
    logits = model.apply({"params": state.params}, seen, train=True)
    loss = -jax.nn.log_softmax(logits)[jnp.arange(8), batch["label"]].mean()
    state, metrics = jax.jit(make_train_step(model, tx, augment))(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-3)
    assert int(state.step) == 1
