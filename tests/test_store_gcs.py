"""A store in a bucket equals a store on a local disk, byte for byte."""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import run
from gcs import bucket_server
from images import contents, folder_config, mark, mark_number, prepare_command, write_marks

from alexnet_jax.data import pipeline, shards
from alexnet_jax.data.prepare import open_or_prepare, prepare_store
from alexnet_jax.data.sources import Example, Source
from alexnet_jax.data.store import find_damage, open_store
from alexnet_jax.utils.errors import UserError

COUNT = 1100


@pytest.fixture(scope="module")
def gets():
    """The names of the objects that were requested, in this order."""
    return []


@pytest.fixture(scope="module")
def bucket(gets):
    with (
        bucket_server(gets=gets) as (objects, environment),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        yield objects


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bucket) -> Path:
    folder = tmp_path_factory.mktemp("marks")
    write_marks(folder / "train", COUNT)
    write_marks(folder / "val", 8)
    ran = run(sys.executable, *prepare_command(folder, "gs://bucket/data"), env=dict(os.environ))
    assert ran.returncode == 0, ran.stderr
    return folder


def test_bucket_contains_the_files_of_a_local_store(folder, bucket, tmp_path):
    open_or_prepare(folder_config(folder, tmp_path / "data"))
    local = contents(tmp_path)
    assert {name: local[name] for name in local if not name.endswith(".lock")} == bucket


def test_store_in_a_bucket_is_read_like_a_local_one(folder, bucket):
    train = open_or_prepare(folder_config(folder, "gs://bucket/data"))["train"]
    assert train.path.startswith("gs://bucket/data/folder-marks")
    indices = np.array([1099, 3, 3, 1024])
    rows = train.read(indices)
    assert mark_number(rows["image"]).tolist() == indices.tolist()
    assert rows["label"].tolist() == (indices * 4 // COUNT).tolist()


def test_opening_detects_a_shard_missing_in_the_bucket(folder, bucket):
    path = open_or_prepare(folder_config(folder, "gs://bucket/data"))["train"].path
    key = f"{path.removeprefix('gs://bucket/')}/image/c/1/0/0/0"
    shard = bucket.pop(key)
    with pytest.raises(UserError, match="shard image/c/1/0/0/0 is missing"):
        open_store(path)
    bucket[key] = shard


# Whole shards, of 16 images here

SLOTS, NUM_SHARDS, IN_SHARDS = 16, 7, 100


@pytest.fixture
def sharded(bucket, monkeypatch):
    """The URL of a store of 100 marks in 7 shards."""
    monkeypatch.setattr(shards, "MAX_SLOTS", SLOTS)
    url = "gs://bucket/sharded/train"

    def read(first, end):
        for number in range(first, end):
            yield Example(str(number), number % 4, partial(mark, number))

    if url.removeprefix("gs://bucket/") + "/zarr.json" not in bucket:
        prepare_store(Source("marks", IN_SHARDS, tuple("abcd"), read), url, image_size=8)
    return url


def test_training_image_by_image_names_the_alternative(sharded, capsys):
    pipeline.train_batches(pipeline.Order(open_store(sharded), 20, seed=0))
    assert f"{sharded} is read with one request for each image; with --" in capsys.readouterr().out


def images_of(gets):
    return [name for name in gets if "/image/c/" in name]


def test_training_shard_by_shard_reads_each_shard_once_an_epoch(sharded, gets):
    store = open_store(sharded)
    gets.clear()
    batches = pipeline.train_batches(pipeline.Order(store, 20, seed=0, shuffle_shards=2))
    numbers = [mark_number(next(batches)["image"]) for _ in range(2 * IN_SHARDS // 20)]
    for epoch in np.concatenate(numbers).reshape(2, IN_SHARDS):
        assert sorted(epoch) == list(range(IN_SHARDS))
    batches.close()
    # The two lanes share one, and some shards of the third epoch are read ahead.
    assert len(images_of(gets)) <= 2 * (NUM_SHARDS + 1) + 2 * 2


def test_local_and_bucket_stores_have_the_same_order_and_continue_within_a_shard(
    sharded, bucket, tmp_path
):
    for name in [name for name in bucket if name.startswith("sharded/train/")]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bucket[name])
    local = open_store(tmp_path / "sharded/train")
    here = pipeline.train_batches(pipeline.Order(local, 6, seed=3, shuffle_shards=3))
    taken = [next(here) for _ in range(31)]
    there = pipeline.train_batches(pipeline.Order(open_store(sharded), 6, seed=3, shuffle_shards=3))
    there.set_state({"next_index": 23})
    for batch in taken[23:]:
        for name, value in next(there).items():
            np.testing.assert_array_equal(value, batch[name])


def test_evaluation_reads_the_images_of_a_batch_with_one_request(sharded, gets):
    store = open_store(sharded)
    gets.clear()
    batches = list(pipeline.eval_batches(store, 8))
    found = np.concatenate([mark_number(batch["image"]) for batch in batches])
    np.testing.assert_array_equal(found[:IN_SHARDS], np.arange(IN_SHARDS))
    assert len(images_of(gets)) <= len(batches) + NUM_SHARDS  # an index of each shard


def test_verification_reads_each_shard_of_a_bucket_once(sharded, gets):
    store = open_store(sharded)
    gets.clear()
    assert list(find_damage(store)) == []
    assert len(images_of(gets)) == NUM_SHARDS


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", "image 5 of shard image/c/2/0/0/0 does not match its checksum"),
        ("truncate", "shard image/c/2/0/0/0: "),
        ("remove", "image [0-9]+ of shard image/c/2/0/0/0 is missing"),
    ],
)
def test_damage_of_a_shard_that_is_read_whole_is_named(sharded, bucket, damage, message):
    name = "sharded/train/image/c/2/0/0/0"
    content = bytearray(bucket[name])
    store = open_store(sharded)
    if damage == "flip":
        content[5 * (8 * 8 * 3 + 4)] ^= 1
    changed = {"flip": content, "truncate": content[:-7], "remove": None}[damage]
    before = bucket.pop(name)
    if changed is not None:
        bucket[name] = bytes(changed)
    try:
        with pytest.raises(UserError, match=message):
            for batch in pipeline.train_batches(
                pipeline.Order(store, 20, seed=0, shuffle_shards=7)
            ):
                assert len(batch["label"]) == 20
    finally:
        bucket[name] = before


def test_busy_bucket_is_asked_again(sharded, bucket, monkeypatch):
    gets, busy = [], images_of(bucket)
    with bucket_server(gets=gets, busy=busy) as (objects, environment):
        objects.update(bucket)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        batches = pipeline.train_batches(
            pipeline.Order(open_store(sharded), 50, seed=0, shuffle_shards=7)
        )
        found = np.concatenate([mark_number(next(batches)["image"]) for _ in range(2)])
        batches.close()
    assert sorted(found) == list(range(IN_SHARDS))
    assert len(images_of(gets)) == 2 * NUM_SHARDS
