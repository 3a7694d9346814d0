"""`python -m alexnet_jax.features`: arrays of features, their files, interruptions and errors."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from images import encode, mark, photograph

from alexnet_jax import config as configs
from alexnet_jax import features, inference
from alexnet_jax.analysis import extraction
from alexnet_jax.data.augment import Statistics
from alexnet_jax.models.build import build_model

COUNT = 7
LAYERS = ["relu7", "norm1", "layer 5", "pool5.input"]


@pytest.fixture
def run(capsys):
    """Returns a function that runs the command here: its exit code, stdout and stderr."""

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            features.main([str(word) for word in words])
        return ended.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def folder(tmp_path):
    """A folder with photographs, and a file that is none."""
    for number in range(COUNT):
        file = tmp_path / "photos" / f"{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(photograph(number, 72, 72), "PNG"))
    (tmp_path / "photos/notes.txt").write_text("no image")
    return tmp_path / "photos"


def untrained(workdir, variant, seed=0):
    """Creates the workdir of a narrow network."""
    settings = {"model.variant": variant, "model.width": "0.1"}
    config = configs.load("configs/quickstart.py", settings.items())
    model = build_model(config)
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 64, 64, 3)))
    stats = Statistics(np.full((72, 72, 3), 128, np.float32), np.eye(3, dtype=np.float32))
    inference.create(workdir, config, variables, stats, tuple("0123456789"))
    return workdir


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("features") / "paper", "paper")


def expected(workdir, numbers, names):
    return inference.load(workdir).features(
        np.stack([photograph(number, 72, 72) for number in numbers]), names
    )


def read(path):
    if path.suffix == ".npy":
        return np.load(path)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return ts.open(spec).result().read().result()


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_arrays_have_the_features_of_the_listed_files(kind, paper, folder, tmp_path, run):
    out = tmp_path / "out"
    options = ("--layers", *LAYERS, "--output", out, "--format", kind, "--batch-size", "3")
    code, printed, errors = run(paper, folder, *options)
    assert code == 0 and errors == ""
    assert printed.strip().endswith(
        f"wrote features.json, {', '.join(f'{n}.{kind}' for n in LAYERS)} to {out}"
    )
    description = json.loads((out / "features.json").read_text())
    assert (
        description["files"] == sorted(description["files"]) and len(description["files"]) == COUNT
    )
    numbers = [int(name.split("/")[1].split(".")[0]) for name in description["files"]]
    want = expected(paper, numbers, LAYERS)
    operations = ["relu7", "lrn1", "relu5", "relu5"]
    for name, operation in zip(LAYERS, operations, strict=True):
        entry = description["layers"][name]
        found = read(out / entry["file"])
        assert (entry["operation"], entry["shape"]) == (operation, list(found.shape))
        assert found.dtype == np.float32
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(found, want[name], rtol=0, atol=1e-5 * scale)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["features.json", *(f"{name}.{kind}" for name in LAYERS)]
    )


def test_files_that_cannot_be_decoded_have_rows_of_nan(paper, folder, tmp_path, run):
    whole = (folder / "1/3.png").read_bytes()
    (folder / "1/3.png").write_bytes(whole[:-200])
    options = ("--layers", "fc8", "--output", tmp_path / "out", "--batch-size", "2")
    code, _, errors = run(paper, folder, *options)
    assert code == features.EXIT_SOME_SKIPPED
    (line,) = errors.splitlines()
    assert line.startswith(f"skipped {folder / '1/3.png'}: ")
    files = json.loads((tmp_path / "out/features.json").read_text())["files"]
    found = np.load(tmp_path / "out/fc8.npy")
    assert [name for name, row in zip(files, found, strict=True) if np.isnan(row).all()] == [
        "1/3.png"
    ]
    good = [name for name in files if name != "1/3.png"]
    want = expected(paper, [int(name[2]) for name in good], ["fc8"])["fc8"]
    np.testing.assert_allclose(found[~np.isnan(found[:, 0])], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_a_killed_process_is_continued(kind, paper, tmp_path, run):
    """Kills the process before it has read all images, then starts it again."""
    count, folder = 2000, tmp_path / "marks"
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:05d}.png").write_bytes(encode(mark(number), "PNG"))
    out = tmp_path / "out"
    words = (paper, folder, "--layers", "fc8", "pool5", "--output", out, "--format", kind)
    options = ("--batch-size", "8")
    command = [sys.executable, "-m", "alexnet_jax.features", *map(str, words), *options]
    process = subprocess.Popen(command, cwd=commands.ROOT, stderr=subprocess.DEVNULL)
    while not (out / extraction.ROWS_DONE).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = int((out / extraction.ROWS_DONE).read_text())
    assert 0 < done < count and not (out / f"fc8.{kind}").exists()
    # What was written is kept: these files would now have other features.
    first = read(out / f"fc8.part.{kind}")[:done]
    for path in sorted(folder.iterdir())[:done]:
        path.write_bytes(encode(mark(9999), "PNG"))
    code, _, errors = run(*words, "--batch-size", "128")
    assert code == 0, errors
    found = read(out / f"fc8.{kind}")
    np.testing.assert_array_equal(found[:done], first)
    numbers = [done, done + 1, count - 1]
    images = np.stack([mark(number, 72) for number in numbers])
    want = inference.load(paper).features(images, ["fc8", "pool5"])
    for name in want:
        rows = read(out / f"{name}.{kind}")[numbers]
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(rows, want[name], rtol=0, atol=1e-5 * scale)
    before = found.copy()
    assert run(*words)[0] == 0  # which finds all of it
    np.testing.assert_array_equal(read(out / f"fc8.{kind}"), before)


def test_a_kill_between_the_last_two_names_is_continued(paper, folder, tmp_path, run):
    out = tmp_path / "out"
    words = (paper, folder, "--layers", "fc8", "pool5", "--output", out)
    assert run(*words)[0] == 0
    want = np.load(out / "pool5.npy")
    (out / "pool5.npy").rename(out / "pool5.part.npy")
    (out / extraction.ROWS_DONE).write_text(f"{COUNT}\n")
    assert run(*words)[0] == 0
    np.testing.assert_array_equal(np.load(out / "pool5.npy"), want)


def test_memory_does_not_grow_with_the_number_of_images(paper, tmp_path):
    """conv1 of these images has 58 MB in all, of which three quarters may take 20 MB more."""
    folder = tmp_path / "marks"
    folder.mkdir()
    for number in range(8000):
        (folder / f"{number:05d}.png").symlink_to(tmp_path / "mark.png")
    (tmp_path / "mark.png").write_bytes(encode(mark(7), "PNG"))
    network = inference.load(paper)
    names, out = ["conv1"], tmp_path / "out"
    batch = dict(output=out, batch_size=100, suffix=".npy")
    rows = extraction._rows

    used = []

    def watched(*args):
        for found in rows(*args):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            used.append(pages * resource.getpagesize())
            yield found

    extraction._rows, kept = watched, rows
    try:
        assert list(extraction.extract(network, folder, names, **batch)) == []
    finally:
        extraction._rows = kept
    assert (out / "conv1.npy").stat().st_size > 57e6
    assert max(used) - used[len(used) // 4] < 20e6


def test_convolutions_alone_have_features(tmp_path, folder, run):
    workdir = untrained(tmp_path / "run", "owt_conv")
    for path in sorted(folder.rglob("*.png"))[2:]:
        path.unlink()
    names = ("features.12", "avgpool")
    code, _, errors = run(workdir, folder, "--layers", *names, "--output", tmp_path / "out")
    assert code == 0, errors
    assert np.load(tmp_path / "out/features.12.npy").shape == (2, 1, 1, 24)


def make_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def keep_the_text(folder):
    for path in folder.rglob("*.png"):
        path.unlink()


WRONG = {
    "unknown layer": (
        ["--layers", "rellu7"],
        None,
        "unknown layer 'rellu7'; the nearest names are relu7",
    ),
    "no folder": ([], shutil.rmtree, "is not a folder; name a folder with images"),
    "empty folder": ([], make_empty, "there are no images in .*: it is empty"),
    "other files": ([], keep_the_text, "there are no images in .*: none of its 1 files is one"),
    "no network": (["WORKDIR"], None, "no trained network in .*: it has no config.json"),
    "batch of 0": (["--batch-size", "0"], None, "--batch-size 0 must be at least 1"),
    "other output": (["--output", "USED"], None, "has other files and no features.json"),
    "file as output": (["--output", "FILE"], None, "cannot write .*; choose another --output"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_sentence(name, paper, folder, tmp_path, run):
    more, change, message = WRONG[name]
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    places = {"USED": tmp_path / "used", "FILE": tmp_path / "used/file"}
    if change:
        change(folder)
    workdir = tmp_path if "WORKDIR" in more else paper
    more = [places.get(word, word) for word in more if word != "WORKDIR"]
    code, _, errors = run(workdir, folder, "--layers", "relu7", "--output", tmp_path / "out", *more)
    assert code == 2
    (line,) = errors.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize("change", ["layers", "files", "network", "damage"])
def test_other_features_are_not_mixed(change, paper, folder, tmp_path, run):
    out = tmp_path / "out"
    assert run(paper, folder, "--layers", "fc8", "--output", out)[0] == 0
    layers, workdir, other = ["fc8"], paper, change
    if change == "layers":
        layers = ["fc7"]
    elif change == "files":
        os.unlink(folder / "0/0.png")
        other = "layers and files"  # the number of rows is another too
    elif change == "network":
        workdir = untrained(tmp_path / "other", "paper", seed=1)
    else:
        (out / "features.json").write_text("[")
        other = "cannot be read"
    code, _, errors = run(workdir, folder, "--layers", *layers, "--output", out)
    assert code == 2 and other in errors and "choose a new --output" in errors


def test_a_full_disk_is_one_sentence(paper, folder, tmp_path):
    words = (paper, folder, "--layers", "conv1", "--output", tmp_path / "out")
    done = commands.run_with_file_limit(
        20, sys.executable, "-m", "alexnet_jax.features", *map(str, words)
    )
    assert done.returncode == 2
    assert "error: cannot write" in done.stderr and "run the same command again" in done.stderr
