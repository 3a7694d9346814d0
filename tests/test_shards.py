"""Shard files are zarr's, and both ways of reading them give the same images or name the damage."""

import numpy as np
import pytest
import tensorstore as ts
from images import encode, folder_config, mark, mark_number, photograph, write_marks
from PIL import Image

from alexnet_jax.data import shards
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.shards import Damage, LocalShards, RemoteShards
from alexnet_jax.data.store import open_kvstore

SIDE, ROWS, IMAGES = 8, 16, 40
STORED = IMAGES // ROWS + 1


def write_shard(root, shard, chunks):
    root.write(shards.shard_key(shard), b"".join(shards.pack_shard(chunks))).result()


def marks(numbers):
    return np.stack([mark(number) for number in numbers])


@pytest.fixture(params=["raw", "jpeg"])
def store(request, tmp_path):
    """Three shards of marks, the last one not full, with place 5 of each left out."""
    if request.param == "raw":
        unpack, chunk = shards.unpack_raw, mark
    else:
        unpack, chunk = shards.unpack_jpeg, lambda n: encode(mark(n), "JPEG", quality=100)
    root = open_kvstore(str(tmp_path))
    for shard in range(STORED):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        chunks = [chunk(n) if n % ROWS != 5 and n < IMAGES else None for n in numbers]
        write_shard(root, shard, chunks)
    return tmp_path, unpack


def readers(path):
    return LocalShards(str(path), ROWS), RemoteShards(open_kvstore(str(path)), ROWS)


def read(reader, unpack, rows):
    images = np.zeros((len(rows), SIDE, SIDE, 3), np.uint8)
    reader.read(np.array(rows), images, unpack)
    return images


def test_both_readers_give_the_images_asked_for_in_that_order(store):
    path, unpack = store
    rows = [39, 0, 17, 17, 4, 32, 31]
    local, remote = (read(reader, unpack, rows) for reader in readers(path))
    np.testing.assert_array_equal(local, remote)
    assert np.abs(local.astype(int) - marks(rows)).max() <= (
        0 if unpack is shards.unpack_raw else 3
    )


@pytest.mark.parametrize("which", [0, 1], ids=["local", "remote"])
@pytest.mark.parametrize(
    ("damage", "row", "said"),
    [
        (None, 21, "image 5 of shard image/c/1/0/0/0 is missing"),
        ("flip data", 16, "image 0 of shard image/c/1/0/0/0 does not have its checksum"),
        ("flip index", 20, "shard image/c/1/0/0/0"),
        ("shorten", 17, "shard image/c/1/0/0/0"),
        ("empty", 17, "shard image/c/1/0/0/0"),
        ("remove", 17, "image/c/1/0/0/0 is missing"),
    ],
)
def test_damage_is_named_and_the_other_shards_are_read(store, which, damage, row, said):
    path, unpack = store
    file = path / shards.shard_key(1)
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage:
        changed = {
            "flip data": bytes([content[0] ^ 1]) + content[1:],
            "flip index": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
            "shorten": content[:-1],
            "empty": b"",
        }
        file.write_bytes(changed[damage])
    reader = readers(path)[which]
    with pytest.raises(Damage, match=said):
        read(reader, unpack, [3, row])
    assert np.abs(read(reader, unpack, [3, 33]).astype(int) - marks([3, 33])).max() <= 3


def test_a_jpeg_that_is_none_or_of_another_size_is_damage(tmp_path):
    root = open_kvstore(str(tmp_path))
    wrong = [b"no JPEG", encode(mark(0, 16), "JPEG"), encode(mark(1), "JPEG")[:200]]
    write_shard(root, 0, wrong)
    for row in range(3):
        for reader in (LocalShards(str(tmp_path), 3), RemoteShards(root, 3)):
            with pytest.raises(Damage, match=f"image {row} of shard image/c/0/0/0/0: "):
                read(reader, shards.unpack_jpeg, [row])


def test_tensorstore_reads_a_raw_store_as_the_zarr_array_that_it_is(tmp_path):
    """Another implementation of zarr's sharding, with its own checks of the checksums."""
    write_marks(tmp_path / "marks" / "train", 1100)
    write_marks(tmp_path / "marks" / "val", 8)
    train = open_or_prepare(folder_config(tmp_path / "marks", tmp_path / "data"))["train"]
    kvstore = {"driver": "file", "path": f"{train.path}/image/"}
    array = ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
    assert array.chunk_layout.read_chunk.shape == (1, 8, 8, 3)
    np.testing.assert_array_equal(array.read().result(), train.read(np.arange(1100))["image"])


def test_a_jpeg_store_keeps_photographs_and_a_third_of_the_disk(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "all").mkdir(parents=True)
        for number in range(20):
            pixels = np.asarray(Image.fromarray(photograph(number, 375, 375)).resize((256, 256)))
            (tmp_path / split / "all" / f"{number}.png").write_bytes(encode(pixels, "PNG"))
    config = folder_config(tmp_path, tmp_path / "data", 256)
    raw = open_or_prepare(config)["train"]
    config.storage = "jpeg"
    jpeg = open_or_prepare(config)["train"]
    assert jpeg.path != raw.path
    assert sum(jpeg.shard_bytes) < sum(raw.shard_bytes) / 3
    images = [store.read(np.arange(20))["image"].astype(int) for store in (raw, jpeg)]
    assert np.abs(images[0] - images[1]).mean() < 4
    np.testing.assert_array_equal(jpeg.mean_image, images[1].mean(axis=0).astype(np.float32))


@pytest.mark.parametrize(
    ("size", "rows"), [(8, 1024), (256, 1024), (512, 256), (700, 128), (20000, 1)]
)
def test_a_shard_holds_a_power_of_two_of_images_and_at_most_256_mib(size, rows):
    assert shards.rows_per_shard(size) == rows
    assert rows == 1 or rows * size * size * 3 <= 256 * 2**20


def test_more_shards_than_a_process_may_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (40, 40))
    root = open_kvstore(str(tmp_path))
    for shard in range(60):
        write_shard(root, shard, [mark(shard)])
    reader = LocalShards(str(tmp_path), 1)
    for _ in range(2):
        found = read(reader, shards.unpack_raw, range(60))
        assert mark_number(found).tolist() == list(range(60))


def test_a_jpeg_of_another_size_than_the_stores_is_no_image_of_it():
    small = np.frombuffer(encode(photograph(0, 40, 40), "JPEG"), np.uint8)
    with pytest.raises(ValueError, match="40"):
        shards.unpack_jpeg(small, np.empty((64, 64, 3), np.uint8))
