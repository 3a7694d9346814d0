"""torchvision's alexnet: its state_dict, as torch.save or safetensors writes it."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy

from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.files import atomic_write, explain_write_errors
from alexnet_jax.weights.layouts import ChannelsFirst

SUFFIXES = (".pth", ".pt", ".safetensors")

# torchvision.models.alexnet: the convolutions are modules of `features`, the rest of `classifier`.
MODULES = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc6": "classifier.1",
    "fc7": "classifier.4",
    "fc8": "classifier.6",
}
# What its weights were trained with, of pixels from 0 to 1 (torchvision's presets).
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def read(path: Path) -> tuple[str, ChannelsFirst]:
    """Returns variant `owt` and its weights: of a state_dict, or of a dict that holds one.

    Half precision becomes float32 exactly, double precision by rounding.

    Raises UserError if the file cannot be read or is not torchvision's alexnet.
    """
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    arrays = {name.removeprefix("module."): array for name, array in found.items()}
    wanted = {f"{module}.{part}" for module in MODULES.values() for part in ("weight", "bias")}
    if missing := wanted - arrays.keys():
        raise UserError(f"{path} is not of torchvision's alexnet: it has no {min(missing)}")
    if others := arrays.keys() - wanted:
        raise UserError(f"{path} is not of torchvision's alexnet, which has no {min(others)}")
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{name} in {path} is of {array.dtype}; save it as float32")
    floats = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    return "owt", {
        layer: (floats[f"{module}.weight"], floats[f"{module}.bias"])
        for layer, module in MODULES.items()
    }


def write(path: Path, weights: ChannelsFirst) -> None:
    """Writes a state_dict that torchvision's alexnet loads, whole or not at all.

    Raises UserError if the file cannot be written, or PyTorch is missing for a .pth.
    """
    arrays = {
        f"{MODULES[layer]}.{part}": array
        for layer, pair in weights.items()
        for part, array in zip(("weight", "bias"), pair, strict=True)
    }
    content = _encoded(path, arrays)
    with explain_write_errors(path, "another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as new:
            new.write_bytes(content)


def _encoded(path: Path, arrays: dict[str, np.ndarray]) -> bytes | memoryview:
    if path.suffix == ".safetensors":
        return safetensors.numpy.save(arrays, metadata={"format": "pt"})
    torch, buffer = _import_torch(path), io.BytesIO()
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, buffer)
    return buffer.getbuffer()


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return safetensors.flax.load_file(path)  # safetensors.numpy cannot read bfloat16
    except Exception as error:  # of the file system, safetensors, or a type that JAX has not
        raise UserError(f"{path} cannot be read as safetensors: {one_line(error)}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """By PyTorch itself, since there have been three formats of .pth.

    It admits tensors and plain containers alone.
    """
    torch = _import_torch(path)
    try:
        if zipfile.is_zipfile(path) and any(
            m.compress_type for m in zipfile.ZipFile(path).filelist
        ):
            raise ValueError("it is compressed, as torch.save has no file")
        return _floats(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # of pickle, zip, tar or PyTorch
        raise UserError(
            f"{path} cannot be read as a state_dict ({one_line(error)[:100]}); write it again by "
            "torch.save(model.state_dict(), FILE)"
        ) from error


def _floats(content: Any) -> dict[str, np.ndarray]:
    if not isinstance(content, Mapping):
        raise TypeError(f"it holds a {type(content).__name__}")
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    return {
        str(name): (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
        for name, tensor in content.items()
    }


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} takes PyTorch, which is not installed: pip install torch, or use a "
            ".safetensors file"
        ) from error
    return torch
