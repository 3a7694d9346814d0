"""Exporting networks: the files compute the same probabilities without this package."""

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
from alexnet_jax import export, inference
from alexnet_jax.analysis import targets
from alexnet_jax.data.augment import Statistics
from alexnet_jax.models.alexnet import VARIANTS
from alexnet_jax.models.build import build_model
from alexnet_jax.utils.errors import UserError

PROGRAM_WITHOUT_PACKAGE = """
import json, sys
import numpy as np
sys.modules["alexnet_jax"] = sys.modules["flax"] = None  # importing them fails
import jax
program = jax.export.deserialize(bytearray(open("digits.jaxexport", "rb").read()))
images = np.load("images.npy")
outputs = [program.call(images[:1]), jax.jit(program.call)(images[:3])]
assert not [name for name in sys.modules if name.startswith(("alexnet_jax.", "flax."))]
np.savez("outputs.npz", one=outputs[0], three=outputs[1])
names = json.load(open("digits.jaxexport.json"))["class_names"]
print(*(names[best] for best in np.argmax(outputs[1], 1)))
"""


@pytest.fixture(scope="module")
def images(digit_stores):
    """Digits of the test split, uint8[3, 72, 72, 3]."""
    return digit_stores["eval"].read(np.arange(3))["image"]


def random_network(variant, crop=64, width=0.1):
    """Returns an untrained network whose statistics have an effect."""
    settings = {"model.variant": variant, "model.width": str(width)}
    config = configs.load("configs/quickstart.py", settings.items())
    config.augment.crop_size = crop
    config.augment.channel_scale = (1.0, 0.5, 2.0)
    model = build_model(config)
    variables = dict(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, crop, crop, 3))))
    variables["params"]["fc8"]["kernel"] *= 0.1  # so that the softmax does not saturate
    rng = np.random.default_rng(0)
    variables["batch_stats"] = jax.tree.map(
        lambda x: rng.uniform(0.5, 2.0, x.shape).astype(np.float32),
        variables.get("batch_stats", {}),
    )
    stats = Statistics(rng.uniform(0, 255, (72, 72, 3)).astype(np.float32), np.eye(3))
    return inference.Trained(config, model, variables, stats, tuple("0123456789"), 7)


def expected(network, images, views="center"):
    """Returns the network's probabilities, computed with its parameters as arguments."""
    log_probs = jax.jit(functools.partial(inference.log_probs, network, views))
    return np.exp(log_probs(network.variables, images))


def run(capsys, *words):
    with pytest.raises(SystemExit) as exited:
        export.main([str(word) for word in words])
    return exited.value.code, *capsys.readouterr()


def test_program_runs_without_this_package(trained_run, images, tmp_path):
    done = commands.run(
        *(sys.executable, "-m", "alexnet_jax.export", trained_run, tmp_path / "digits.jaxexport")
    )
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    np.save(tmp_path / "images.npy", images)
    other = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM_WITHOUT_PACKAGE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert other.returncode == 0, other.stderr
    probabilities = np.exp(inference.classifier(inference.load(trained_run))(images))
    outputs = np.load(tmp_path / "outputs.npz")
    np.testing.assert_allclose(outputs["one"], probabilities[:1], atol=1e-5)
    np.testing.assert_allclose(outputs["three"], probabilities, atol=1e-5)
    assert outputs["three"].dtype == np.float32
    assert other.stdout.split() == [str(best) for best in probabilities.argmax(1)]
    description = json.loads((tmp_path / "digits.jaxexport.json").read_text())
    assert description["input"]["shape"] == ["batch", 72, 72, 3]
    assert description["input"]["dtype"] == "uint8"
    assert description["output"]["shape"] == ["batch", 10]
    assert description["platforms"] == ["cpu", "cuda", "tpu"] and description["views"] == "center"
    assert sorted(p.name for p in tmp_path.iterdir() if "digits" in p.name) == [
        *("digits.jaxexport", "digits.jaxexport.json")
    ]


# The wide one uses Winograd's algorithm on CPU.
@pytest.mark.parametrize(("variant", "width"), [*((v, 0.1) for v in VARIANTS), ("single", 0.2)])
def test_program_of_every_variant_matches(variant, width, images):
    network = random_network(variant, width=width)
    program = jax.export.deserialize(export.program(network, "center", ("cpu",)).serialize())
    actual = np.asarray(program.call(images))
    np.testing.assert_allclose(actual, expected(network, images), atol=1e-5)
    assert np.ptp(actual, axis=0).max() > 1e-4  # the output depends on the images


def test_program_with_ten_views_matches(images):
    network = random_network("original")
    actual = np.asarray(export.program(network, "ten", ("cpu",)).call(images))
    np.testing.assert_allclose(actual, expected(network, images, "ten"), atol=1e-5)
    assert np.abs(actual - expected(network, images)).max() > 1e-4


@pytest.mark.parametrize(("platform", "pooling"), [("cuda", 0), ("tpu", 3)])
def test_program_for_other_platforms_matches(platform, pooling, images):
    """The program for another platform can run on the CPU: it has no custom calls."""
    network = random_network("original")
    lowered = jax.export.export(
        jax.jit(export.probabilities(network, "center")),
        platforms=[platform],
        disabled_checks=[jax.export.DisabledSafetyCheck.platform()],
    )(jax.ShapeDtypeStruct(images.shape, jnp.uint8))
    assert operations(lowered, "convolution") == 5
    assert operations(lowered, "reduce_window") == pooling
    assert operations(lowered, "custom_call") == 0
    np.testing.assert_allclose(lowered.call(images), expected(network, images), atol=1e-5)


def test_program_has_the_parameters_once_and_the_operations_of_each_platform(images):
    network = random_network("original")
    program = export.program(network, "center", export.PLATFORMS)
    assert operations(program, "reduce_window") >= 3  # for TPU
    # The compiler for the CPU sees only the CPU's operations.
    compiled = jax.jit(program.call).lower(images).compile().as_text()
    assert "reduce-window" not in compiled and " conditional(" not in compiled
    kernels = sum(x.nbytes for x in jax.tree.leaves(network.variables))
    assert kernels < len(program.serialize()) < 1.2 * kernels


@pytest.mark.plan
def test_program_compiles_for_tpu(images):
    pytest.importorskip("libtpu")
    program = export.program(random_network("original"), "center", export.PLATFORMS)
    _, (chip, *_) = targets.topology_devices("v5e:2x2")
    on_chip = jax.sharding.SingleDeviceSharding(chip)
    like = jax.ShapeDtypeStruct(images.shape, images.dtype, sharding=on_chip)
    lowered = jax.jit(program.call).trace(like).lower(lowering_platforms=("tpu",))
    assert " convolution(" in lowered.compile().as_text()


def operations(exported, name):
    return exported.mlir_module().count(f"stablehlo.{name}")


def test_program_rejects_images_of_another_shape_or_dtype(images):
    program = export.program(random_network("owt"), "center", ("cpu",))
    with pytest.raises(ValueError, match="72"):
        program.call(images[:, :64])
    with pytest.raises(ValueError, match="uint8"):
        program.call(images.astype(np.float32))


@pytest.mark.parametrize("variant", ["paper", "bn"])
def test_network_can_be_rebuilt_from_safetensors(variant, images, tmp_path):
    network = random_network(variant)
    file = tmp_path / "network.SAFETENSORS"
    assert export.export(network, file) == [file]
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert arrays["conv1.kernel"].shape == (11, 11, 3, 8)
    assert ("bn1.mean" in arrays) == (variant == "bn")
    variables = {"params": {}, "batch_stats": {}}
    for name, x in arrays.items():
        layer, leaf = name.split(".")
        if layer != "statistics":
            kind = "batch_stats" if leaf in ("mean", "var") else "params"
            variables[kind].setdefault(layer, {})[leaf] = x
    config = configs.from_saved(json.loads(metadata["config"]), str(file))
    stats = Statistics(arrays["statistics.mean"], arrays["statistics.noise_basis"])
    names = tuple(json.loads(metadata["class_names"]))
    rebuilt = inference.Trained(
        config, build_model(config), variables, stats, names, int(metadata["step"])
    )
    assert names == network.class_names and rebuilt.step == 7 and metadata["variant"] == variant
    np.testing.assert_array_equal(expected(rebuilt, images), expected(network, images))


REJECTED = {
    "must end in .jaxexport, .onnx, .safetensors": ["net.pt"],
    "is a folder": ["folder.onnx"],
    "'rocm' is not one of cpu, cuda, tpu": ["net.jaxexport", "--platforms", "cpu,rocm"],
    "--platforms applies to .jaxexport": ["net.safetensors", "--platforms", "cpu"],
    "omit --views": ["net.safetensors", "--views", "ten"],
    "no checkpoint of step 7": ["net.safetensors", "--step", "7"],
}


@pytest.mark.parametrize("message", REJECTED)
def test_invalid_arguments_are_rejected_in_one_line(message, trained_run, tmp_path, capsys):
    (tmp_path / "folder.onnx").mkdir()
    file, *options = REJECTED[message]
    code, out, err = run(capsys, trained_run, tmp_path / file, *options)
    assert code == 2 and message in err and err.count("\n") == 1 and not out
    assert [p.name for p in tmp_path.iterdir()] == ["folder.onnx"]


def test_full_disk_keeps_the_existing_files(trained_run, tmp_path):
    network = inference.load(trained_run)
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


@pytest.mark.skipif(
    importlib.util.find_spec("jax2onnx") is not None, reason="jax2onnx is installed"
)
def test_missing_converter_is_named(trained_run, tmp_path, capsys):
    code, _, err = run(capsys, trained_run, tmp_path / "net.onnx")
    assert code == 2 and "pip install --no-deps -r requirements-export.txt" in err


ONNX = [(variant, "center", 64) for variant in VARIANTS]
ONNX += [("caffenet", "center", 67)]  # pooling rounds up
ONNX += [pytest.param("single", "ten", 64, marks=pytest.mark.long)]


@pytest.mark.onnx
@pytest.mark.parametrize(("variant", "views", "crop"), ONNX)
def test_onnx_matches_in_onnxruntime(variant, views, crop, images, tmp_path):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    network = random_network(variant, crop)
    network.config.model.dtype = "bfloat16"  # of training; the file computes in float32
    bfloat16 = network._replace(model=network.model.clone(dtype="bfloat16"))
    export.export(bfloat16, tmp_path / "net.onnx", views)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    probabilities = expected(network, images, views)
    for batch in (1, 3):
        (actual,) = session.run(["probabilities"], {"images": images[:batch]})
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, probabilities[:batch], atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list("0123456789")
    assert metadata["variant"] == variant and metadata["views"] == views


@pytest.mark.onnx
def test_command_writes_onnx(trained_run, images, tmp_path):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "net.onnx"
    done = commands.run(sys.executable, "-m", "alexnet_jax.export", trained_run, file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {file}")
    (actual,) = onnxruntime.InferenceSession(file).run(None, {"images": images})
    np.testing.assert_allclose(actual, expected(inference.load(trained_run), images), atol=1e-5)
