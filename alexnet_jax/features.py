"""Writes the responses of layers to a folder of images as .npy or zarr arrays."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax import inference
from alexnet_jax.analysis.extraction import FORMATS, extract
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import UserError, exits_cleanly

EXIT_SOME_SKIPPED = 3  # as in predict


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.features",
        description="Writes the responses of layers to the images in a folder: NAME.npy for each "
        "layer, float32[images, …], and features.json with the files in the order of the rows. "
        "Memory holds a few batches only. After a kill, the same command continues. A file that "
        "cannot be decoded is named on stderr, its rows are NaN, and the exit code is "
        f"{EXIT_SOME_SKIPPED}.",
    )
    parser.add_argument(
        "workdir", type=buckets.readable, help="workdir of a training run or of alexnet_jax.convert"
    )
    parser.add_argument("folder", type=Path, help="folder with images, also in subfolders")
    parser.add_argument(
        "--layers",
        nargs="+",
        required=True,
        metavar="NAME",
        help="such as relu7, features.11, norm1, 'layer 5', or pool5.input for what goes into one",
    )
    parser.add_argument(
        "--output", type=buckets.local, required=True, metavar="OUT", help="a new folder"
    )
    parser.add_argument(
        "--format", choices=[suffix[1:] for suffix in FORMATS], default="npy", help="default: npy"
    )
    parser.add_argument(
        "--step", type=int, help="step of the checkpoint (default: the best top-1 accuracy)"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be at least 1")
    process.set_up()
    network = inference.load(args.workdir, args.step)
    names = list(dict.fromkeys(args.layers))
    skipped = 0
    for file in extract(
        network, args.folder, names, args.output, args.batch_size, f".{args.format}"
    ):
        skipped += 1
        print(f"skipped {file.path}: {file.reason}", file=sys.stderr)
    arrays = ", ".join(f"{name}.{args.format}" for name in names)
    print(f"wrote features.json, {arrays} to {args.output}")
    return EXIT_SOME_SKIPPED if skipped else 0


if __name__ == "__main__":
    main()
