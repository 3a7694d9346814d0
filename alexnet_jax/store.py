"""A config's stores: prepared where they are not yet, and opened (`store_files` tells their form).

`python -m alexnet_jax.store prepare --config configs/quickstart.py` prepares the stores of a
config, `… info …` tells what they hold, `… verify …` reads all of it against the checksums.
"""

import argparse
import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.config import check_bounds, parse
from alexnet_jax.data.sources import FOLDER_PREFIX, check_folder_unchanged
from alexnet_jax.data.store import (
    UNPACK,
    Store,
    damaged,
    damages,
    expand_dir,
    is_settled,
    is_url,
    open_kvstore,
    open_store,
    remove_records,
)
from alexnet_jax.utils import distributed as hosts
from alexnet_jax.utils.errors import UserError, exits_cleanly


def open_or_prepare(config: Mapping[str, Any]) -> dict[str, Store]:
    """Opens a config's stores {"train": …, "eval": …}; prepares those that are not complete.

    Reads the fields dataset, data_dir, train_split, eval_split, image_size, storage, max_corrupt.
    Of several hosts each prepares its part in a bucket. Folders may be each host's own or shared:
    there, who comes first prepares all, and the others wait for it.

    Raises:
      UserError: as `open_store` and `prepare.prepare_splits` do.
    """
    paths = store_paths(config)
    if not all(is_settled(path) for path in paths.values()):
        from alexnet_jax.data import prepare

        shared = is_url(paths["train"])
        prepare.prepare_splits(config, paths, hosts.part() if shared else prepare.WHOLE)
    hosts.wait_for_all("stores are prepared")
    stores = {use: open_store(path) for use, path in paths.items()}
    for path in paths.values():
        # A kill may come between the mark of completion and this; who may not write leaves them.
        with contextlib.suppress(ValueError):
            remove_records(open_kvstore(path))
    if config["dataset"].startswith(FOLDER_PREFIX):
        for use, store in stores.items():
            check_folder_unchanged(config, config[f"{use}_split"], store)
    return stores


def store_paths(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns where the stores of a config lie, {"train": …, "eval": …}. Raises UserError for a
    `storage` that does not exist.
    """
    if config["storage"] not in UNPACK:
        raise UserError(f"storage={config['storage']!r}; it can be {', '.join(UNPACK)}")
    return {use: store_path(config, config[f"{use}_split"]) for use in ("train", "eval")}


def store_path(config: Mapping[str, Any], split: str) -> str:
    """Returns `<data_dir>/<dataset>_<image_size>/<split>`, or `…_<image_size>_jpeg/…`.

    Where a name has characters that do not suit file names, they become "-" and eight hex digits
    of the name's hash follow; a folder's name is its last part and the hash of its absolute path.
    """
    dataset = config["dataset"]
    if dataset.startswith(FOLDER_PREFIX):
        folder = Path(dataset.removeprefix(FOLDER_PREFIX)).expanduser().resolve()
        name = _file_name(f"folder-{folder.name}", unique=str(folder))
    else:
        name = _file_name(dataset)
    kind = "" if config["storage"] == "raw" else f"_{config['storage']}"
    of_dataset = f"{expand_dir(config['data_dir'])}/{name}_{config['image_size']}{kind}"
    return f"{of_dataset}/{_file_name(split)}"


def _file_name(text: str, unique: str = "") -> str:
    safe = re.sub(r"[^\w.+-]+", "-", text).strip("-")
    if safe == text and not unique:
        return text
    return f"{safe}-{hashlib.sha256((unique or text).encode()).hexdigest()[:8]}"


def describe(store: Store) -> str:
    """Returns a table of what a store holds."""
    megabytes = sum(store.shard_bytes) / 1e6
    per_class = np.bincount(store.labels, minlength=len(store.class_names))
    lines = {
        "source": store.source,
        "examples": f"{store.num_examples:,}, {store.num_corrupt} corrupt ones left out",
        "classes": f"{len(store.class_names)}, of {per_class.min():,} to {per_class.max():,} each",
        "images": f"{store.image_size}x{store.image_size}, stored as {store.storage}",
        "size": f"{megabytes:,.1f} MB in {len(store.shard_bytes)} shards",
        "mean RGB": ", ".join(f"{value:.2f}" for value in store.mean_channel),
        "RGB eigenvalues": ", ".join(f"{value:.1f}" for value in store.eigenvalues),
    }
    return "\n".join([store.path, *(f"  {name:16}{value}" for name, value in lines.items())])


def _verify(path: str) -> None:
    store = open_store(path, check_shards=False)  # so that one missing shard hides no other damage
    found: Counter[str] = Counter()
    for line in damages(store):
        if line not in found:  # a missing shard is said once
            print(line)
        found[line] += 1
    if found:
        total = f"{found.total()} of its {store.num_examples} images"
        raise damaged(path, f"{total} cannot be read")
    print(f"{path}: all {store.num_examples} images have their checksums")


def _part(text: str) -> tuple[int, int]:
    """Parses "2/8"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= count:
        raise UserError(f"--part={text} must be I/N with I from 1 to N, for example 2/8")
    return part, count


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.store",
        description="Prepare the data of a config, look at it, verify it.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="prepare",
        choices=["prepare", "info", "verify"],
        help="prepare (default): build what is not there yet; info: tell what there is; verify: "
        "read all images and name those that do not have their checksums",
    )
    parser.add_argument("--part", metavar="I/N", help="prepare the I-th of N parts, one a host")
    config, args = parse(argv, parser)
    check_bounds(config)
    if args.part and args.what != "prepare":
        raise UserError(f"--part goes with prepare and not with {args.what}")
    with hosts.joined():
        _run(args.what, args.part, config)


def _run(what: str, part: str | None, config: Mapping[str, Any]) -> None:
    paths = store_paths(config)
    if part:
        from alexnet_jax.data import prepare

        prepare.prepare_splits(config, paths, _part(part))
    elif what == "prepare":
        open_or_prepare(config)
    if not hosts.is_first():
        return
    for path in paths.values():
        if what == "verify":
            _verify(path)
        elif not part or is_settled(path):
            print(describe(open_store(path)))


if __name__ == "__main__":
    main()
