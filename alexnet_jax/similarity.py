"""Compares the representations of networks: RDM correlation and linear CKA of a layer.

    python -m alexnet_jax.similarity runs/population/seed* --layer relu7

Shows the same images to all networks, each by its own preprocessing: evenly spaced ones of the eval
split of the first network, or the files below --images. Writes similarity.csv and similarity.png.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from alexnet_jax import inference
from alexnet_jax.analysis import figures, representations
from alexnet_jax.analysis.prediction import decoded_batches, find_files
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.inference import Trained
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import UserError, exits_cleanly
from alexnet_jax.utils.files import atomic_write, explain_write_errors

LEAST = 3  # images: with two there is only one pair


def from_files(network: Trained, words: Sequence[str], batch_size: int) -> list[np.ndarray]:
    """Returns the images of files in batches, as a network takes them.

    Raises:
      UserError: a file is not an image.
    """
    files = find_files(words)
    found = []
    for decoded, images in decoded_batches(files, network.config, batch_size):
        for path, fault in decoded:
            if fault is not None:
                raise UserError(f"{path} cannot be read ({fault}); remove it")
        found.append(images[: len(decoded)])
    return found


def from_store(first: Trained, network: Trained, count: int, batch_size: int) -> list[np.ndarray]:
    """Returns images of the eval split of the first network in batches, as another takes them."""
    config = first.config.copy_and_resolve_references()
    config.preprocess = network.config.preprocess
    config.image_size = network.config.image_size
    store = open_or_prepare(config, ["eval"])["eval"]
    return representations.sample(store, count, batch_size)


def write_results(
    folder: Path, names: Sequence[str], matrices: dict[str, Float64[np.ndarray, "K K"]], layer: str
) -> None:
    """Writes similarity.csv, a row for each pair and metric, and similarity.png."""
    with explain_write_errors(folder, "another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "similarity.csv") as new, new.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["metric", "layer", "network", *names])
            for metric, matrix in matrices.items():
                for name, row in zip(names, matrix, strict=True):
                    table.writerow([metric, layer, name, *(f"{value:.6f}" for value in row)])
        titles = {"rdm": "RDM correlation", "cka": "linear CKA"}
        with atomic_write(folder / "similarity.png") as new:
            labelled = {f"{titles[name]}, {layer}": matrix for name, matrix in matrices.items()}
            figures.save_similarity(labelled, names, new)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.similarity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=buckets.readable, nargs="+", help="two or more workdirs")
    parser.add_argument("--layer", default="relu7", help="default: relu7")
    parser.add_argument(
        "--metric",
        nargs="+",
        choices=representations.METRICS,
        default=list(representations.METRICS),
        help="default: both",
    )
    parser.add_argument("--images", nargs="+", help="files, folders or patterns of images to show")
    parser.add_argument(
        "--count", type=int, default=1000, help="images of the eval split (default: 1000)"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument(
        "--data-dir", help="folder with the prepared data (default: data_dir of the config)"
    )
    parser.add_argument(
        "--out", type=buckets.local, help="folder for the results (default: the first workdir)"
    )
    args = parser.parse_args(argv)
    if len(args.workdir) < 2:
        raise UserError("similarity compares networks; name at least two workdirs")
    if args.batch_size < 1 or args.count < 1:
        raise UserError("--batch-size and --count must be at least 1")
    process.set_up()
    networks = [inference.load(workdir) for workdir in args.workdir]
    for network in networks:
        representations.check_layer(network, args.layer)
    first = networks[0]
    if args.data_dir:
        first.config.data_dir = args.data_dir
    everything = []
    for network in networks:
        if args.images:
            shown = from_files(network, args.images, args.batch_size)
        else:
            shown = from_store(first, network, args.count, args.batch_size)
        everything.append(representations.responses(network, args.layer, shown))
    counts = {len(own) for own in everything}
    if len(counts) > 1 or min(counts) < LEAST:
        raise UserError(
            f"the networks saw {', '.join(map(str, sorted(counts)))} images; all must see the "
            f"same, and at least {LEAST}"
        )
    matrices = {
        name: representations.similarity_matrix(everything, representations.METRICS[name])
        for name in args.metric
    }
    names = [workdir.name for workdir in args.workdir]
    if len({*names}) < len(names):
        names = [str(workdir) for workdir in args.workdir]
    width = max(map(len, names))
    print(f"{args.layer} of {counts.pop():,} images")
    for metric, matrix in matrices.items():
        print(f"\n{metric}")
        for name, row in zip(names, matrix, strict=True):
            print(f"{name:{width}}  {' '.join(f'{value:6.3f}' for value in row)}")
    folder = args.out or buckets.folder_for_results(args.workdir[0])
    write_results(folder, names, matrices, args.layer)
    print(f"\nwrote similarity.csv and similarity.png to {folder}")


if __name__ == "__main__":
    main()
