"""Whole photographs: what is stored of them, and the inception crops that reach all of it."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from images import encode, folder_config, photograph
from PIL import Image
from scipy import stats
from test_train_step import BATCH_SIZE, Program, assert_close, make_config

from alexnet_jax.config import default_config
from alexnet_jax.data.augment import Statistics, inception_box, make_augment
from alexnet_jax.data.decode import TURN_UPRIGHT, decode, decode_square
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import open_store, store_paths, to_canvas
from alexnet_jax.utils.errors import UserError

SIDE, CROP = 48, 32
# Height and width of photographs, and what is kept of them at a shorter side of 48.
KEPT = {
    (96, 96): (48, 48),
    (96, 128): (48, 64),
    (128, 96): (64, 48),
    (96, 192): (48, 96),
    (80, 320): (48, 96),  # 4:1, of which the central 2:1 is kept
    (320, 80): (96, 48),
    (30, 40): (48, 64),  # enlarged
}


def whole_config(**fields):
    c = default_config()
    c.image_size, c.stored = SIDE, "whole"
    c.augment.update({"crop_size": CROP, "crop": "inception", "mean": "channel"})
    c.augment.update({"color_noise": 0.0, "flip": False} | fields)
    return c


# ------------------------------------------------------------------------------------------
# What is stored
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", KEPT, ids=str)
def test_shorter_side_is_scaled_and_the_center_kept_up_to_2_to_1(shape, kind):
    photo = photograph(1, *shape)
    found = decode(encode(photo, kind, **({"quality": 100} if kind == "JPEG" else {})), SIDE)
    assert found.shape == (*KEPT[shape], 3)
    side = min(shape)
    kept = [min(length, 2 * side) for length in shape]
    top, left = ((length - k) / 2 for length, k in zip(shape, kept, strict=True))
    expected = Image.fromarray(photo).resize(
        KEPT[shape][::-1],
        Image.Resampling.BICUBIC if kind == "PNG" or side < SIDE else Image.Resampling.BILINEAR,
        box=(left, top, left + kept[1], top + kept[0]),
    )
    difference = np.abs(found.astype(int) - np.asarray(expected))
    assert difference.mean() < (6 if kind == "JPEG" else 1e-9)  # colors at half resolution


@pytest.mark.parametrize("orientation", TURN_UPRIGHT)
def test_photographs_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = photograph(2, 96, 128)
    plain = decode(encode(photo), SIDE)
    turned = decode(encode(photo, exif=exif), SIDE)
    np.testing.assert_array_equal(turned, TURN_UPRIGHT[orientation](plain))


def test_portraits_are_transposed_on_the_canvas():
    landscape, portrait = photograph(0, SIDE, 60), photograph(0, 60, SIDE)
    for photo, stored in ((landscape, landscape), (portrait, portrait.swapaxes(0, 1))):
        canvas = to_canvas(photo)
        assert canvas.shape == (SIDE, 2 * SIDE, 3)
        np.testing.assert_array_equal(canvas[:, :60], stored)
        np.testing.assert_array_equal(canvas[:, 60:64], np.repeat(stored[:, -1:], 4, axis=1))
        assert not canvas[:, 64:].any()


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for number, shape in enumerate(KEPT):
            path = tmp_path / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(photograph(number, *shape), "PNG"))
    return tmp_path


def config_of(folder, storage="raw"):
    c = folder_config(folder, folder / "data", SIDE)
    c.stored, c.storage = "whole", storage
    c.augment.crop_size = CROP
    c.augment.crop, c.augment.mean = "inception", "channel"
    return c


@pytest.mark.parametrize(("storage", "tolerance"), [("raw", 0), ("jpeg", 8)])
def test_train_store_keeps_whole_photographs_and_eval_store_squares(folder, storage, tolerance):
    stores = open_or_prepare(config_of(folder, storage))
    assert stores["eval"].image_shape == (SIDE, SIDE, 3)
    assert set(stores["eval"].read(np.arange(2))) == {"image", "label"}
    train = stores["train"]
    batch = train.read(np.arange(len(KEPT)))
    assert batch["image"].shape == (len(KEPT), SIDE, 2 * SIDE, 3)
    files = sorted((folder / "train").rglob("*.png"))  # by class, then by name
    for image, size, file in zip(batch["image"], batch["size"], files, strict=True):
        expected = decode(file.read_bytes(), SIDE)
        assert tuple(size) == expected.shape[:2]
        difference = np.abs(image.astype(int) - to_canvas(expected))[:, : max(size)]
        assert difference.mean() <= tolerance
    squares = [decode_square(file.read_bytes(), SIDE) for file in files]
    mean = np.mean(squares, axis=0)
    assert np.abs(train.mean_image - mean).mean() < 2.5  # of the same squares, within rounding
    found = dataclasses.replace(train, reads_squares=True).read(np.arange(3), pad_to=4)
    assert found["image"].shape == (4, SIDE, SIDE, 3) and not found["image"][3].any()
    assert set(found) == {"image", "label"}
    for square, expected in zip(found["image"][:3], squares, strict=False):
        assert np.abs(square.astype(int) - expected).mean() <= 2.5 + tolerance


def test_square_and_whole_stores_of_one_folder_are_kept_side_by_side(folder):
    whole, square = config_of(folder), config_of(folder)
    square.stored = "square"
    paths, others = store_paths(whole), store_paths(square)
    assert paths["eval"] == others["eval"]
    assert Path(paths["train"]).parent.name == Path(others["train"]).parent.name + "_whole"
    found = [open_or_prepare(c)["train"] for c in (square, whole)]
    assert [store.stored for store in found] == ["square", "whole"]
    assert open_store(others["train"]).sizes is None


def test_unreadable_photograph_keeps_its_row(folder):
    (folder / "train/class0/0.png").write_bytes(b"no image")
    c = config_of(folder)
    c.max_corrupt = 0.5
    train = open_or_prepare(c)["train"]
    assert train.num_examples == len(train.sizes) == len(KEPT) - 1
    shapes = [shape for number, shape in enumerate(KEPT) if number]
    order = sorted(range(len(shapes)), key=lambda n: ((n + 1) % 2, n))
    assert [tuple(size) for size in train.sizes] == [KEPT[shapes[n]] for n in order]


# ------------------------------------------------------------------------------------------
# Crops
# ------------------------------------------------------------------------------------------

SHAPES = [(48, 48), (48, 60), (60, 48), (48, 96), (96, 48), (71, 48)]


def photographs(count):
    return [photograph(n, *SHAPES[n % len(SHAPES)]) for n in range(count)]


def drawn_boxes(keys, sizes, c):
    draw = functools.partial(inception_box, area=c.augment.crop_area, aspect=c.augment.crop_aspect)
    crop_keys = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
    return np.asarray(jax.jit(jax.vmap(draw))(crop_keys, sizes))


def augmented(photos, c, seed=0):
    """Returns the crops of photographs, and their boxes."""
    sizes = np.array([photo.shape[:2] for photo in photos], np.int32)
    keys = jax.random.split(jax.random.PRNGKey(seed), len(photos))
    augment = make_augment(c, Statistics(np.zeros(3, np.float32), np.zeros((3, 3), np.float32)))
    canvases = np.stack([to_canvas(photo) for photo in photos])
    crops = jax.jit(lambda x, k, s: augment(x, k, sizes=s))(canvases, keys, sizes)
    return np.asarray(crops), drawn_boxes(keys, sizes, c)


def test_crop_is_the_drawn_box_of_the_upright_photograph_as_pillow_resizes_it():
    photos, c = photographs(60), whole_config()
    crops, boxes = augmented(photos, c)
    for crop, photo, (top, left, height, width) in zip(crops, photos, boxes, strict=True):
        part = Image.fromarray(photo).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize((CROP, CROP), Image.Resampling.BILINEAR), np.float32)
        assert np.abs(crop - expected).max() <= 1.001  # Pillow rounds twice


def test_crops_are_mirrored_left_to_right():
    photos = photographs(60)
    (plain, _), (flipped, _) = (augmented(photos, whole_config(flip=f)) for f in (False, True))
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(plain, flipped, strict=True)])
    assert 18 < mirrored.sum() < 42
    np.testing.assert_allclose(flipped[mirrored], plain[mirrored, :, ::-1], atol=1e-3)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (48, 50)], ids=str)
def test_boxes_reach_every_pixel_of_the_photograph_and_no_other(shape):
    c = whole_config()
    keys = jax.random.split(jax.random.PRNGKey(1), 5000)
    boxes = drawn_boxes(keys, np.tile(np.int32(shape), (5000, 1)), c)
    seen = np.zeros(shape, bool)
    for top, left, height, width in boxes:
        seen[top : top + height, left : left + width] = True
    assert seen.all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= shape).all()


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (60, 48)], ids=str)
def test_boxes_are_distributed_as_torchvisions(shape):
    from torchvision_stub import torch, torchvision

    torch.manual_seed(0)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    image = torch.zeros(3, *shape)
    theirs = np.array([get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    keys = jax.random.split(jax.random.PRNGKey(1), 4000)
    ours = drawn_boxes(keys, np.tile(np.int32(shape), (4000, 1)), whole_config())
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.01


@pytest.mark.torch
def test_a_thousand_crops_equal_torchvisions_within_a_gray_level():
    from torchvision_stub import torch, torchvision

    photos, c = photographs(1000), whole_config()
    crops, boxes = augmented(photos, c)
    functional = torchvision.transforms.functional
    for crop, photo, box in zip(crops, photos, boxes, strict=True):
        image = torch.from_numpy(photo).permute(2, 0, 1).float()
        expected = functional.resized_crop(image, *map(int, box), [CROP, CROP], antialias=True)
        np.testing.assert_allclose(crop, expected.permute(1, 2, 0), atol=1.0, rtol=0)


# ------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------


def whole_batch(seed):
    rng = np.random.default_rng(seed)
    sizes = [(72, 72), (72, 100), (100, 72), (72, 144)]
    sizes = np.array([sizes[n % 4] for n in range(BATCH_SIZE)], np.int32)
    canvases = rng.integers(0, 256, (BATCH_SIZE, 72, 144, 3), np.uint8)
    return {"image": canvases, "size": sizes, "label": np.int32(rng.integers(0, 10, BATCH_SIZE))}


@pytest.mark.parametrize("kind", ["mesh.data", pytest.param("pmap", marks=pytest.mark.long)])
def test_eight_devices_equal_one(kind):
    c = make_config(randomness=True, stored="whole")
    c.augment.update({"crop": "inception", "mean": "channel"})
    batches = [whole_batch(seed) for seed in (0, 1)]
    one, metrics_one = Program(c, "jit").train(batches)
    several, metrics = Program(c, kind).train(batches)
    assert_close(several.params, one.params, 2e-4)
    assert metrics[1] == pytest.approx(metrics_one[1], rel=1e-4)


def test_stored_whole_needs_the_inception_crop_and_the_channel_mean():
    for field, value in (("crop", "random"), ("mean", "image")):
        c = whole_config(**{field: value})
        with pytest.raises(UserError, match="stored=whole.*--config.augment.crop=inception"):
            make_augment(c)


def test_unknown_way_to_store_is_refused():
    c = whole_config()
    c.stored = "complete"
    with pytest.raises(UserError, match="stored='complete'; it can be square, whole"):
        store_paths(c)
