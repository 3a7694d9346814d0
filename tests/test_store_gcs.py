"""A store in a bucket equals a store on a local disk, byte for byte."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import run
from gcs import bucket_server
from images import contents, folder_config, mark_number, prepare_command, write_marks

from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import open_store
from alexnet_jax.utils.errors import UserError

COUNT = 1100


@pytest.fixture(scope="module")
def bucket():
    with bucket_server() as (objects, environment), pytest.MonkeyPatch.context() as patch:
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
