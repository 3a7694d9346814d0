"""Converting .caffemodel files: same outputs as Caffe's layers, computed with PyTorch."""

import shutil

import caffemodel
import foreign
import numpy as np
import pytest

from alexnet_jax import inference
from alexnet_jax.utils.errors import UserError
from alexnet_jax.weights import caffe, programs

VARIANTS = {"bvlc_alexnet": "paper", "bvlc_reference_caffenet": "caffenet"}
BLUE_GREEN_RED = (104.0069879317889, 116.66876761696767, 122.6789143406786)


def mean_image() -> np.ndarray:
    """Returns float32[3, 256, 256], BGR, with different values in all pixels and channels."""
    y, x = np.mgrid[:256, :256] / 256
    return np.stack([80 + 30 * y * x, 110 + 20 * y, 140 + 30 * x]).astype(np.float32)


def caffe_log_probs(
    name: str, weights: foreign.Weights, mean: np.ndarray, k: float = 1.0
) -> np.ndarray:
    """Returns the log-probabilities of the photographs from the layers of deploy.prototxt.

    Args:
      mean: [3, 256, 256] or [3, 1, 1], BGR.
      k: of LRN; Caffe's is 1.
    """
    import torch

    F = torch.nn.functional
    images = foreign.photographs()[..., ::-1].transpose(0, 3, 1, 2) - mean
    x = torch.tensor(images[:, :, 14:241, 14:241].astype(np.float32))
    tensors = {layer: list(map(torch.tensor, pair)) for layer, pair in weights.items()}

    def norm_and_pool(x):
        norms = [
            lambda x: F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=k),
            lambda x: F.max_pool2d(x, 3, 2),
        ]
        for layer in norms if name == "bvlc_alexnet" else reversed(norms):
            x = layer(x)
        return x

    x = norm_and_pool(F.relu(F.conv2d(x, *tensors["conv1"], stride=4)))
    x = norm_and_pool(F.relu(F.conv2d(x, *tensors["conv2"], padding=2, groups=2)))
    for layer, groups in (("conv3", 1), ("conv4", 2), ("conv5", 2)):
        x = F.relu(F.conv2d(x, *tensors[layer], padding=1, groups=groups))
    x = F.max_pool2d(x, 3, 2).flatten(1)
    for layer in ("fc6", "fc7"):
        x = F.relu(F.linear(x, *tensors[layer]))
    return torch.log_softmax(F.linear(x, *tensors["fc8"]), 1).numpy()


@pytest.mark.torch
@pytest.mark.parametrize("name", VARIANTS)
def test_log_probabilities_match_pytorch(name, tmp_path):
    pytest.importorskip("torch")
    weights = foreign.random_weights("towers", bias=3.0)
    source, workdir = tmp_path / f"{name}.caffemodel", tmp_path / "run"
    source.write_bytes(caffemodel.net(name, weights, v1=name == "bvlc_alexnet"))
    options, mean = [], np.reshape(BLUE_GREEN_RED, (3, 1, 1))
    if name == "bvlc_alexnet":
        mean = mean_image()
        (tmp_path / "mean.binaryproto").write_bytes(caffemodel.blob(mean, old=True))
        options = ["--mean", tmp_path / "mean.binaryproto"]
    printed = foreign.run_convert(source, workdir, *options)
    assert f"variant {VARIANTS[name]}, 7 classes, crops of 227 pixels" in printed
    expected = caffe_log_probs(name, weights, mean)
    assert foreign.relative_error(foreign.log_probs(inference.load(workdir)), expected) < 1e-4
    # LRN has a strong effect on these weights, so the test would notice an unconverted k.
    assert foreign.relative_error(caffe_log_probs(name, weights, mean, k=2.0), expected) > 0.03
    shutil.rmtree(workdir)


@pytest.mark.parametrize("old", [True, False], ids=["of 2014", "later"])
@pytest.mark.parametrize("double", [False, True], ids=["float", "double"])
def test_read_accepts_both_formats_both_precisions_and_a_renamed_fc8(tmp_path, old, double):
    weights, path = foreign.tiny_weights(), tmp_path / "a.caffemodel"
    name, renamed = "bvlc_reference_caffenet", {"fc8": "fc8_flickr"}
    path.write_bytes(caffemodel.net(name, weights, v1=old, rename=renamed, double=double))
    variant, actual = caffe.read(path)
    assert variant == "caffenet"
    weight, bias = weights["conv1"]
    weights["conv1"] = weight[:, ::-1], bias  # BGR to RGB
    for layer, pair in weights.items():
        for array, expected in zip(actual[layer], pair, strict=True):
            np.testing.assert_array_equal(array, expected)


def net(name: str = "bvlc_alexnet", without: str = "", **others) -> bytes:
    weights = foreign.tiny_weights()
    weights.pop(without, None)
    return caffemodel.net(name, weights, **others)


@pytest.mark.parametrize("v1", [True, False], ids=["2014", "later"])
def test_file_is_known_by_its_content(tmp_path, v1):
    path = tmp_path / "download"
    path.write_bytes(net(v1=v1))
    assert programs.program_of(path) is programs.CAFFE


FAULTS = {
    "cannot be read as Caffe's protobuf": lambda: net()[:-10],
    r"neither bvlc_alexnet nor bvlc_reference_caffenet: it has 0 layers": lambda: b"",
    "it has 7 layers with weights and 2 with LRN": lambda: net(without="fc7"),
    "norm1 in .* has k 2; in .* it is 1": lambda: net(lrn=caffemodel.LRN | {5: 2.0}),
    "norm1 in .* has local_size 3": lambda: net(lrn=caffemodel.LRN | {1: 3}),
    r"conv1 in .* has shape \[4\] instead of 4 axes": lambda: caffemodel.net(
        "bvlc_alexnet",
        foreign.tiny_weights() | {"conv1": (np.ones(4, np.float32), np.ones(2, np.float32))},
        v1=False,
    ),
    r"the weight of conv1 has shape \[2, 2, 2, 2\], .* paper it is \[96, 3, 11, 11\]": net,
}


@pytest.mark.parametrize("message", FAULTS)
def test_file_of_another_network_is_rejected(tmp_path, message):
    path = tmp_path / "a.caffemodel"
    path.write_bytes(FAULTS[message]())
    foreign.assert_rejected(message, path)


def test_mean_image_is_the_same_from_npy_and_binaryproto(tmp_path):
    np.save(tmp_path / "mean.npy", mean_image())
    (tmp_path / "mean.binaryproto").write_bytes(caffemodel.blob(mean_image()))
    for name in ("mean.npy", "mean.binaryproto"):
        mean = programs.read_mean(tmp_path / name, programs.CAFFE)
        assert mean.dtype == np.float32
        np.testing.assert_array_equal(mean, mean_image()[::-1].transpose(1, 2, 0))


def test_mean_can_be_one_value_per_channel(tmp_path):
    np.save(tmp_path / "mean.npy", np.array(BLUE_GREEN_RED))
    mean = programs.read_mean(tmp_path / "mean.npy", programs.CAFFE)
    np.testing.assert_array_equal(mean, np.float32(BLUE_GREEN_RED[::-1]))


def blob_of_terabytes() -> bytes:
    """Returns a BlobProto that claims 2**40 channels and has 16 numbers."""
    return caffemodel.message({1: 1, 2: 2**40, 3: 256, 4: 256}) + caffemodel.field(5, bytes(64))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"\x93NUMPY", "cannot be read as a .npy file"),
        ("a.binaryproto", b"\x2a", "cannot be read as Caffe's protobuf"),
        (
            "a.binaryproto",
            blob_of_terabytes(),
            "64 bytes, .* not match its shape .*1099511627776",
        ),
        ("a.binaryproto", caffemodel.blob(mean_image()[:, :9]), r"an array of shape \[3, 9, 256\]"),
        ("a.binaryproto", caffemodel.blob(-mean_image()), "from 0 to 255"),
        ("missing.npy", None, "cannot be read as a .npy file"),
        ("missing.binaryproto", None, "No such file"),
    ],
)
def test_file_without_a_valid_mean_is_rejected(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        programs.read_mean(tmp_path / name, programs.CAFFE)
