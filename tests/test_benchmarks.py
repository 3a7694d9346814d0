"""Benchmarks: quick runs of the real commands, and the data they measure with.

No test asserts a time. `train_step.py --against` is run against this checkout itself.
"""

import io
import json
import sys

import numpy as np
import pytest
from commands import ROOT, run
from PIL import Image

from alexnet_jax import config as configs
from benchmarks import photographs

sys.path.append(str(ROOT / "benchmarks"))  # as when a benchmark runs

import accuracy  # noqa: E402
import harness  # noqa: E402
import lines  # noqa: E402

ROW = {"what", "batch", "dtype", "unit", "median", "min", "max"}
QUICK = (
    "accuracy.py quickstart",
    "augmentation.py",
    "figure1.py",
    "inference.py",
    "input_pipeline.py",
    "lines.py",
    "preparation.py",
    "reading.py",
    "start_up.py",
    "loop.py",
    "modern.py",
    "store_scale.py",
    "train_step.py",
    f"train_step.py --against {ROOT}",
)
PLOTTING = ("figure1.py", "input_pipeline.py", "train_step.py")


def quick_rows(command, tmp_path, *options):
    """Runs a benchmark with --quick; returns its JSON rows and what it printed."""
    script, *words = command.split()
    rows = tmp_path / "rows.json"
    done = run(
        *(sys.executable, f"benchmarks/{script}", *words),
        *("--quick", f"--json={rows}", *options),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(rows.read_text()), done.stdout


@pytest.mark.benchmarks
@pytest.mark.parametrize("command", QUICK)
def test_quick_run_prints_and_writes_rows_and_plot(command, tmp_path):
    plot = tmp_path / "plot.png"
    options = [f"--plot={plot}"] * (command in PLOTTING)
    rows, printed = quick_rows(command, tmp_path, *options)
    assert rows
    for row in rows:
        assert row.keys() == ROW
        assert 0 <= row["min"] <= row["median"] <= row["max"]
        assert row["what"] in printed
    if options:
        with Image.open(plot) as picture:
            assert picture.format == "PNG"


@pytest.mark.benchmarks
def test_features_of_five_digits_help_to_learn_five_others(tmp_path):
    (scratch, transferred), _ = quick_rows("accuracy.py transfer", tmp_path)
    assert scratch["what"].startswith("from scratch")
    assert transferred["what"].startswith("transferred")
    assert 70 < scratch["median"] < transferred["median"]


@pytest.mark.benchmarks
def test_pytorch_twin_has_the_same_losses(tmp_path):
    pytest.importorskip("torch")
    rows, _ = quick_rows("torch_twin.py", tmp_path)
    differences = [row["median"] for row in rows if row["unit"] == "nats"]
    assert len(differences) == 3 and max(differences) < 1e-4
    ours, theirs = (row["median"] for row in rows if row["unit"] == "%")
    assert abs(ours - theirs) < 2


@pytest.mark.plan
@pytest.mark.long
def test_our_compiled_step_moves_fewer_bytes_than_plain_flax_s(tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda12")
    rows, _ = quick_rows("compiled.py", tmp_path)
    moved = {row["what"].split(",")[0]: row["median"] for row in rows if row["unit"] == "GB moved"}
    assert 0 < moved["ours"] < moved["plain Flax"]


@pytest.mark.parametrize("name", accuracy.EXPERIMENTS)
def test_fields_of_experiments_exist(name):
    config, cases, common, _, _ = accuracy.EXPERIMENTS[name]
    for case in cases:
        changes = accuracy.fields(f"{common} {case}")
        loaded = configs.load(str(ROOT / f"configs/{config}.py"), list(changes.items()))
        assert loaded.num_epochs == int(changes.get("num_epochs", loaded.num_epochs))


def test_accuracy_summarizes_the_last_epoch_and_those_asked_for():
    def line(epoch, top1):
        return {"split": "eval", "epoch": epoch, "top1": top1}

    waits = [{"split": "train", "epoch": 1.5, "data_wait": wait} for wait in (0.01, 0.02, 0.06)]
    runs = [
        [line(1.0, 0.25), *waits[:2], line(2.0, 0.5), line(3.0, 0.75)],
        [line(1.0, 0.5), waits[2], line(2.0, 0.25), line(3.0, 1.0)],
    ]
    first, last, wait, seconds = accuracy.summarize("digits", [1], runs, [10.0, 30.0])
    assert (first["what"], first["min"], first["max"]) == ("digits: top-1 after epoch 1", 25, 50)
    assert (last["what"], last["median"]) == ("digits: top-1 after epoch 3", 87.5)
    assert (wait["median"], wait["max"]) == (2.0, 6.0)
    assert (seconds["median"], seconds["unit"]) == (20.0, "s")


def test_ratio_is_the_median_of_the_rounds_ratios():
    row = harness.ratio("ours / theirs", [2.0, 3.0, 40.0], [1.0, 2.0, 10.0])
    assert (row["median"], row["min"], row["max"]) == (2.0, 1.5, 4.0)


def test_code_lines_excludes_blank_lines_comments_and_docstrings():
    source = [
        '"""Docstring of the module,',
        'in two lines."""',
        "",
        "# why",
        "def double(number):  # code",
        '    """Docstring of the function."""',
        "    return (",
        "        2 * number",
        "    )",
        'TEXT = """no',
        'docstring"""',
    ]
    assert lines.code_lines("\n".join(source) + "\n") == 6


def test_photographs_have_the_size_of_imagenet_files():
    files = photographs.jpegs(60)
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    assert all(picture.format == "JPEG" and picture.mode == "RGB" for picture in pictures)
    sizes = [picture.size for picture in pictures]
    assert sizes.count((500, 375)) == 48
    assert sizes.count((375, 500)) == 12
    assert 105_000 < np.mean([len(file) for file in files]) < 115_000
    assert len(set(files)) == 60


def test_photographs_depend_on_the_seed_only():
    assert photographs.jpegs(4, seed=3) == photographs.jpegs(4, seed=3)
    assert photographs.jpegs(4, seed=3) != photographs.jpegs(4, seed=4)


def test_folder_repeats_photographs_beyond_the_pool(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "POOL", 3)
    photographs.write_folder(tmp_path, {"train": 5, "val": 2}, classes=2)
    files = {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*.jpg")}
    assert sorted(files) == [
        *("train/class0/000000.jpg", "train/class0/000002.jpg", "train/class0/000004.jpg"),
        *("train/class1/000001.jpg", "train/class1/000003.jpg"),
        *("val/class0/000000.jpg", "val/class1/000001.jpg"),
    ]
    assert files["train/class1/000003.jpg"] == files["train/class0/000000.jpg"]
    assert files["train/class1/000003.jpg"] != files["train/class1/000001.jpg"]
