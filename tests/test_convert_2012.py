"""Converting checkpoints of the 2012 program: same outputs, and no pickle can do harm."""

import collections
import contextlib
import pickle
import shutil
from pathlib import Path

import checkpoint_2012
import foreign
import numpy as np
import pytest
import python2_pickle
from python2_pickle import Called, Global, OldStyle

from alexnet_jax import inference
from alexnet_jax.utils.errors import UserError
from alexnet_jax.weights import cuda_convnet, pickles, programs


@pytest.fixture(scope="module")
def weights() -> foreign.Weights:
    return foreign.random_weights("towers", bias=3.0)


def mean_image() -> np.ndarray:
    """Returns float32[3, 256, 256], RGB."""
    y, x = np.mgrid[:256, :256] / 256
    return np.stack([140 + 30 * x, 110 + 20 * y, 80 + 30 * y * x]).astype(np.float32)


def write(path: Path, content, protocol: int = 2) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(python2_pickle.dumps(content, protocol))
    return path


def log_probs_of_run_145(layers: dict) -> np.ndarray:
    """Returns the log-probabilities of the photographs, from the pickled matrices.

    The towers are computed one by one, as layers-145.cfg lists them.
    """
    import torch

    F = torch.nn.functional

    def weighted(name, *inputs, size=None, **geometry):
        layer, total = layers[name], 0
        for x, matrix in zip(inputs, layer["weights"], strict=True):
            matrix = torch.tensor(np.ascontiguousarray(matrix.T))
            if size:
                kernel = matrix.reshape(len(matrix), -1, size, size)
                total = total + F.conv2d(x, kernel, **geometry)
            else:
                total = total + x.flatten(1) @ matrix.T
        bias = torch.tensor(layer["biases"].ravel())
        return total + (bias[:, None, None] if size else bias)

    def cross_map(x):
        return F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=2.0)

    def within_map(x):
        return x / (1 + 0.001 * F.avg_pool2d(x**2, 5, 1, 2)) ** 0.75

    def pool(x):
        return F.max_pool2d(x, 3, 2)

    images = foreign.photographs().transpose(0, 3, 1, 2) - mean_image()
    x = F.pad(torch.tensor(images[:, :, 16:240, 16:240]), (0, 3, 0, 3))
    outputs = {}
    for t in "ab":
        y = F.relu(pool(cross_map(weighted(f"conv1{t}", x, size=11, stride=4))))
        y = F.relu(weighted(f"conv2{t}", y, size=5, padding=2))
        outputs[t] = pool(within_map(cross_map(y)))
    pool2 = [outputs["a"], outputs["b"]]
    for t in "ab":
        y = F.relu(weighted(f"conv3{t}", *pool2, size=3, padding=1))
        y = F.relu(weighted(f"conv4{t}", y, size=3, padding=1))
        outputs[t] = F.relu(pool(weighted(f"conv5{t}", y, size=3, padding=1)))
    pool3 = [outputs["a"], outputs["b"]]
    hs1 = {t: 0.5 * F.relu(weighted(f"fc2048{t}", *pool3)) for t in "ab"}
    hs2 = [
        0.5 * F.relu(weighted("fc2048ba", hs1["a"], hs1["b"])),
        0.5 * F.relu(weighted("fc2048bb", hs1["b"], hs1["a"])),
    ]
    return torch.log_softmax(weighted("fc1000", *hs2), 1).numpy()


@pytest.mark.torch
def test_log_probabilities_match_pytorch(weights, tmp_path):
    pytest.importorskip("torch")
    content = checkpoint_2012.checkpoint(weights)
    source = write(tmp_path / "ConvNet__2012-09-19_23.29.04" / "91.1000", content)
    meta = {"data_mean": mean_image().reshape(-1, 1).astype("f8"), "num_vis": 196608}
    meta_file = write(tmp_path / "batches.meta", meta)
    printed = foreign.run_convert(source.parent, tmp_path / "run", "--mean", meta_file)
    assert "variant original, 7 classes, crops of 224 pixels minus a mean image" in printed
    expected = log_probs_of_run_145(content["model_state"]["layers"])
    assert (
        foreign.relative_error(foreign.log_probs(inference.load(tmp_path / "run")), expected) < 1e-4
    )
    shutil.rmtree(tmp_path / "run")


def test_read_joins_towers_exactly_for_both_kinds_of_checkpoint(weights, tmp_path):
    content = checkpoint_2012.checkpoint(weights)
    layers = content["model_state"]["layers"]
    names = list(layers)
    older = [
        {**layer, "inputs": [names.index(i) for i in layer.get("inputs", []) if i in names]}
        for layer in layers.values()
    ]
    for number, state in enumerate([layers, older]):
        content["model_state"]["layers"] = state
        variant, actual = cuda_convnet.read(write(tmp_path / f"1.{number}", content))
        assert variant == "original"
        for layer, pair in weights.items():
            for array, expected in zip(actual[layer], pair, strict=True):
                np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("protocol", [0, 1, 2])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["<f4", "<f8", "<i8", "|u1"])
def test_load_reads_arrays_from_every_protocol(tmp_path, protocol, order, kind):
    array = np.arange(250, 262, dtype=np.int32).astype(kind).reshape(3, 4, order=order)
    content = {"name": "\xe9t\xe9", "array": array, "more": [1, 2.5, None, True, (3, 2**40)]}
    actual = pickles.load(write(tmp_path / "a", content, protocol))
    np.testing.assert_array_equal(actual.pop("array").to_numpy(), array)
    del content["array"]
    assert actual == content


def test_objects_of_other_classes_become_inert(tmp_path):
    with_state = ValueError("message")
    with_state.more = "set later"
    filled = (collections.deque([1]), collections.deque([1, 2]), collections.defaultdict(int, a=1))
    for number, value in enumerate([with_state, *filled]):
        path = tmp_path / str(number)
        path.write_bytes(pickle.dumps({"value": value, "after": 1}, protocol=2))
        actual = pickles.load(path)
        assert type(actual["value"]) is pickles.Inert and actual["after"] == 1


def test_read_takes_the_newest_checkpoint_of_a_folder(tmp_path):
    for name in ("9.1300", "90.7", "90.12"):
        write(tmp_path / name, name)
    with pytest.raises(UserError, match="90.12 is not a checkpoint of the 2012 program"):
        cuda_convnet.read(tmp_path)


def tiny(change=lambda layers: None) -> dict:
    content = checkpoint_2012.checkpoint(foreign.tiny_weights())
    change(content["model_state"]["layers"])
    return content


FAULTS = {
    "it has no model_state with layers": lambda: {"model_state": 3},
    "rnorm1a does not have type": lambda: tiny(lambda layers: layers.pop("rnorm1a")),
    "pool1b does not have sizeX 3": lambda: tiny(lambda layers: layers["pool1b"].update(sizeX=2)),
    "conv1a does not have 1 weight matrices": lambda: tiny(lambda layers: layers.pop("conv1a")),
    "an array is missing": lambda: tiny(lambda layers: layers["conv1a"].update(weights=[7])),
    r"conv1a has an array of shape \[1\], not \[48\]": tiny,
}


@pytest.mark.parametrize("message", FAULTS)
def test_checkpoint_of_another_network_is_rejected(tmp_path, message):
    foreign.assert_rejected(message, write(tmp_path / "1.1", FAULTS[message]()))


def test_order_of_towers_is_not_guessed(weights, tmp_path):
    content = checkpoint_2012.checkpoint(weights)
    del content["model_state"]["layers"]["fc2048bb"]["inputs"]
    with pytest.raises(UserError, match="fc2048bb does not have one input from each tower"):
        cuda_convnet.read(write(tmp_path / "1.1", content))


def test_truncated_file_is_rejected(tmp_path):
    path = write(tmp_path / "1.1", tiny())
    path.write_bytes(path.read_bytes()[:-40])
    foreign.assert_rejected("cannot be read as a pickle of arrays", path)


def array_of(shape, kind: str = "f4", content: bytes = b"\0" * 16) -> Called:
    """Returns an array with a state that no array has."""
    dtype = python2_pickle.Dtype(kind)
    call = Called(
        Global("numpy.core.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (0,), "b")
    )
    return python2_pickle.Built(call, (1, shape, dtype, False, content))


@pytest.mark.parametrize(
    "array",
    [
        array_of((2**50, 2**50)),
        array_of((10**30,)),
        array_of((-1, 2)),
        array_of((5,)),
        array_of((3,)),
        array_of("shape"),
        array_of((4,), kind="O8"),
        array_of((4,), kind="V4"),
        array_of((4,), content=[Global("os", "system")] * 4),
        python2_pickle.Built(array_of((4,)), 7),
    ],
    ids=str,
)
def test_array_with_an_invalid_state_is_rejected(tmp_path, array):
    meta = write(tmp_path / "batches.meta", {"data_mean": array})
    with pytest.raises(UserError, match="it has no data_mean"):
        programs.read_mean(meta, programs.CUDA_CONVNET)


def system(module: str, path: Path) -> Called:
    return Called(Global(module, "system"), (f"touch {path}",))


ATTACKS = {
    "os.system": lambda path: system("os", path),
    "posix.system": lambda path: system("posix", path),
    "eval": lambda path: Called(Global("__builtin__", "eval"), (f"open({str(path)!r}, 'w')",)),
    "exec": lambda path: Called(Global("__builtin__", "exec"), (f"open({str(path)!r}, 'w')",)),
    "open": lambda path: Called(Global("io", "open"), (str(path), "w")),
    "numpy.save": lambda path: Called(Global("numpy", "save"), (str(path), [1])),
    "numpy.memmap": lambda path: Called(
        Global("numpy", "memmap"), (str(path), "u1", "w+", 0, (1,))
    ),
    "shutil.copyfile": lambda path: Called(Global("shutil", "copyfile"), (__file__, str(path))),
    "an object's state": lambda path: OldStyle(
        Global("collections", "OrderedDict"), {"a": system("os", path)}
    ),
    "a dict's key": lambda path: {system("os", path): 1},
    "an array's constructor": lambda path: Called(
        Global("numpy.core.multiarray", "_reconstruct"), (system("os", path), (0,), "b")
    ),
    "an array's type": lambda path: Called(Global("numpy", "dtype"), (system("os", path), 0, 1)),
}


@pytest.mark.parametrize("protocol", [0, 2])
@pytest.mark.parametrize("attack", ATTACKS)
def test_pickle_cannot_call_anything(tmp_path, attack, protocol):
    made = tmp_path / "made.npy"
    content = python2_pickle.dumps({"op": ATTACKS[attack](made), "model_state": 3}, protocol)
    with contextlib.suppress(Exception):
        pickle.loads(content)
    assert made.exists()  # the attack works with the standard library
    made.unlink()
    source = tmp_path / "1.1"
    source.write_bytes(content)
    foreign.assert_rejected("is not a checkpoint of the 2012 program", source)
    (tmp_path / "batches.meta").write_bytes(content)
    with pytest.raises(UserError, match="it has no data_mean"):
        programs.read_mean(tmp_path / "batches.meta", programs.CUDA_CONVNET)
    assert not made.exists()


RAW_ATTACKS = {
    "a persistent id": b"Pmade\n.",
    "a function's attributes": b"cnumpy\ndtype\n}U\x08__init__cos\nsystem\nsb.",
    "a class's attributes": b"ccollections\nOrderedDict\n}U\x03getcos\nsystem\nsb.",
    "a memo of 16 GB": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a str of 2 GB": b"\x80\x02T\xff\xff\xff\x7fabc.",
    "bytes of 8 EB": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
}


@pytest.mark.parametrize("attack", RAW_ATTACKS)
def test_opcodes_cannot_change_classes_or_fill_memory(tmp_path, attack):
    source = tmp_path / "1.1"
    source.write_bytes(RAW_ATTACKS[attack])
    foreign.assert_rejected(r"cannot be read as a pickle of arrays|no model_state", source)
    assert pickles.load(write(tmp_path / "after", {"a": 1})) == {"a": 1}
