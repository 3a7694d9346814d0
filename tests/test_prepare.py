"""Preparation that is killed, fills the disk, meets corrupt images, or runs twice at once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, run
from images import contents, encode, folder_config, mark, mark_number, prepare_command, write_marks

from alexnet_jax.data.prepare import open_or_prepare, prepare_store
from alexnet_jax.data.sources import Example, Source
from alexnet_jax.data.store import open_store, store_path
from alexnet_jax.utils.errors import UserError

COUNT = 2100  # three shards: 1024, 1024 and 52 images
STOP_AT = 1500  # an image in the second shard


@pytest.fixture
def folder(tmp_path) -> Path:
    files = write_marks(tmp_path / "marks" / "train", COUNT)
    files += write_marks(tmp_path / "marks" / "val", 8)
    for file in files:
        os.utime(file, (0, 0))  # stores contain the times of their files
    return tmp_path / "marks"


def file_of(folder: Path, number: int) -> Path:
    return next((folder / "train").rglob(f"{number:05d}.png"))


def start_preparing(folder: Path, data_dir: Path, more=(), before=()) -> subprocess.Popen:
    """Starts the command that prepares a folder."""
    return subprocess.Popen(
        [*before, sys.executable, *prepare_command(folder, data_dir), *more],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def undisturbed(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    return contents(open_or_prepare(folder_config(folder, tmp_path / "undisturbed"))["train"].path)


def rows_done(path: str) -> int:
    """Returns the number of images in the finished shards of a preparation."""
    return sum(len(json.loads(p.read_text())["labels"]) for p in Path(path).glob("parts/*.json"))


def block_at(folder: Path, number: int) -> Path:
    """Replaces one image by a pipe: its reader waits until something is written to it."""
    pipe = file_of(folder, number)
    pipe.unlink()
    os.mkfifo(pipe)
    return pipe


def put_back(file: Path, number: int) -> None:
    """Replaces a file by the mark that `folder` had there."""
    file.unlink(missing_ok=True)
    file.write_bytes(encode(mark(number), "PNG"))
    os.utime(file, (0, 0))


def kill_in_the_second_shard(folder: Path, data_dir: Path, path: str) -> Path:
    """Kills a preparation in the second shard; returns the pipe that it waited for."""
    pipe = block_at(folder, STOP_AT)
    process = start_preparing(folder, data_dir)
    while rows_done(path) == 0:
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return pipe


def test_killed_preparation_resumes_and_ends_with_the_same_bytes(folder, tmp_path):
    expected = undisturbed(folder, tmp_path)
    data_dir = tmp_path / "data"
    path = store_path(folder_config(folder, data_dir), "train")
    pipe = kill_in_the_second_shard(folder, data_dir, path)
    assert rows_done(path) == 1024
    with pytest.raises(UserError, match="not complete"):
        open_store(path)
    put_back(pipe, STOP_AT)
    finished = Path(path, "image/c/0/0/0/0").stat()
    second = start_preparing(folder, data_dir)
    _, output = second.communicate(timeout=60)
    assert second.returncode == 0, output
    assert "1024/2100" in output
    assert contents(path) == expected
    assert Path(path, "image/c/0/0/0/0").stat().st_ino == finished.st_ino  # not written again


def test_images_replaced_before_a_preparation_resumes_are_read_again(folder, tmp_path):
    path = store_path(folder_config(folder, tmp_path / "data"), "train")
    pipe = kill_in_the_second_shard(folder, tmp_path / "data", path)
    put_back(pipe, STOP_AT)
    file_of(folder, 3).write_bytes(encode(mark(3000), "PNG"))  # in the first, finished shard
    train = open_or_prepare(folder_config(folder, tmp_path / "data"))["train"]
    assert mark_number(train.read(np.arange(5))["image"]).tolist() == [0, 1, 2, 3000, 4]


def test_preparation_from_other_files_is_not_resumed(folder, tmp_path):
    data_dir = tmp_path / "data"
    path = store_path(folder_config(folder, data_dir), "train")
    pipe = kill_in_the_second_shard(folder, data_dir, path)
    pipe.unlink()
    train = open_or_prepare(folder_config(folder, data_dir))["train"]
    expected = [n for n in range(COUNT) if n != STOP_AT]
    assert mark_number(train.read(np.arange(COUNT - 1))["image"]).tolist() == expected


@pytest.mark.long
def test_second_process_waits_for_the_first(folder, tmp_path):
    expected = undisturbed(folder, tmp_path)
    pipe = block_at(folder, STOP_AT)
    first = start_preparing(folder, tmp_path / "data")
    path = store_path(folder_config(folder, tmp_path / "data"), "train")
    while rows_done(path) == 0:
        assert first.poll() is None, first.stderr.read()
    second = start_preparing(folder, tmp_path / "data")
    assert "another process is preparing" in second.stderr.readline()
    with pipe.open("wb") as waiting:
        put_back(pipe, STOP_AT)  # the first process still reads from the pipe
        waiting.write(encode(mark(STOP_AT), "PNG"))
    for process in (first, second):
        _, output = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert contents(path) == expected


# 98 KiB per file. The coverage of this process is not measured, since that writes files too.
UNMEASURED = ("env", "-u", "COVERAGE_PROCESS_CONFIG")
LIMITED = (*UNMEASURED, "bash", "-c", 'ulimit -f 98 && exec "$@"', "bash")


def test_file_size_limit_is_explained_and_preparation_resumes_without_it(folder, tmp_path):
    expected = undisturbed(folder, tmp_path)
    data_dir = tmp_path / "data"
    path = store_path(folder_config(folder, data_dir), "train")
    process = start_preparing(folder, data_dir, before=LIMITED)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.splitlines()[-1].startswith(f"error: cannot write {path}: file too large; make")
    open_or_prepare(folder_config(folder, data_dir))
    assert contents(path) == expected


def test_full_disk_is_explained_and_preparation_resumes_once_there_is_space(folder, tmp_path):
    expected = undisturbed(folder, tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=360k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        config = folder_config(folder, disk)
        path = store_path(config, "train")
        with pytest.raises(UserError, match=f"cannot write {path}: no space left on device; make"):
            open_or_prepare(config)
        assert rows_done(path) == 1024
        assert not list(Path(path).rglob("*.unfinished"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        open_or_prepare(config)
        assert contents(path) == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_data_dir_that_is_a_file_is_explained(folder, tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file.*; choose another data_dir"):
        open_or_prepare(folder_config(folder, tmp_path / "file" / below))


BAD = (7, 1030, 2099)  # one in each shard


def spoil(folder: Path) -> None:
    for number in BAD:
        file_of(folder, number).write_bytes(encode(mark(number), "PNG")[:50])


def test_corrupt_images_within_the_limit_are_logged_and_left_out(folder, tmp_path):
    spoil(folder)
    config = folder_config(folder, tmp_path)
    config.max_corrupt = 3 / COUNT
    train = open_or_prepare(config)["train"]
    kept = [n for n in range(COUNT) if n not in BAD]
    assert train.num_examples == len(kept)
    rows = train.read(np.arange(len(kept)))
    assert mark_number(rows["image"]).tolist() == kept
    np.testing.assert_array_equal(rows["label"], np.array(kept) * 4 // COUNT)
    log = Path(train.path, "corrupt.log").read_text().splitlines()
    assert [line.split(":")[0] for line in log] == [
        f"class{n * 4 // COUNT}/{n:05d}.png" for n in BAD
    ]
    np.testing.assert_array_equal(
        train.mean_image[0, 0], np.mean([mark(n)[0, 0] for n in kept], axis=0).astype(np.float32)
    )


def test_all_corrupt_images_are_named_at_once_and_a_higher_limit_resumes(folder, tmp_path):
    """Of both splits, although the first one has too many."""
    spoil(folder)
    (folder / "val" / "class0" / "00000.png").write_bytes(b"")
    config = folder_config(folder, tmp_path / "data")
    config.max_corrupt = 1 / COUNT
    path = store_path(config, "train")
    with pytest.raises(UserError) as caught:
        open_or_prepare(config)
    for expected in (
        f"3 of 2100 images of folder:{folder} train ",
        f"(1; {path}/corrupt.log names them) and 1 of 8 images of folder:{folder} val ",
        "; repair or remove them, or raise --config.max_corrupt",
    ):
        assert expected in str(caught.value)
    assert len(Path(path, "corrupt.log").read_text().splitlines()) == 3
    assert rows_done(path) == COUNT
    config.max_corrupt = 1 / 8
    open_or_prepare(config)
    config.data_dir = str(tmp_path / "undisturbed")
    assert contents(path) == contents(open_or_prepare(config)["train"].path)


def test_preparation_stops_early_if_most_images_are_corrupt(folder, tmp_path):
    for number in range(COUNT):
        file_of(folder, number).write_bytes(b"")
    config = folder_config(folder, tmp_path / "data")
    with pytest.raises(UserError, match=r"1001 of the first 1001 images .* \(2; .*/corrupt.log"):
        open_or_prepare(config)
    log = Path(store_path(config, "train"), "corrupt.log").read_text()
    assert len(log.splitlines()) == 1001


def test_repaired_images_are_included_on_resumption(folder, tmp_path):
    expected = undisturbed(folder, tmp_path)
    spoil(folder)
    config = folder_config(folder, tmp_path / "data")
    config.max_corrupt = 1 / COUNT
    path = store_path(config, "train")
    with pytest.raises(UserError, match="repair or remove them"):
        open_or_prepare(config)
    for number in BAD:
        put_back(file_of(folder, number), number)
    open_or_prepare(config)
    assert contents(path) == expected


def test_source_that_ends_early_is_an_error(tmp_path):
    def read(first, end):
        return iter([Example(str(n), 0, lambda: mark(0)) for n in range(first, min(end, 5))])

    source = Source("birds train", 8, ("a",), read)
    with pytest.raises(UserError, match="birds train ends after 5 examples instead of 8"):
        prepare_store(source, str(tmp_path), image_size=8)


def test_source_without_any_intact_image_is_an_error_under_any_limit(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        (tmp_path / split / "one" / "a.jpg").write_bytes(b"junk")
    config = folder_config(tmp_path, tmp_path / "data")
    config.max_corrupt = 1.0
    with pytest.raises(UserError, match="no image of the classes one of .* can be decoded"):
        open_or_prepare(config)


def part_command(folder: Path, data_dir: Path, part: str) -> list[str]:
    module, name, *rest = prepare_command(folder, data_dir)
    return [sys.executable, module, name, "prepare", *rest, f"--part={part}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(["1/2", "2/2"], marks=pytest.mark.long),
        ["3/3", "1/3", "2/3"],
        pytest.param(["5/5", "1/1"], marks=pytest.mark.long),
    ],
)
def test_hosts_prepare_one_part_each_and_the_last_completes_the_store(folder, tmp_path, parts):
    """The eval store has one shard, which belongs to the last part."""
    data_dir = tmp_path / "data"
    path = store_path(folder_config(folder, data_dir), "train")
    for part in parts[:-1]:
        ran = run(*part_command(folder, data_dir, part))
        assert ran.returncode == 0, ran.stderr
        assert f"part {part[0]} of {part[2]} of {path} is written; " in ran.stdout
        assert "of all 3 shards are still missing" in ran.stdout
        with pytest.raises(UserError, match="not complete"):
            open_store(path)
    ran = run(*part_command(folder, data_dir, parts[-1]))
    assert ran.returncode == 0, ran.stderr
    assert contents(path) == undisturbed(folder, tmp_path)
    ran = run(*part_command(folder, data_dir, parts[0]))
    assert ran.returncode == 0, ran.stderr
    assert contents(path) == undisturbed(folder, tmp_path)


def test_hosts_may_prepare_their_parts_at_the_same_time(folder, tmp_path):
    data_dir = tmp_path / "data"
    hosts = [
        subprocess.Popen(
            part_command(folder, data_dir, f"{number}/3"), cwd=ROOT, stderr=subprocess.PIPE
        )
        for number in (1, 2, 3)
    ]
    for host in hosts:
        _, output = host.communicate(timeout=100)
        assert host.returncode == 0, output
    path = store_path(folder_config(folder, data_dir), "train")
    assert contents(path) == undisturbed(folder, tmp_path)


def test_host_with_a_part_does_not_delete_a_store_of_other_data(folder, tmp_path):
    config = folder_config(folder, tmp_path / "data")
    before = contents(open_or_prepare(config)["train"].path)
    attributes = Path(store_path(config, "train"), "zarr.json")
    attributes.write_text(attributes.read_text().replace('"complete": true', '"complete": false'))
    (folder / "train" / "class0" / "more.png").write_bytes(encode(mark(3), "PNG"))
    ran = run(*part_command(folder, tmp_path / "data", "1/2"))
    assert ran.returncode == 2
    assert "was started from other data or by another version; delete it" in ran.stderr
    left = contents(store_path(config, "train"))
    assert {name for name in before if name != "zarr.json"} <= set(left)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "one/two", "1/0"])
def test_invalid_part_is_rejected(folder, tmp_path, part):
    ran = run(*part_command(folder, tmp_path, part))
    assert ran.returncode == 2
    assert ran.stderr == f"error: --part={part} must be I/N with I from 1 to N, for example 2/8\n"


@pytest.mark.slow
def test_killed_preparation_of_a_jpeg_store_ends_with_the_same_bytes(folder, tmp_path):
    storage = "--config.storage=jpeg"
    config = folder_config(folder, tmp_path / "data")
    config.storage = "jpeg"
    path = store_path(config, "train")
    pipe = block_at(folder, STOP_AT)
    process = start_preparing(folder, tmp_path / "data", more=(storage,))
    while rows_done(path) == 0:
        assert process.poll() is None, process.stderr.read()
    process.kill()
    process.communicate()
    put_back(pipe, STOP_AT)
    open_or_prepare(config)
    resumed = contents(path)
    config.data_dir = str(tmp_path / "undisturbed")
    assert resumed == contents(open_or_prepare(config)["train"].path)


def test_records_left_in_a_complete_store_by_a_kill_are_removed(folder, tmp_path):
    config = folder_config(folder, tmp_path / "data")
    path = Path(open_or_prepare(config)["train"].path)
    before = contents(path)
    (path / "parts").mkdir(exist_ok=True)
    (path / "parts" / "0.json").write_text("{}")
    open_or_prepare(config)
    assert contents(path) == before
