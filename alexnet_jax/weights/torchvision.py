"""Reads and writes the state_dict of torchvision's alexnet, as .pth or .safetensors files."""

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

# torchvision.models.alexnet: the index of each layer in its two nn.Sequential.
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
# Normalization of torchvision's training (torchvision.transforms.presets), for pixels in [0, 1].
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def read(path: Path) -> tuple[str, ChannelsFirst]:
    """Returns the variant, `owt`, and the weights of a state_dict.

    A state_dict inside a training checkpoint is found under the usual keys. Weights in half
    precision become float32 exactly, those in double precision by rounding.

    Raises:
      UserError: the file cannot be read or is not torchvision's alexnet.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    arrays = {name.removeprefix("module."): array for name, array in content.items()}
    expected = {f"{module}.{part}" for module in MODULES.values() for part in ("weight", "bias")}
    if missing := expected - arrays.keys():
        raise UserError(f"{path} is not torchvision's alexnet: it has no {min(missing)}")
    if unexpected := arrays.keys() - expected:
        raise UserError(f"{path} is not torchvision's alexnet, which has no {min(unexpected)}")
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{name} in {path} has dtype {array.dtype}; save it as float32")
    return "owt", {
        layer: (
            np.asarray(arrays[f"{module}.weight"], np.float32),
            np.asarray(arrays[f"{module}.bias"], np.float32),
        )
        for layer, module in MODULES.items()
    }


def write(path: Path, weights: ChannelsFirst) -> None:
    """Writes a state_dict that torchvision's alexnet loads. The file is complete or absent.

    Raises:
      UserError: the file cannot be written, or PyTorch is not installed and needed for a .pth.
    """
    arrays = {}
    for layer, (weight, bias) in weights.items():
        arrays[f"{MODULES[layer]}.weight"], arrays[f"{MODULES[layer]}.bias"] = weight, bias
    content = _encode(path, arrays)
    with explain_write_errors(path, "another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as new:
            new.write_bytes(content)


def _encode(path: Path, arrays: dict[str, np.ndarray]) -> bytes | memoryview:
    if path.suffix == ".safetensors":
        return safetensors.numpy.save(arrays, metadata={"format": "pt"})
    torch, buffer = _import_torch(path), io.BytesIO()
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, buffer)
    return buffer.getbuffer()


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return safetensors.flax.load_file(path)  # safetensors.numpy cannot read bfloat16
    except Exception as error:  # OSError, safetensors' own, or a dtype that JAX does not have
        raise UserError(
            f"{path} cannot be read as safetensors ({one_line(error)}); copy it again"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """Reads the file with PyTorch, because there have been three formats of .pth.

    `weights_only` admits tensors and plain containers.
    """
    torch = _import_torch(path)
    try:
        # torch.save never compresses. A compressed file could expand to any size in memory.
        if zipfile.is_zipfile(path) and any(
            member.compress_type for member in zipfile.ZipFile(path).filelist
        ):
            raise ValueError("the zip file is compressed, which torch.save never does")
        return _to_numpy(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # of pickle, zip, tar or PyTorch
        raise UserError(
            f"{path} cannot be read as a state_dict ({one_line(error)[:100]}); write it again with "
            "torch.save(model.state_dict(), FILE)"
        ) from error


def _to_numpy(content: Any) -> dict[str, np.ndarray]:
    if not isinstance(content, Mapping):
        raise TypeError(f"it contains a {type(content).__name__}")
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    return {
        str(name): (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
        for name, tensor in content.items()
    }


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} needs PyTorch, which is not installed: pip install torch, or use a "
            ".safetensors file"
        ) from error
    return torch
