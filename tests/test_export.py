"""`python -m alexnet_jax.export`: files that hold a network for programs without this package."""

import functools
import importlib.util
import json
import resource
import subprocess
import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from alexnet_jax import config as configs
from alexnet_jax import export
from alexnet_jax import inference as trained
from alexnet_jax.analysis import tpu
from alexnet_jax.data.augment import Statistics
from alexnet_jax.models.alexnet import VARIANTS
from alexnet_jax.training import sharding as parallel
from alexnet_jax.training import train_step as step
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import UserError

STRANGER = """
import json, sys
import numpy as np
sys.modules["alexnet_jax"] = sys.modules["flax"] = None  # importing them fails
import jax
program = jax.export.deserialize(bytearray(open("digits.jaxexport", "rb").read()))
images = np.load("images.npy")
found = [program.call(images[:1]), jax.jit(program.call)(images[:3])]
assert not [name for name in sys.modules if name.startswith(("alexnet_jax.", "flax."))]
np.savez("found.npz", one=found[0], three=found[1])
names = json.load(open("digits.jaxexport.json"))["class_names"]
print(*(names[best] for best in np.argmax(found[1], 1)))
"""


@pytest.fixture(scope="module")
def images(digit_stores):
    """Test digits, uint8[3, 72, 72, 3]."""
    return digit_stores["eval"].read(np.arange(3))["image"]


def random_network(variant, crop=64, width=0.1):
    """An untrained network with statistics that make a difference."""
    settings = {"model.variant": variant, "model.width": str(width)}
    config = configs.load("configs/quickstart.py", settings.items())
    config.augment.crop_size = crop
    config.augment.channel_scale = (1.0, 0.5, 2.0)
    model = parallel.build_model(config)
    state = runtime.run_once(functools.partial(step.init_state, model, config))
    draws = np.random.default_rng(0)
    batch_stats = jax.tree.map(
        lambda x: draws.uniform(0.5, 2.0, x.shape).astype(np.float32), state.batch_stats
    )
    stats = Statistics(draws.uniform(0, 255, (72, 72, 3)).astype(np.float32), np.eye(3))
    variables = {"params": state.params, "batch_stats": batch_stats}
    return trained.Trained(config, model, variables, stats, tuple("0123456789"), 7)


def expected(network, images, views="center"):
    """The network's probabilities, its parameters arguments instead of constants."""
    log_probs = jax.jit(functools.partial(trained.log_probs, network, views))
    return np.exp(log_probs(network.variables, images))


def run(capsys, *words):
    with pytest.raises(SystemExit) as exited:
        export.main([str(word) for word in words])
    return exited.value.code, *capsys.readouterr()


def test_a_program_is_loaded_and_called_without_this_package(trained_run, images, tmp_path):
    done = commands.run(
        *(sys.executable, "-m", "alexnet_jax.export", trained_run, tmp_path / "digits.jaxexport")
    )
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    np.save(tmp_path / "images.npy", images)
    stranger = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER], cwd=tmp_path, capture_output=True, text=True
    )
    assert stranger.returncode == 0, stranger.stderr
    probabilities = np.exp(trained.classifier(trained.load(trained_run))(images))
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["one"], probabilities[:1], atol=1e-5)
    np.testing.assert_allclose(found["three"], probabilities, atol=1e-5)
    assert found["three"].dtype == np.float32
    assert stranger.stdout.split() == [str(best) for best in probabilities.argmax(1)]
    told = json.loads((tmp_path / "digits.jaxexport.json").read_text())
    assert told["input"]["shape"] == ["batch", 72, 72, 3] and told["input"]["dtype"] == "uint8"
    assert told["output"]["shape"] == ["batch", 10]
    assert told["platforms"] == ["cpu", "cuda", "tpu"] and told["views"] == "center"
    assert sorted(p.name for p in tmp_path.iterdir() if "digits" in p.name) == [
        *("digits.jaxexport", "digits.jaxexport.json")
    ]


# The wide one goes by Winograd on CPU.
@pytest.mark.parametrize(("variant", "width"), [*((v, 0.1) for v in VARIANTS), ("single", 0.2)])
def test_every_variant_is_exported(variant, width, images):
    network = random_network(variant, width=width)
    program = jax.export.deserialize(export.program(network, "center", ("cpu",)).serialize())
    found = np.asarray(program.call(images))
    np.testing.assert_allclose(found, expected(network, images), atol=1e-5)
    assert np.ptp(found, axis=0).max() > 1e-4  # it does look at the images


def test_ten_views_are_exported(images):
    network = random_network("original")
    found = np.asarray(export.program(network, "ten", ("cpu",)).call(images))
    np.testing.assert_allclose(found, expected(network, images, "ten"), atol=1e-5)
    assert np.abs(found - expected(network, images)).max() > 1e-4


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_what_other_platforms_get_computes_the_same(platform, images):
    """Run on the CPU, since nothing of it is a platform's own."""
    network = random_network("original")
    lowered = jax.export.export(
        jax.jit(export.probabilities(network, "center")),
        platforms=[platform],
        disabled_checks=[jax.export.DisabledSafetyCheck.platform()],
    )(jax.ShapeDtypeStruct(images.shape, jnp.uint8))
    assert operations(lowered, "convolution") == 5
    assert operations(lowered, "reduce_window") == 3
    assert operations(lowered, "custom_call") == 0
    np.testing.assert_allclose(lowered.call(images), expected(network, images), atol=1e-5)


def test_one_program_has_the_operations_of_each_platform_and_the_parameters_once(images):
    network = random_network("original")
    program = export.program(network, "center", export.PLATFORMS)
    assert operations(program, "reduce_window") >= 3  # for CUDA and TPU: see above
    # … and here the compiler sees the CPU's alone.
    compiled = jax.jit(program.call).lower(images).compile().as_text()
    assert "reduce-window" not in compiled and " conditional(" not in compiled
    kernels = sum(x.nbytes for x in jax.tree.leaves(network.variables))
    assert kernels < len(program.serialize()) < 1.2 * kernels


@pytest.mark.tpu
def test_the_program_compiles_for_a_tpu(images):
    pytest.importorskip("libtpu")
    program = export.program(random_network("original"), "center", export.PLATFORMS)
    _, (chip, *_) = tpu.topology_devices("v5e:2x2")
    there = jax.sharding.SingleDeviceSharding(chip)
    like = jax.ShapeDtypeStruct(images.shape, images.dtype, sharding=there)
    lowered = jax.jit(program.call).trace(like).lower(lowering_platforms=("tpu",))
    assert " convolution(" in lowered.compile().as_text()


def operations(exported, name):
    return exported.mlir_module().count(f"stablehlo.{name}")


def test_a_batch_of_another_shape_or_dtype_is_refused(images):
    program = export.program(random_network("owt"), "center", ("cpu",))
    with pytest.raises(ValueError, match="72"):
        program.call(images[:, :64])
    with pytest.raises(ValueError, match="uint8"):
        program.call(images.astype(np.float32))


@pytest.mark.parametrize("variant", ["paper", "bn"])
def test_a_network_is_made_again_of_its_safetensors(variant, images, tmp_path):
    network = random_network(variant)
    file = tmp_path / "network.safetensors"
    assert export.export(network, file) == [file]
    with safe_open(file, "np") as opened:
        told = opened.metadata()
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found["conv1.kernel"].shape == (11, 11, 3, 8)
    assert ("bn1.mean" in found) == (variant == "bn")
    variables = {"params": {}, "batch_stats": {}}
    for name, x in found.items():
        layer, leaf = name.split(".")
        if layer != "statistics":
            kind = "batch_stats" if leaf in ("mean", "var") else "params"
            variables[kind].setdefault(layer, {})[leaf] = x
    config = configs.from_saved(json.loads(told["config"]), str(file))
    stats = Statistics(found["statistics.mean"], found["statistics.noise_basis"])
    names = tuple(json.loads(told["class_names"]))
    again = trained.Trained(
        config, parallel.build_model(config), variables, stats, names, int(told["step"])
    )
    assert names == network.class_names and again.step == 7 and told["variant"] == variant
    np.testing.assert_array_equal(expected(again, images), expected(network, images))


REFUSED = {
    "must end in .jaxexport, .onnx, .safetensors": ["net.pt"],
    "is a folder": ["folder.onnx"],
    "'rocm' is none of cpu, cuda, tpu": ["net.jaxexport", "--platforms", "cpu,rocm"],
    "--platforms is for a .jaxexport file": ["net.safetensors", "--platforms", "cpu"],
    "leave --views out": ["net.safetensors", "--views", "ten"],
    "no checkpoint of step 7": ["net.safetensors", "--step", "7"],
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(told, trained_run, tmp_path, capsys):
    (tmp_path / "folder.onnx").mkdir()
    file, *options = REFUSED[told]
    code, out, err = run(capsys, trained_run, tmp_path / file, *options)
    assert code == 2 and told in err and err.count("\n") == 1 and not out
    assert [p.name for p in tmp_path.iterdir()] == ["folder.onnx"]


def test_on_a_full_disk_the_file_of_before_stays(trained_run, tmp_path):
    network = trained.load(trained_run)
    before = {"net.jaxexport": b"program", "net.jaxexport.json": b"{}", "net.safetensors": b"old"}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for name in ("net.jaxexport", "net.safetensors"):
            with pytest.raises(UserError, match="file too large; make room or choose another FILE"):
                export.export(network, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.skipif(importlib.util.find_spec("jax2onnx") is not None, reason="it is installed")
def test_the_missing_converter_is_named(trained_run, tmp_path, capsys):
    code, _, err = run(capsys, trained_run, tmp_path / "net.onnx")
    assert code == 2 and "pip install --no-deps -r requirements-export.txt" in err


ONNX = [(variant, "center", 64) for variant in VARIANTS]
ONNX += [("single", "ten", 64), ("caffenet", "center", 67)]  # 67: pooling rounds up


@pytest.mark.onnx
@pytest.mark.parametrize(("variant", "views", "crop"), ONNX)
def test_onnxruntime_finds_the_same_probabilities(variant, views, crop, images, tmp_path):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    network = random_network(variant, crop)
    network.config.model.dtype = "bfloat16"  # in which the network trains, not the file computes
    wide = network._replace(model=network.model.clone(dtype="bfloat16"))
    export.export(wide, tmp_path / "net.onnx", views)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    probabilities = expected(network, images, views)
    for batch in (1, 3):
        (found,) = session.run(["probabilities"], {"images": images[:batch]})
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, probabilities[:batch], atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["class_names"]) == list("0123456789")
    assert told["variant"] == variant and told["views"] == views


@pytest.mark.onnx
def test_the_command_writes_onnx(trained_run, images, tmp_path):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "net.onnx"
    done = commands.run(sys.executable, "-m", "alexnet_jax.export", trained_run, file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {file}")
    (found,) = onnxruntime.InferenceSession(file).run(None, {"images": images})
    np.testing.assert_allclose(found, expected(trained.load(trained_run), images), atol=1e-5)
