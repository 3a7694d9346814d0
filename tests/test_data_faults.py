"""Faults of data, each injected for real.

See also test_prepare (kills, full disks, corrupt images), test_store (missing and truncated shards)
and test_shards (flipped bits).
"""

import contextlib
import itertools
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from commands import OFTEN, run, saved_state, started, train
from images import encode, folder_config, mark, mark_number, prepare_command, write_marks

from alexnet_jax import config as configs
from alexnet_jax.data.prepare import open_or_prepare, prepare_store
from alexnet_jax.data.sources import Example, Source
from alexnet_jax.data.store import open_store, store_path
from alexnet_jax.utils.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    write_marks(tmp_path / "marks" / "train", 8)
    write_marks(tmp_path / "marks" / "val", 8)
    return tmp_path / "marks"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb() -> bytes:
    """Returns a few bytes that would decode to 30 GB."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        + png_chunk(b"IEND", b"")
    )


def jpeg_bomb() -> bytes:
    """Returns a JPEG whose header claims 65,500x65,500 pixels."""
    content = bytearray(encode(mark(0, 64), "JPEG"))
    start_of_frame = content.index(b"\xff\xc0")
    content[start_of_frame + 5 : start_of_frame + 9] = struct.pack(">HH", 65_500, 65_500)
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.png", png_bomb(), "100000x100000 pixels, more than"),
        ("bomb.jpg", jpeg_bomb(), "65500x65500 pixels, more than"),
        ("empty.jpg", b"", "it is not an image"),
        ("empty.png", b"", "it is not an image"),
    ],
)
def test_decompression_bombs_and_empty_files_count_as_corrupt_images(
    folder, name, content, message
):
    (folder / "train" / "class0" / name).write_bytes(content)
    config = folder_config(folder, folder / "data")
    with pytest.raises(UserError, match="1 of 9 images .* cannot be decoded"):
        open_or_prepare(config)
    config.max_corrupt = 0.2
    store = open_or_prepare(config)["train"]
    log = Path(store.path, "corrupt.log").read_text()
    assert log.startswith(f"class0/{name}: ")
    assert message in log
    assert mark_number(store.read(np.arange(8))["image"]).tolist() == list(range(8))


def test_decompression_bombs_are_not_decoded(folder):
    (folder / "train" / "class0" / "bomb.jpg").write_bytes(jpeg_bomb())
    (folder / "train" / "class1" / "bomb.png").write_bytes(png_bomb())
    program = (
        "import sys; from alexnet_jax.store import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(open('/proc/self/status').read())"
    )
    command = prepare_command(folder, folder / "data")[2:]
    ran = run(sys.executable, "-c", program, *command, "--config.max_corrupt=0.3")
    assert ran.returncode == 0, ran.stderr
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", ran.stdout)[1]) / 1e3
    assert peak < 600  # MB; decoding the two would take over 40,000


@pytest.mark.parametrize("depth", ["", "deeper"])
def test_symlink_loop_is_explained(folder, depth):
    place = folder / "train" / "class1" / depth
    place.mkdir(exist_ok=True)
    (place / "again").symlink_to(folder / "train")
    with pytest.raises(UserError, match="/again is a link to a folder that contains the link"):
        open_or_prepare(folder_config(folder, folder / "data"))


def test_class_that_links_to_its_own_split_is_explained(folder):
    (folder / "train" / "class9").symlink_to(folder / "train")
    with pytest.raises(UserError, match="/class9 is a link to a folder that contains the link"):
        open_or_prepare(folder_config(folder, folder / "data"))


def test_file_that_links_to_itself_is_a_corrupt_image(folder):
    link = folder / "train" / "class0" / "self.png"
    link.symlink_to(link)
    with pytest.raises(UserError, match="1 of 9 images"):
        open_or_prepare(folder_config(folder, folder / "data"))


def test_links_without_loops_are_followed(folder, tmp_path):
    (folder / "train" / "class0").rename(tmp_path / "elsewhere")
    (folder / "train" / "class0").symlink_to(tmp_path / "elsewhere")
    store = open_or_prepare(folder_config(folder, folder / "data"))["train"]
    assert mark_number(store.read(np.arange(8))["image"]).tolist() == list(range(8))


def test_class_folders_may_have_spaces_and_any_alphabet(tmp_path):
    names = ("Ara ararauna", "größer", "жар-птица", "孔雀", "🦆")
    for split, number in itertools.product(("train", "val"), range(5)):
        file = tmp_path / "птицы и 鸟" / split / names[number] / f"фото {number}.png"
        file.parent.mkdir(parents=True)
        file.write_bytes(encode(mark(number), "PNG"))
    ran = run(sys.executable, *prepare_command(tmp_path / "птицы и 鸟", tmp_path / "мои данные"))
    assert ran.returncode == 0, ran.stderr
    stores = open_or_prepare(folder_config(tmp_path / "птицы и 鸟", tmp_path / "мои данные"))
    assert stores["train"].class_names == names
    rows = stores["eval"].read(np.arange(5))
    assert mark_number(rows["image"]).tolist() == rows["label"].tolist() == list(range(5))


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_label_out_of_range_stops_preparation(tmp_path, label):
    """The test splits of many data sets have the label -1."""

    def read(first, end):
        labels = [0, 1, label, 2][first:end]
        return iter([Example(f"image {n}", x, lambda: mark(0)) for n, x in enumerate(labels)])

    source = Source("birds test", 4, ("a", "b", "c"), read)
    with pytest.raises(UserError, match=f"image 2 of birds test has the label {label}, .*0 to 2"):
        prepare_store(source, str(tmp_path / "store"), image_size=8)
    with pytest.raises(UserError, match="is not complete"):
        open_store(tmp_path / "store")


@contextlib.contextmanager
def read_only(folder: Path):
    """Makes a folder read-only. Root ignores its mode, so it is mounted read-only instead."""
    mounted = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
    if os.getuid() == 0 and subprocess.run(mounted, capture_output=True).returncode == 0:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    elif os.getuid() == 0:
        pytest.skip("making a folder read-only for root requires mounting")
    else:
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)


@pytest.mark.long
def test_read_only_data_dir_is_explained_and_suffices_once_prepared(folder, tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    command = (sys.executable, *prepare_command(folder, data_dir, size=72))
    with read_only(data_dir):
        ran = run(*command)
        assert ran.returncode == 2
        assert re.fullmatch(
            f"error: cannot write {data_dir}.*: .*; choose another data_dir", ran.stderr.strip()
        )
    assert run(*command).returncode == 0
    with read_only(data_dir):
        for action in ("prepare", "info", "verify"):
            ran = run(*command[:3], action, *command[3:])
            assert ran.returncode == 0, ran.stderr
        ran = run(
            *(sys.executable, "train.py", *command[3:], f"--workdir={tmp_path / 'run'}"),
            *("--config.augment.crop_size=64", "--config.model.width=0.1"),
            *("--config.num_epochs=1", "--config.batch_size=8", "--config.parallel=jit"),
        )
        assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_deleting_a_store_during_training_loses_no_step(undisturbed, digits, tmp_path):
    """Open shards remain readable; the first evaluation detects that the store is missing."""
    data_dir, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(digits, data_dir)
    fields = [field.removeprefix("--config.").split("=", 1) for field in OFTEN]
    config = configs.load("configs/quickstart.py", [*fields, ("data_dir", str(data_dir))])
    test_store = Path(store_path(config, config.eval_split))
    process = started(data_dir, workdir, *OFTEN)
    while not process.lines.readline().startswith("step "):
        pass
    test_store.parent.rename(tmp_path / "away")
    output = process.lines.read()
    assert process.wait(timeout=200) == 2
    assert re.search(f"^error: .*{test_store}.* shard image/c/0/0/0/0 is missing; ", output, re.M)
    assert "Traceback" not in output
    assert saved_state(workdir)[0] == 20  # all steps before the evaluation
    (tmp_path / "away").rename(test_store.parent)
    ran = train(data_dir, workdir, *OFTEN)
    assert ran.returncode == 0, ran.stderr
    assert "resuming from step 20" in ran.stdout
    np.testing.assert_array_equal(
        saved_state(workdir)[1]["params"]["fc8"]["kernel"],
        saved_state(undisturbed[0])[1]["params"]["fc8"]["kernel"],
    )
