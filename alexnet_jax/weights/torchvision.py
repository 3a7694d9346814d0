"""Reads and writes the state_dict of torchvision's alexnet, as .pth or .safetensors files."""

import io
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy

from alexnet_jax.utils.download import download
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.files import atomic_write, explain_write_errors
from alexnet_jax.weights.layouts import ChannelsFirst
from alexnet_jax.weights.pickles import Inert

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


# torchvision's AlexNet_Weights.IMAGENET1K_V1. The name ends in the first digits of its SHA-256.
URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"

# Wrappers that PyTorch inserts anywhere in a name: DataParallel's, and torch.compile's.
WRAPPERS = ("module", "_orig_mod")
# Where a checkpoint contains several alexnets, such as a moving average, these are the network.
USUAL_KEYS = ("state_dict", "model_state_dict", "model")
MAX_NAMES = 16  # of a message


def published() -> Path:
    """Returns the file of torchvision's trained network, which is downloaded once.

    Raises UserError if that is not possible.
    """
    return download(URL, re.findall("[0-9a-f]{8}", URL)[-1])


def format_of(head: bytes) -> str | None:
    """Returns "torch" or "safetensors" if a file that starts with these bytes has that format.

    Args:
      head: at least 512 bytes, or the whole file.
    """
    is_zip, is_tar = head.startswith(b"PK\x03\x04"), head[257:262] == b"ustar"
    # Before PyTorch 1.6 a file started with the pickle of this number, before 0.1.10 it was a tar.
    magic = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    if is_zip or is_tar or magic in head[:32]:
        return "torch"
    # A length in eight bytes, then that much JSON.
    return "safetensors" if head[8:9] == b"{" and head[6:8] == b"\0\0" else None


def read_head(path: Path) -> bytes:
    """Returns the bytes that `format_of` needs. Raises UserError if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def read(path: Path) -> tuple[str, ChannelsFirst]:
    """Returns the variant, `owt`, and the weights of a state_dict.

    A state_dict is found anywhere in a training checkpoint, whatever prefix its names have in
    common. Weights in half precision become float32 exactly, those in double precision by rounding.

    Raises:
      UserError: the file cannot be read or is not torchvision's alexnet.
    """
    is_safetensors = (format_of(read_head(path)) or path.suffix.lower()).endswith("safetensors")
    found = {"": _read_safetensors(path)} if is_safetensors else _read_torch(path)
    arrays = _alexnet_among(found, path)
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
    if path.suffix.lower() == ".safetensors":
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


def _read_torch(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns every state_dict in a file, with where it is in the file.

    PyTorch reads the file, because there have been three formats. `weights_only` admits tensors and
    plain containers; objects of other classes become `Inert`.
    """
    torch = _import_torch(path)
    try:
        others = ["argparse.Namespace"]  # torchvision's training script saves its arguments
        if zipfile.is_zipfile(path):
            # torch.save never compresses. A compressed file could expand to any size in memory.
            if any(member.compress_type for member in zipfile.ZipFile(path).filelist):
                raise ValueError("the zip file is compressed, which torch.save never does")
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in others]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        found = {
            key: {name: _to_numpy(tensor) for name, tensor in tensors.items()}
            for key, tensors in _groups_of_tensors(content, torch.Tensor)
        }
        if not found:
            keys = map(str, content) if isinstance(content, Mapping) else ()
            raise ValueError(f"it contains no tensors with names, but {_listed(keys)}")
        return found
    except Exception as error:  # of pickle, zip, tar or PyTorch
        raise UserError(
            f"{path} cannot be read as a state_dict ({one_line(error)[:200]}); write it again with "
            "torch.save(model.state_dict(), FILE)"
        ) from error


def _groups_of_tensors(
    content: Any, tensor: type, key: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields each mapping from names to tensors alone, at any depth, with the keys to it."""
    if not isinstance(content, Mapping):
        return
    if content and all(
        isinstance(k, str) and isinstance(value, tensor) for k, value in content.items()
    ):
        yield key, content
        return
    for name, value in content.items():
        yield from _groups_of_tensors(value, tensor, f"{key}.{name}" if key else str(name))


def _to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.float() if tensor.is_floating_point() else tensor  # NumPy lacks bfloat16
    array: np.ndarray = tensor.detach().numpy()
    return array


def _alexnet_among(found: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, Any]:
    """Returns the arrays of torchvision's alexnet by their usual names."""
    expected = {f"{module}.{part}" for module in MODULES.values() for part in ("weight", "bias")}
    short = {key: _short_names(arrays) for key, arrays in found.items()}
    fitting = [key for key, names in short.items() if sorted(names.values()) == sorted(expected)]
    usual = [key for key in USUAL_KEYS if key in fitting]
    if len(fitting) == 1 or usual:
        key = (usual or fitting)[0]
        return {short[key][name]: array for name, array in found[key].items()}
    if fitting:
        raise UserError(
            f"{path} contains several networks, {_listed(fitting)}; write one of them to a file of "
            "its own with torch.save"
        )
    names = max(short.values(), key=lambda names: (len(expected & set(names.values())), len(names)))
    unexpected = [name for name in names if names[name] not in expected]
    missing = sorted(expected - set(names.values()))
    differences = [
        f"{verb} {_listed(which)}"
        for verb, which in (("has", unexpected), ("lacks", missing))
        if which
    ]
    raise UserError(
        f"{path} is not torchvision's alexnet: it {' and '.join(differences)}; rename the arrays "
        "as in torchvision.models.alexnet().state_dict()"
    )


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """Returns each name without wrappers and without the prefix that all have in common."""
    parts = {name: [p for p in name.split(".") if p not in WRAPPERS] for name in names}
    prefix = len(os.path.commonprefix(list(parts.values())))
    return {name: ".".join(parts[name][prefix:]) for name in parts}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} needs PyTorch, which is not installed: pip install torch, or use a "
            ".safetensors file"
        ) from error
    return torch
