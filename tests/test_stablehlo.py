"""`export --stablehlo`: the files alone compute what the network and the training step compute."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import config as configs
from alexnet_jax import export
from alexnet_jax.analysis import stablehlo
from alexnet_jax.data.augment import Statistics, make_augment
from alexnet_jax.models.alexnet import VARIANTS
from alexnet_jax.models.build import build_model
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.train_step import build_train_step, init_state

# Compiles a file by JAX's CPU client, with nothing but the file and arrays.
ALONE = """
import sys
import numpy as np
sys.modules["alexnet_jax"] = sys.modules["flax"] = None  # importing them fails
import jax
from jaxlib import _jax
arrays = np.load("inputs.npz")
device = jax.devices("cpu")[0]
program = device.client.compile_and_load(
    open(sys.argv[1]).read(), _jax.DeviceList((device,)), _jax.CompileOptions()
)
found = program.execute_sharded([jax.device_put(arrays[name]) for name in arrays.files])
outputs = [shards[0] for shards in found.disassemble_into_single_device_arrays()]
assert not [name for name in sys.modules if name.startswith(("alexnet_jax.", "flax."))]
np.savez("outputs.npz", *(np.asarray(x) for x in outputs))
"""


def fields(variant, dtype):
    return {
        "model.variant": variant,
        "model.dtype": dtype,
        "model.width": "0.1",
        "batch_size": "4",
    }


def run(capsys, *words):
    with pytest.raises(SystemExit) as exited:
        export.main([str(word) for word in words])
    return exited.value.code or 0, *capsys.readouterr()


def run_alone(folder, file, arrays):
    np.savez(folder / "inputs.npz", *map(np.asarray, arrays))
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, file], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "outputs.npz") as outputs:
        return [outputs[name] for name in outputs.files]


def assert_described(entries, arrays):
    assert [(entry["shape"], entry["dtype"]) for entry in entries] == [
        (list(x.shape), str(x.dtype)) for x in arrays
    ]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("owt", "float32"),
        pytest.param("paper", "bfloat16", marks=pytest.mark.slow),
        *(pytest.param(v, "float32", marks=pytest.mark.long) for v in VARIANTS if v != "owt"),
    ],
)
@pytest.mark.parametrize("what", stablehlo.PROGRAMS)
def test_the_file_alone_computes_the_same(what, variant, dtype, tmp_path, capsys):
    settings = fields(variant, dtype)
    words = [f"--config.{name}={value}" for name, value in settings.items()]
    code, printed, errors = run(
        capsys, "--stablehlo", what, tmp_path / "net.mlir", "--config", "quickstart", *words
    )
    assert code == 0 and printed.count("wrote") == 2, errors
    description = json.loads((tmp_path / "net.mlir.json").read_text())

    config = configs.load("quickstart", settings.items())
    model = build_model(config)
    rng = np.random.default_rng(0)
    if what == "inference":
        x = jnp.asarray(rng.uniform(-1, 1, (4, 64, 64, 3)), jnp.float32)
        variables = jax.jit(model.init)(jax.random.key(0), x)
        arguments = (variables, x)
        want = jax.jit(model.apply)(*arguments)
    else:
        config.augment.mean = "channel"
        statistics = Statistics(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
        steps_per_epoch = stablehlo.IMAGENET / 4
        tx = make_optimizer(config, steps_per_epoch)
        augment = make_augment(config, statistics, steps_per_epoch)
        image = rng.integers(0, 256, (4, 72, 72, 3), np.uint8)
        batch = {"image": image, "label": np.arange(4, dtype=np.int32)}
        arguments = (jax.jit(lambda: init_state(model, tx, 1, (64, 64, 3)))(), batch)
        want = jax.jit(build_train_step(config, model, tx, augment))(*arguments)
    inputs, want = jax.tree.leaves(arguments), jax.tree.leaves(want)
    assert_described(description["arguments"], inputs)
    assert_described(description["results"], want)
    found = run_alone(tmp_path, "net.mlir", inputs)
    names = [entry["name"] for entry in description["results"]]
    for name, ours, theirs in zip(names, want, found, strict=True):
        scale = max(1e-6, float(np.abs(ours).max()))
        tolerance = (1e-4 if dtype == "float32" else 0.05) * scale
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=tolerance, err_msg=name)
    if what == "training":
        assert "state.params.conv1.kernel" in names and names[-1] == "metrics.top5"
    else:
        assert names == ["logits"]


def test_config_and_platform_decide(tmp_path, capsys):
    programs = {}
    for platform in ("cpu", "tpu"):
        words = [f"--config.{name}={value}" for name, value in fields("single", "bfloat16").items()]
        code, _, errors = run(
            capsys,
            *("--stablehlo", "inference", tmp_path / "net.mlir", "--config", "quickstart"),
            *("--platforms", platform, *words),
        )
        assert code == 0, errors
        programs[platform] = (tmp_path / "net.mlir").read_text()
        assert json.loads((tmp_path / "net.mlir.json").read_text())["platform"] == platform
    assert programs["cpu"] != programs["tpu"]
    tpu = programs["tpu"]
    assert len(re.findall(r"stablehlo\.convolution", tpu)) == 5 and "4x15x15x8xbf16" in tpu
    assert len(re.findall(r"stablehlo\.custom_call", tpu)) == 0


def test_a_workdir_gives_its_config(tmp_path, capsys):
    config = configs.load("quickstart", fields("owt", "float32").items())
    (tmp_path / "config.json").write_text(configs.to_json(config))
    code, _, errors = run(capsys, "--stablehlo", "inference", tmp_path, tmp_path / "net.mlir")
    assert code == 0, errors
    description = json.loads((tmp_path / "net.mlir.json").read_text())
    assert description["arguments"][-1]["shape"] == [4, 64, 64, 3]


WRONG = {
    "suffix": "--stablehlo inference net.txt --config quickstart",
    "no program": "net.mlir --config quickstart",
    "no config": "--stablehlo inference net.mlir",
    "both": "--stablehlo inference runs/x net.mlir --config quickstart",
    "platform": "--stablehlo inference net.mlir --config quickstart --platforms gpu",
    "views": "--stablehlo inference net.mlir --config quickstart --views ten",
    "no workdir": "net.onnx",
}
MESSAGES = {
    "suffix": "a FILE that ends in .mlir belong together",
    "no program": "a FILE that ends in .mlir belong together",
    "no config": "needs either a workdir or --config NAME",
    "both": "needs either a workdir or --config NAME",
    "platform": "--platforms gpu must be one of cpu, cuda, tpu",
    "views": "omit --views and --step",
    "no workdir": "name a workdir before net.onnx",
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_sentence(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(capsys, *WRONG[name].split())
    assert code == 2 and errors.count("\n") == 1
    assert MESSAGES[name] in errors and not any(tmp_path.iterdir())
