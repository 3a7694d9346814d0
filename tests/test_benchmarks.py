"""The photographs that benchmarks read, and that benchmarks run and write what they found."""

import io
import json
import os
import re
import shlex
import sys

import numpy as np
import pytest
from commands import ROOT, run
from PIL import Image

from alexnet_jax import config as configs
from benchmarks import photographs

sys.path.append(str(ROOT / "benchmarks"))  # as for who runs them

import accuracy  # noqa: E402
import figures  # noqa: E402
import lines  # noqa: E402
import other_figures  # noqa: E402
import results_page  # noqa: E402

BENCHMARKS = (
    *("input_pipeline.py", "preparation.py", "crops.py"),
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


@pytest.mark.slow
def test_features_of_five_digits_help_to_learn_five_others(tmp_path):
    """`transfer.py` has them at more rates and draws, and at larger images."""
    done = run(sys.executable, "benchmarks/transfer.py", "--quick", f"--json={tmp_path}/rows")
    assert done.returncode == 0, done.stderr
    scratch, transferred = json.loads((tmp_path / "rows").read_text())
    assert scratch["what"].startswith("from scratch") and scratch.keys() >= ROW
    assert transferred["what"].startswith("transferred")
    assert 70 < scratch["value"] < transferred["value"]


@pytest.mark.slow
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


RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
BY_NAME = {entry.name: entry for entry in figures.ENTRIES}


@pytest.mark.parametrize("entry", figures.ENTRIES, ids=BY_NAME)
def test_every_entry_names_a_script_and_options_that_exist(entry):
    script, *words = shlex.split(entry.command)
    known = (ROOT / script).read_text() + (ROOT / "benchmarks" / "rows.py").read_text()
    for option in ("--json", "--quick", *(word for word in words if word.startswith("--"))):
        assert f'"{option}"' in known
    if script.endswith("accuracy.py"):
        args = accuracy.parser().parse_args(words)
        for case in args.case or [""]:
            assert configs.load(str(ROOT / args.config), accuracy.overrides(args.common, case))


def test_every_page_that_claims_figures_exists():
    assert len(BY_NAME) == len(figures.ENTRIES)
    for told in (*figures.ENTRIES, *other_figures.OTHERS):
        assert all((ROOT / page).is_file() for page in told.pages), told


def test_the_results_page_is_that_of_the_rows_that_are_there():
    assert PAGE.read_text() == results_page.page(RESULTS)


def test_rows_are_of_a_whole_run_of_an_entrys_command():
    for path in RESULTS.glob("*"):
        result = json.loads(path.read_text())
        assert result["command"] == BY_NAME[path.stem].command
        assert result["rows"] and all(row.keys() >= ROW for row in result["rows"])


@pytest.mark.slow
def test_an_entry_that_fails_is_told_and_the_others_go_on(tmp_path):
    """No platform of JAX has that name; shuffling does without a device."""
    earlier = tmp_path / "crops.json"
    rows = [dict.fromkeys(ROW, 7) | {"what": "an earlier run"}]
    made = {"command": "benchmarks/crops.py", "seconds": 60, **results_page.circumstances()}
    earlier.write_text(json.dumps(made | {"rows": rows}))
    done = run(
        *(sys.executable, "benchmarks/all.py", "--quick", f"--out={tmp_path}"),
        *("--only", "crops", "store_scale"),
        env=os.environ | {"JAX_PLATFORMS": "abacus"},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "crops: failed with exit code 1"
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path}/results.md"
    assert json.loads(earlier.read_text())["rows"] == rows
    found = json.loads((tmp_path / "store_scale.json").read_text())
    assert found["machine"]["cores"] == os.cpu_count()
    page = (tmp_path / "results.md").read_text()
    for row in [*rows, *found["rows"]]:
        assert re.search(rf"^\| {row['what']} \|.* {row['unit']} \|$", page, re.M)
    assert not re.search("^- (crops|store_scale):", page, re.M)
    assert re.search("^- quickstart: `python benchmarks/accuracy.py ", page, re.M)


def test_accuracy_tells_the_last_epoch_and_those_asked_for():
    def line(epoch, top1):
        return {"split": "eval", "epoch": epoch, "top1": top1}

    waits = [{"split": "train", "epoch": 1.5, "data_wait": wait} for wait in (0.01, 0.02, 0.06)]
    runs = [
        ([line(1.0, 0.25), *waits[:2], line(2.0, 0.5), line(3.0, 0.75)], 10.0),
        ([line(1.0, 0.5), waits[2], line(2.0, 0.25), line(3.0, 1.0)], 30.0),
    ]
    first, last, wait, seconds = accuracy.rows_of("digits", 64, [1], runs)
    assert (first["what"], first["min"], first["max"]) == ("digits: top-1 after epoch 1", 25, 50)
    assert (last["what"], last["value"]) == ("digits: top-1 after epoch 3", 87.5)
    assert (wait["value"], wait["max"]) == (2.0, 6.0)
    assert (seconds["value"], seconds["unit"]) == (20.0, "s")


def test_lines_of_code_are_neither_blank_nor_comments_nor_docstrings():
    source = [
        '"""Of the module,',
        'in two lines."""',
        "",
        "# why",
        "def double(number):  # code",
        '    """Of the function."""',
        "    return (",
        "        2 * number",
        "    )",
        'TEXT = """no',
        'docstring"""',
    ]
    assert lines.code_lines("\n".join(source) + "\n") == 6
    assert lines.total({ROOT / "configs" / "imagenet.py"}) > 10
