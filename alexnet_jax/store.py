"""Prepares, renews, describes and verifies the stores of a config.

python -m alexnet_jax.store prepare --config configs/quickstart.py
python -m alexnet_jax.store renew --config configs/folder.py
python -m alexnet_jax.store info --config configs/quickstart.py
python -m alexnet_jax.store verify --config configs/quickstart.py
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from alexnet_jax.config import check_bounds, parse
from alexnet_jax.data.prepare import open_or_prepare, prepare_splits, renew
from alexnet_jax.data.store import (
    Store,
    damaged,
    find_damage,
    needs_preparation,
    open_store,
    store_paths,
)
from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import UserError, exits_cleanly


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.store",
        description="Prepare, renew, describe or verify the stores of a config.",
    )
    parser.add_argument(
        "action",
        nargs="?",
        default="prepare",
        choices=["prepare", "renew", "info", "verify"],
        help="prepare (default): prepare the stores that are not complete; renew: prepare those of "
        "a folder again whose images changed; info: describe them; "
        "verify: read all images and list those that do not match their checksums",
    )
    parser.add_argument(
        "--part", metavar="I/N", help="prepare only the I-th of N parts, e.g. one on each host"
    )
    config, args = parse(argv, parser)
    check_bounds(config)
    if args.part and args.action != "prepare":
        raise UserError(f"--part works only with prepare, not with {args.action}")
    with distributed.joined():
        paths = store_paths(config)
        if args.part:
            prepare_splits(config, paths, _parse_part(args.part))
        elif args.action == "renew" and distributed.is_first():
            renew(config)
        elif args.action == "prepare":
            open_or_prepare(config)
        if not distributed.is_first():
            return
        for path in paths.values():
            if args.action == "verify":
                verify(path)
            elif not (args.part and needs_preparation(path)):
                print(describe(open_store(path)))


def describe(store: Store) -> str:
    """Returns a table of what a store contains."""
    megabytes = sum(store.shard_bytes) / 1e6
    per_class = np.bincount(store.labels, minlength=len(store.class_names))
    lines = {
        "source": store.source,
        "examples": f"{store.num_examples:,} ({store.num_corrupt} corrupt images left out)",
        "classes": f"{len(store.class_names)}, with {per_class.min():,} to {per_class.max():,} "
        "examples each",
        "images": f"{store.image_shape[1]}x{store.image_shape[0]}, stored as {store.storage}",
        "size": f"{megabytes:,.1f} MB in {len(store.shard_bytes)} shards",
        "mean RGB": ", ".join(f"{value:.2f}" for value in store.mean_channel),
        "RGB eigenvalues": ", ".join(f"{value:.1f}" for value in store.eigenvalues),
    }
    return "\n".join([store.path, *(f"  {name:16}{value}" for name, value in lines.items())])


def verify(path: str) -> None:
    """Reads all images of a store and prints which are damaged. Raises UserError if any is."""
    # A missing shard must not hide damage to others, so opening does not check for it.
    store = open_store(path, check_shards=False)
    found: Counter[str] = Counter()
    for line in find_damage(store):
        if line not in found:  # a missing shard is printed once, not once per image
            print(line)
        found[line] += 1
    if found:
        raise damaged(path, f"{found.total()} of its {store.num_examples} images cannot be read")
    print(f"{path}: all {store.num_examples} images match their checksums")


def _parse_part(text: str) -> tuple[int, int]:
    """Parses "2/8"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= count:
        raise UserError(f"--part={text} must be I/N with I from 1 to N, for example 2/8")
    return part, count


if __name__ == "__main__":
    main()
