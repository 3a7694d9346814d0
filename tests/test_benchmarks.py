"""The photographs that benchmarks read, and that benchmarks run and write what they found."""

import io
import json
import sys

import numpy as np
import pytest
from commands import run
from PIL import Image

from benchmarks import photographs

BENCHMARKS = (
    *("input_pipeline.py", "preparation.py", "store_scale.py"),
    *("prefetch_trace.py", "train_step.py", "exported.py", "prediction.py"),
)
PLOTTING = ("input_pipeline.py", "prefetch_trace.py", "train_step.py")
ROW = {"what", "batch", "dtype", "value", "unit", "min", "median", "max"}


def test_photographs_have_the_size_of_imagenet_files():
    files = photographs.jpegs(60)
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    assert all(picture.format == "JPEG" and picture.mode == "RGB" for picture in pictures)
    sizes = [picture.size for picture in pictures]
    assert sizes.count((500, 375)) == 48
    assert sizes.count((375, 500)) == 12
    assert 105_000 < np.mean([len(file) for file in files]) < 115_000
    assert len(set(files)) == 60


def test_photographs_are_the_same_for_the_same_seed():
    assert photographs.jpegs(4, seed=3) == photographs.jpegs(4, seed=3)
    assert photographs.jpegs(4, seed=3) != photographs.jpegs(4, seed=4)


def test_a_folder_repeats_its_photographs_beyond_the_pool(tmp_path, monkeypatch):
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


def test_features_of_five_digits_help_to_learn_five_others(tmp_path):
    """`transfer.py` has them at more rates and draws, and at larger images."""
    done = run(sys.executable, "benchmarks/transfer.py", "--quick", f"--json={tmp_path}/rows")
    assert done.returncode == 0, done.stderr
    scratch, transferred = json.loads((tmp_path / "rows").read_text())
    assert scratch["what"].startswith("from scratch") and scratch.keys() >= ROW
    assert transferred["what"].startswith("transferred")
    assert 70 < scratch["value"] < transferred["value"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_quick_run_prints_a_table_and_writes_its_rows_and_plot(name, tmp_path):
    rows, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    options = ["--quick", f"--json={rows}"] + [f"--plot={plot}"] * (name in PLOTTING)
    done = run(sys.executable, f"benchmarks/{name}", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(rows.read_text())
    assert found
    for row in found:
        assert row.keys() >= ROW
        assert 0 <= row["min"] <= row["median"] <= row["max"]
        assert row["what"] in done.stdout
    if name in PLOTTING:
        with Image.open(plot) as picture:
            assert picture.format == "PNG"
