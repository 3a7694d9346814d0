"""Converting torchvision's alexnet to a workdir and back: same bits, same logits."""

import argparse
import pathlib
import shutil
import zipfile

import commands
import foreign
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from alexnet_jax import convert, inference
from alexnet_jax.config import default_config
from alexnet_jax.data import augment
from alexnet_jax.models.build import build_model
from alexnet_jax.utils.errors import UserError
from alexnet_jax.weights import programs

MODULES = [f"features.{n}" for n in (0, 3, 6, 8, 10)] + [f"classifier.{n}" for n in (1, 4, 6)]
NO_PYTORCH = "PyTorch is not installed: pip install -r requirements-torch.txt"


def named(weights: foreign.Weights) -> dict[str, np.ndarray]:
    """Returns a state_dict of these weights."""
    return {
        f"{module}.{part}": array
        for module, pair in zip(MODULES, weights.values(), strict=True)
        for part, array in zip(("weight", "bias"), pair, strict=True)
    }


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    return named(foreign.random_weights("owt", bias=0.3))


@pytest.fixture(scope="module")
def workdir(state_dict, tmp_path_factory):
    """A workdir that the command made of the state_dict and of names for its classes."""
    folder = tmp_path_factory.mktemp("torchvision")
    safetensors.numpy.save_file(state_dict, folder / "alexnet.safetensors")
    # As Notepad saves it: with a byte order mark and two characters at the end of a line.
    names = "".join(f"class é{n}\r\n" for n in range(foreign.CLASSES))
    (folder / "names.txt").write_bytes(names.encode("utf-8-sig"))
    result = commands.run_without_extra_prepare(
        f"convert {folder}/alexnet.safetensors {folder}/run --class-names {folder}/names.txt"
    )
    assert "exit code 0" in result.stdout, result.stderr
    assert "variant owt, 7 classes, crops of 224 pixels minus channel means" in result.stdout
    yield folder / "run"
    shutil.rmtree(folder)


def assert_same_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype == np.float32
        np.testing.assert_array_equal(actual[name].view(np.uint32), array.view(np.uint32))


def test_round_trip_through_safetensors_is_exact(state_dict, workdir, tmp_path):
    printed = foreign.run_convert(workdir, tmp_path / "new" / "back.safetensors")
    assert "mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]" in printed
    assert_same_bits(safetensors.numpy.load_file(tmp_path / "new" / "back.safetensors"), state_dict)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["back.safetensors"]
    foreign.run_convert(workdir, tmp_path / "BACK.SAFETENSORS")
    assert programs.program_of(tmp_path / "BACK.SAFETENSORS") is programs.TORCHVISION
    assert_same_bits(dict(safetensors.numpy.load_file(tmp_path / "BACK.SAFETENSORS")), state_dict)


def test_workdir_has_class_names_config_and_parameters(workdir):
    network = inference.load(workdir)
    assert network.class_names == tuple(f"class é{n}" for n in range(foreign.CLASSES))
    assert network.config.model.variant == "owt" and network.config.name == "alexnet"
    assert network.variables["params"]["conv1"]["kernel"].shape == (11, 11, 3, 64)


@pytest.mark.torch
def test_round_trip_through_pytorch_is_exact_and_keeps_the_logits(state_dict, workdir, tmp_path):
    torch = pytest.importorskip("torch", reason=NO_PYTORCH)
    foreign.run_convert(workdir, tmp_path / "back.pth")
    network = torchvision_alexnet(torch)
    loaded = torch.load(tmp_path / "back.pth", weights_only=True)
    network.load_state_dict(loaded)
    assert_same_bits({name: tensor.numpy() for name, tensor in loaded.items()}, state_dict)
    mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])[:, :, None, None]
    converted = inference.load(workdir)
    for crop_size in (224, 100):  # both networks accept any size
        converted.config.augment.crop_size = crop_size
        crop = slice((256 - crop_size) // 2, (256 + crop_size) // 2)
        pixels = torch.tensor(foreign.photographs()[:, crop, crop]).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = network.eval()((pixels / 255 - mean) / std)
        expected = torch.log_softmax(logits, 1).numpy()
        assert foreign.relative_error(foreign.log_probs(converted), expected) < 1e-4


def torchvision_alexnet(torch):
    """Returns torchvision.models.alexnet(num_classes=7), module by module."""
    nn = torch.nn

    class AlexNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
                *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
                *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
                *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
                *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
            )
            self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
            self.classifier = nn.Sequential(
                *(nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), nn.ReLU()),
                *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 7)),
            )

        def forward(self, x):
            return self.classifier(self.avgpool(self.features(x)).flatten(1))

    return AlexNet()


def renamed(state, rename):
    return {rename(name): array for name, array in state.items()}


CHECKPOINTS = {  # what programs save: a file's name, and the content for a state_dict
    "state_dict": ("alexnet.pth", lambda state: state),
    "upper case": ("ALEXNET.PTH", lambda state: state),
    "Hugging Face": ("pytorch_model.bin", lambda state: state),
    "no suffix": ("weights", lambda state: state),
    "pytorch/examples imagenet": (
        "model_best.pth.tar",
        lambda state: {
            "epoch": 90,
            "arch": "alexnet",
            "state_dict": renamed(
                state, lambda name: name.replace("features.", "features.module.")
            ),
            "best_acc1": state["features.0.bias"][0],
            "optimizer": {"state": {0: {"momentum_buffer": state["features.0.bias"]}}},
        },
    ),
    "pytorch/vision references": (
        "model_89.pth",
        lambda state: {
            "model": state,
            "model_ema": {"n_averaged": state["features.0.bias"][0]}
            | renamed(state, "module.{}".format),
            "lr_scheduler": {"last_epoch": 89},
            "args": argparse.Namespace(model="alexnet", lr=0.01),
        },
    ),
    "DataParallel": ("a.pt", lambda state: renamed(state, "module.{}".format)),
    "torch.compile": ("compiled.pth", lambda state: renamed(state, "_orig_mod.{}".format)),
    "both": ("a.pth", lambda state: renamed(state, "_orig_mod.module.{}".format)),
    "Lightning": (
        "last.ckpt",
        lambda state: {"epoch": 1, "state_dict": renamed(state, "model.{}".format)},
    ),
    "under another key": ("a.pth", lambda state: {"acc": 91.0, "net": state}),
    "deeper": ("a.pth", lambda state: {"checkpoint": {"net": renamed(state, "a.b.{}".format)}}),
    "two, of which one has the usual key": (
        "a.pth",
        lambda state: {"ema": {k: 0 * x for k, x in state.items()}, "state_dict": state},
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_other_programs_are_read(tmp_path, zipped, kind):
    torch = pytest.importorskip("torch", reason=NO_PYTORCH)
    name, content = CHECKPOINTS[kind]
    weights = foreign.tiny_weights()
    state = {name: torch.tensor(array) for name, array in named(weights).items()}
    state["features.0.weight"] = state["features.0.weight"].half()
    state["features.3.weight"] = state["features.3.weight"].bfloat16()
    state["features.6.weight"] = torch.nn.Parameter(state["features.6.weight"])
    torch.save(content(state), tmp_path / name, _use_new_zipfile_serialization=zipped)
    program = programs.program_of(tmp_path / name)
    assert program is programs.TORCHVISION
    variant, actual = program.read(tmp_path / name)
    assert variant == "owt"
    for layer, pair in weights.items():
        for array, expected in zip(actual[layer], pair, strict=True):
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, expected)


@pytest.mark.torch
def test_objects_beside_the_state_dict_are_ignored(tmp_path):
    torch = pytest.importorskip("torch", reason=NO_PYTORCH)
    state = {name: torch.tensor(array) for name, array in named(foreign.tiny_weights()).items()}
    others = {"best": np.float64(56.5), "hyper_parameters": {"data": pathlib.PurePosixPath("a/b")}}
    torch.save({"state_dict": state, **others}, tmp_path / "a.ckpt")
    assert programs.TORCHVISION.read(tmp_path / "a.ckpt")[0] == "owt"


@pytest.mark.torch
@pytest.mark.parametrize(
    "kind", ["module", "tensor", "attack", "truncated", "text", "bomb", "nothing", "script"]
)
def test_pth_without_a_state_dict_is_rejected_and_not_executed(tmp_path, kind):
    torch = pytest.importorskip("torch", reason=NO_PYTORCH)
    path, made = tmp_path / "a.pth", tmp_path / "made"

    class Attack:
        def __reduce__(self):
            return open, (str(made), "w")

    content = {
        "module": torch.nn.Linear(2, 2),
        "tensor": torch.ones(2),
        "attack": {"state_dict": Attack()},
        "nothing": {"epoch": 3},
    }
    torch.save(content.get(kind, {}), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    if kind == "bomb":
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data/7", bytes(10**6))
    if kind == "text":
        path.write_text("<html>")
    if kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    foreign.assert_rejected(r"^[^\x1b]*torch\.save[^\x1b]*$", path)
    assert not made.exists()


@pytest.mark.torch
def test_checkpoint_with_several_networks_is_rejected(tmp_path):
    torch = pytest.importorskip("torch", reason=NO_PYTORCH)
    state = {name: torch.tensor(array) for name, array in named(foreign.tiny_weights()).items()}
    torch.save({"student": state, "teacher": {"net": state}}, tmp_path / "a.pth")
    foreign.assert_rejected("several networks, student, teacher.net; write", tmp_path / "a.pth")


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_read_converts_other_precisions_to_float32(tmp_path, kind):
    weights = foreign.tiny_weights()
    arrays = {name: array.astype(kind) for name, array in named(weights).items()}
    save = safetensors.flax.save if kind is ml_dtypes.bfloat16 else safetensors.numpy.save
    arrays = {f"alexnet.{name}": array for name, array in arrays.items()}
    (tmp_path / "model.bin").write_bytes(save(arrays))  # known by its content
    _, actual = programs.program_of(tmp_path / "model.bin").read(tmp_path / "model.bin")
    np.testing.assert_array_equal(actual["fc6"][0], weights["fc6"][0])
    assert actual["fc6"][0].dtype == np.float32


def tiny_file(path, **changes):
    arrays = named(foreign.tiny_weights()) | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    path.write_bytes(safetensors.numpy.save(arrays))


ONE = np.ones(2, np.float32)
FAULTS = {
    "alexnet: it lacks classifier.6.bias; rename": {"classifier.6.bias": None},
    "alexnet: it has features.1.weight; rename": {"features.1.weight": ONE},
    "it has features.2.weight and lacks features.0.bias, features.0.weight; rename": {
        "features.0.weight": None,
        "features.0.bias": None,
        "features.2.weight": ONE,
    },
    "it has model.fc.bias, model.fc.weight and lacks classifier.1.bias, .*, features.8.weight;": {
        **dict.fromkeys(named(foreign.tiny_weights())),
        "model.fc.weight": ONE,
        "model.fc.bias": ONE,
    },
    "features.0.bias in .* has dtype int32": {"features.0.bias": np.ones(2, np.int32)},
    r"the weight of conv1 .* \[2, 2, 2, 2\], .* it is \[64, 3, 11, 11\]": {},
}


@pytest.mark.parametrize("message", FAULTS)
def test_state_dict_of_another_network_is_rejected(tmp_path, message):
    tiny_file(tmp_path / "a.safetensors", **FAULTS[message])
    foreign.assert_rejected(message, tmp_path / "a.safetensors")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_file_is_rejected(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    tiny_file(path)
    path.write_bytes(path.read_bytes()[:kept])
    foreign.assert_rejected("cannot be read as safetensors", path)


def narrow_workdir(folder):
    """Makes a workdir of variant `owt` at a tenth of its width."""
    config = default_config()
    config.model.variant, config.model.width = "owt", 0.1
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        inference.state_shapes(config, build_model(config)).params,
    )
    stats = augment.Statistics(np.zeros(3, np.float32), np.zeros((3, 3), np.float32))
    inference.create(folder / "narrow", config, {"params": params}, stats, ())
    return folder / "narrow"


@pytest.mark.parametrize(
    ("is_workdir", "option", "message"),
    [
        (True, "--mean=m.npy", "apply to a file; omit them"),
        (False, "--step=7", "--step applies to a workdir"),
    ],
)
def test_options_of_the_other_direction_are_rejected(
    is_workdir, option, message, workdir, tmp_path, capsys
):
    source = workdir if is_workdir else tmp_path / "a.safetensors"
    with pytest.raises(SystemExit, match="^2$"):
        convert.main([str(source), str(tmp_path / "b"), option])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_invalid_arguments_are_rejected(workdir, tmp_path):
    source, names = tmp_path / "a.safetensors", tmp_path / "names.txt"
    tiny_file(source)
    names.write_text("one\n")
    foreign.assert_rejected("does not exist", tmp_path / "missing.pth")
    foreign.assert_rejected("neither a workdir .* nor a folder of the 2012", tmp_path)
    for existing in (workdir, names):
        with pytest.raises(UserError, match="exists; choose a new"):
            convert.to_workdir(source, existing)
    with pytest.raises(UserError, match="is not a workdir; convert it to a workdir first"):
        convert.to_workdir(source, tmp_path / "a.pth")
    with pytest.raises(UserError, match="no mean image"):
        convert.to_workdir(source, tmp_path / "new", mean_file=names)
    with pytest.raises(UserError, match="variant owt of width 0.1; torchvision"):
        convert.to_torch(narrow_workdir(tmp_path), tmp_path / "a.pth")
    with pytest.raises(UserError, match="must end in one of .pth .pt .safetensors"):
        convert.to_torch(workdir, tmp_path / "a.onnx")
    with pytest.raises(UserError, match="a.safetensors exists"):
        convert.to_torch(workdir, source)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        convert.to_torch(workdir, tmp_path / "b.safetensors", step=7)
    with pytest.raises(UserError, match="has 1 names, .* for 3 classes"):
        convert.read_class_names(names, 3)
    names.write_bytes(b"\xff")
    with pytest.raises(UserError, match="names.txt cannot be read: .*utf-8"):
        convert.read_class_names(names, 3)
