"""torchvision's alexnet becomes a workdir and comes back: the same bits, the same logits."""

import shutil
import sys
import zipfile

import commands
import foreign
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from alexnet_jax import convert
from alexnet_jax import inference as trained
from alexnet_jax.config import default_config
from alexnet_jax.data import augment
from alexnet_jax.training import sharding as parallel
from alexnet_jax.training import train_step as step
from alexnet_jax.utils.errors import UserError
from alexnet_jax.weights import torchvision as torch_weights

MODULES = [f"features.{n}" for n in (0, 3, 6, 8, 10)] + [f"classifier.{n}" for n in (1, 4, 6)]
NO_PYTORCH = "PyTorch is not installed: pip install -r requirements-torch.txt"


def named(weights: foreign.Weights) -> dict[str, np.ndarray]:
    """A state_dict of these weights."""
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
    """The state_dict, converted by the command line, with names for its classes."""
    folder = tmp_path_factory.mktemp("torchvision")
    safetensors.numpy.save_file(state_dict, folder / "alexnet.safetensors")
    (folder / "names.txt").write_text("".join(f"class é{n}\n" for n in range(foreign.CLASSES)))
    result = commands.run(
        *(sys.executable, "-m", "alexnet_jax.convert", folder / "alexnet.safetensors"),
        *(folder / "run", "--class-names", folder / "names.txt"),
    )
    assert result.returncode == 0, result.stderr
    assert "holds variant owt, 7 classes, for crops of 224 less the channel means" in result.stdout
    yield folder / "run"
    shutil.rmtree(folder)


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype == np.float32
        np.testing.assert_array_equal(got[name].view(np.uint32), array.view(np.uint32))


def test_there_and_back_by_safetensors_is_exact(state_dict, workdir, tmp_path):
    told = foreign.converted(workdir, tmp_path / "new" / "back.safetensors")
    assert "mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]" in told
    assert_same_bits(safetensors.numpy.load_file(tmp_path / "new" / "back.safetensors"), state_dict)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["back.safetensors"]


def test_the_workdir_holds_what_a_network_of_its_own_would(workdir):
    network = trained.load(workdir)
    assert network.class_names == tuple(f"class é{n}" for n in range(foreign.CLASSES))
    assert network.config.model.variant == "owt" and network.config.name == "alexnet"
    assert network.variables["params"]["conv1"]["kernel"].shape == (11, 11, 3, 64)


@pytest.mark.torch
def test_there_and_back_by_pytorch_is_exact_and_its_logits_are_the_same(
    state_dict, workdir, tmp_path
):
    torch = pytest.importorskip("torch", reason=NO_PYTORCH)
    foreign.converted(workdir, tmp_path / "back.pth")
    network = torchvision_alexnet(torch)
    loaded = torch.load(tmp_path / "back.pth", weights_only=True)
    network.load_state_dict(loaded)
    assert_same_bits({name: tensor.numpy() for name, tensor in loaded.items()}, state_dict)
    pixels = torch.tensor(foreign.photographs()[:, 16:240, 16:240]).permute(0, 3, 1, 2)
    mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])[:, :, None, None]
    with torch.no_grad():
        logits = network.eval()((pixels / 255 - mean) / std)
    want = torch.log_softmax(logits, 1).numpy()
    assert foreign.relative_error(foreign.log_probs(workdir), want) < 1e-4


def torchvision_alexnet(torch):
    """torchvision.models.alexnet(num_classes=7), module by module."""
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


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_what_pytorch_users_have_is_read(tmp_path, zipped, wrapper):
    torch = pytest.importorskip("torch", reason=NO_PYTORCH)
    weights = foreign.tiny_weights()
    content = {f"module.{name}": torch.tensor(array) for name, array in named(weights).items()}
    content["module.features.0.weight"] = content["module.features.0.weight"].half()
    content["module.features.3.weight"] = content["module.features.3.weight"].bfloat16()
    content["module.features.6.weight"] = torch.nn.Parameter(content["module.features.6.weight"])
    content = {wrapper: content, "epoch": 90} if wrapper else content
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    variant, got = torch_weights.read(tmp_path / "a.pth")
    assert variant == "owt"
    for layer, pair in weights.items():
        for array, expected in zip(got[layer], pair, strict=True):
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, expected)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["module", "tensor", "attack", "truncated", "text", "bomb"])
def test_a_pth_that_is_no_state_dict_is_refused_and_not_run(tmp_path, kind):
    torch = pytest.importorskip("torch", reason=NO_PYTORCH)
    path, made = tmp_path / "a.pth", tmp_path / "made"

    class Attack:
        def __reduce__(self):
            return open, (str(made), "w")

    content = {"module": torch.nn.Linear(2, 2), "tensor": torch.ones(2), "attack": Attack()}
    torch.save(content.get(kind, {}), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    if kind == "bomb":
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data/7", bytes(10**6))
    if kind == "text":
        path.write_text("<html>")
    foreign.assert_refused("torch.save", path)
    assert not made.exists()


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(tmp_path, kind):
    weights = foreign.tiny_weights()
    arrays = {name: array.astype(kind) for name, array in named(weights).items()}
    save = safetensors.flax.save if kind is ml_dtypes.bfloat16 else safetensors.numpy.save
    (tmp_path / "a.safetensors").write_bytes(save(arrays))
    _, got = torch_weights.read(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(got["fc6"][0], weights["fc6"][0])
    assert got["fc6"][0].dtype == np.float32


def tiny_file(path, **changes):
    arrays = named(foreign.tiny_weights()) | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    path.write_bytes(safetensors.numpy.save(arrays))


FAULTS = {
    "it has no classifier.6.bias": {"classifier.6.bias": None},
    "which has no features.1.weight": {"features.1.weight": np.ones(2, np.float32)},
    "features.0.bias in .* is of int32": {"features.0.bias": np.ones(2, np.int32)},
    r"the weight of conv1 .* \[2, 2, 2, 2\], .* is \[64, 3, 11, 11\]": {},
}


@pytest.mark.parametrize("told", FAULTS)
def test_another_network_is_refused(tmp_path, told):
    tiny_file(tmp_path / "a.safetensors", **FAULTS[told])
    foreign.assert_refused(told, tmp_path / "a.safetensors")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    tiny_file(path)
    path.write_bytes(path.read_bytes()[:kept])
    foreign.assert_refused("cannot be read as safetensors", path)


def narrow_workdir(folder):
    """Variant `owt` at a tenth of its width, as train.py may leave it."""
    config = default_config()
    config.model.variant, config.model.width = "owt", 0.1
    shapes = jax.eval_shape(lambda: step.init_state(parallel.build_model(config), config))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.params)
    stats = augment.Statistics(np.zeros(3, np.float32), np.zeros((3, 3), np.float32))
    trained.create(folder / "narrow", config, {"params": params}, stats, ())
    return folder / "narrow"


@pytest.mark.parametrize(
    ("of_a_workdir", "option", "told"),
    [
        (True, "--mean=m.npy", "are for a file; leave them out"),
        (False, "--step=7", "--step is for"),
    ],
)
def test_options_of_the_other_direction_are_refused(
    of_a_workdir, option, told, workdir, tmp_path, capsys
):
    source = workdir if of_a_workdir else tmp_path / "a.safetensors"
    with pytest.raises(SystemExit, match="^2$"):
        convert.main([str(source), str(tmp_path / "b"), option])
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_is_told_before_anything_is_read(workdir, tmp_path):
    source, names = tmp_path / "a.safetensors", tmp_path / "names.txt"
    tiny_file(source)
    names.write_text("one\n")
    foreign.assert_refused("does not exist", tmp_path / "missing.pth")
    foreign.assert_refused("neither a workdir, .* nor a folder of the 2012", tmp_path)
    for there, told in ((workdir, "exists; choose a new"), (names, "exists; choose a new")):
        with pytest.raises(UserError, match=told):
            convert.to_workdir(source, there)
    with pytest.raises(UserError, match="is no workdir: convert it into one"):
        convert.to_workdir(source, tmp_path / "a.pth")
    with pytest.raises(UserError, match="no mean image"):
        convert.to_workdir(source, tmp_path / "new", mean_file=names)
    with pytest.raises(UserError, match="variant owt of width 0.1 for crops of 224; torchvision"):
        convert.to_torch(narrow_workdir(tmp_path), tmp_path / "a.pth")
    with pytest.raises(UserError, match="must end in one of .pth .pt .safetensors"):
        convert.to_torch(workdir, tmp_path / "a.onnx")
    with pytest.raises(UserError, match="a.safetensors exists"):
        convert.to_torch(workdir, source)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        convert.to_torch(workdir, tmp_path / "b.safetensors", step=7)
    with pytest.raises(UserError, match="has 1 names, .* but there are 3 classes"):
        convert.read_class_names(names, 3)
    names.write_bytes(b"\xff")
    with pytest.raises(UserError, match="names.txt cannot be read: .*utf-8"):
        convert.read_class_names(names, 3)
