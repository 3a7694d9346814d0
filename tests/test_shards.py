"""Shard files are zarr's. Both readers return the same images, or name the damage."""

import os

import jax
import numpy as np
import pytest
import tensorstore as ts
from images import encode, folder_config, mark, mark_number, photograph, write_marks
from PIL import Image

from alexnet_jax.data import shards
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.shards import BufferPool, CorruptShardError, LocalShards, RemoteShards
from alexnet_jax.data.store import open_kvstore

SIDE, SLOTS, IMAGES = 8, 16, 40
NUM_SHARDS = IMAGES // SLOTS + 1


def write_shard(root, shard, chunks):
    root.write(shards.shard_key(shard), b"".join(shards.pack_shard(chunks))).result()


def marks(numbers):
    return np.stack([mark(number) for number in numbers])


@pytest.fixture(params=["raw", "jpeg"])
def store(request, tmp_path):
    """The path and storage of three shards of marks; the last is not full, slot 5 is empty."""
    storage = request.param
    chunk = mark if storage == "raw" else lambda n: encode(mark(n), "JPEG", quality=100)
    root = open_kvstore(str(tmp_path))
    for shard in range(NUM_SHARDS):
        numbers = range(shard * SLOTS, (shard + 1) * SLOTS)
        chunks = [chunk(n) if n % SLOTS != 5 and n < IMAGES else None for n in numbers]
        write_shard(root, shard, chunks)
    return tmp_path, storage


def readers(path, storage, num_slots=SLOTS):
    root = open_kvstore(str(path))
    return LocalShards(str(path), storage, num_slots), RemoteShards(root, storage, num_slots)


def read(reader, rows):
    images = np.zeros((len(rows), SIDE, SIDE, 3), np.uint8)
    reader.read(np.array(rows), images)
    return images


def test_both_readers_return_the_requested_images_in_order(store):
    rows = [39, 0, 17, 17, 4, 32, 31]
    local, remote = (read(reader, rows) for reader in readers(*store))
    np.testing.assert_array_equal(local, remote)
    tolerance = 0 if store[1] == "raw" else 3
    assert np.abs(local.astype(int) - marks(rows)).max() <= tolerance


def test_images_that_left_the_page_cache_are_read_from_disk(store):
    reader, _ = readers(*store)
    rows = [39, 0, 17, 4, 32]
    before = read(reader, rows)
    for shard in range(NUM_SHARDS):
        with (store[0] / shards.shard_key(shard)).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    np.testing.assert_array_equal(read(reader, rows), before)


@pytest.mark.parametrize("which", [0, 1], ids=["local", "remote"])
@pytest.mark.parametrize(
    ("damage", "row", "message"),
    [
        (None, 21, "image 5 of shard image/c/1/0/0/0 is missing"),
        ("flip data", 16, "image 0 of shard image/c/1/0/0/0 does not match its checksum"),
        ("flip index", 20, "shard image/c/1/0/0/0"),
        ("truncate", 17, "shard image/c/1/0/0/0"),
        ("empty", 17, "shard image/c/1/0/0/0"),
        ("remove", 17, "image/c/1/0/0/0 is missing"),
    ],
)
def test_damage_is_named_and_other_shards_remain_readable(store, which, damage, row, message):
    path, storage = store
    file = path / shards.shard_key(1)
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage:
        changed = {
            "flip data": bytes([content[0] ^ 1]) + content[1:],
            "flip index": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
            "truncate": content[:-1],
            "empty": b"",
        }
        file.write_bytes(changed[damage])
    reader = readers(path, storage)[which]
    with pytest.raises(CorruptShardError, match=message):
        read(reader, [3, row])
    assert np.abs(read(reader, [3, 33]).astype(int) - marks([3, 33])).max() <= 3


@pytest.mark.parametrize(
    ("storage", "chunk"),
    [
        ("jpeg", b"not a JPEG"),
        ("jpeg", encode(mark(0, 16), "JPEG")),
        ("jpeg", encode(mark(1), "JPEG")[:200]),
        ("raw", mark(0, 16)),
        ("raw", mark(0, 4)),
    ],
    ids=["not a JPEG", "larger JPEG", "truncated JPEG", "larger raw image", "smaller raw image"],
)
def test_chunk_that_does_not_decode_to_the_image_size_is_damage(tmp_path, storage, chunk):
    write_shard(open_kvstore(str(tmp_path)), 0, [mark(0), chunk])
    for reader in readers(tmp_path, storage, num_slots=2):
        with pytest.raises(CorruptShardError, match="image 1 of shard image/c/0/0/0/0: "):
            read(reader, [1])


def test_tensorstore_reads_a_raw_store_as_a_zarr_array(tmp_path):
    """An independent implementation of zarr's sharding, which verifies the checksums."""
    write_marks(tmp_path / "marks" / "train", 1100)
    write_marks(tmp_path / "marks" / "val", 8)
    train = open_or_prepare(folder_config(tmp_path / "marks", tmp_path / "data"))["train"]
    kvstore = {"driver": "file", "path": f"{train.path}/image/"}
    array = ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
    assert array.chunk_layout.read_chunk.shape == (1, 8, 8, 3)
    np.testing.assert_array_equal(array.read().result(), train.read(np.arange(1100))["image"])


def test_jpeg_store_resembles_the_raw_store_on_a_third_of_the_disk(tmp_path):
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
    ("size", "expected"), [(8, 1024), (256, 1024), (512, 256), (700, 128), (20000, 1)]
)
def test_slots_per_shard_is_a_power_of_two_within_256_mib(size, expected):
    assert shards.slots_per_shard((size, size, 3)) == expected
    assert expected == 1 or expected * size * size * 3 <= 256 * 2**20


def test_store_may_have_more_shards_than_a_process_may_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (40, 40))
    root = open_kvstore(str(tmp_path))
    for shard in range(60):
        write_shard(root, shard, [mark(shard)])
    reader = LocalShards(str(tmp_path), "raw", 1)
    for _ in range(2):
        assert mark_number(read(reader, range(60))).tolist() == list(range(60))


# Memory for batches


def address(array):
    return array.__array_interface__["data"][0]


def test_buffer_is_reused_once_its_last_view_is_gone():
    buffers = BufferPool()
    batch = buffers.take((4, 8, 8, 3))
    first, view = address(batch), batch[1:].reshape(3, -1)
    assert first % 64 == 0
    del batch
    assert address(buffers.take((4, 8, 8, 3))) != first
    del view
    assert address(buffers.take((4, 8, 8, 3))) == first


def test_jax_arrays_that_share_a_buffer_keep_their_values():
    """On CPU, JAX does not copy an aligned array, so it must keep the buffer in use."""
    buffers = BufferPool()
    for _ in range(3):
        batch = buffers.take((4, 8, 8, 3))
        batch[:] = 7
        placed = jax.device_put(batch)
        del batch
        buffers.take((4, 8, 8, 3))[:] = 9
        assert (np.asarray(placed) == 7).all()
        del placed
