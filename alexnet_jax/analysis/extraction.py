"""Features of a folder of images as arrays on disk, in bounded memory, resumable at any moment.

    features.json   the layers, and the files in the order of the rows
    NAME.npy        float32[images, …] of a layer; NAME.zarr for zarr

An array has its name when it is complete, and `NAME.part.npy` before. Rows of files that cannot be
decoded are NaN.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import crc32c
import jax
import numpy as np
import tensorstore as ts
from jaxtyping import Float32
from tqdm import tqdm

from alexnet_jax import inference
from alexnet_jax.analysis.prediction import Skipped, decoded_batches
from alexnet_jax.data.decode import is_image
from alexnet_jax.inference import Trained
from alexnet_jax.models.names import find_tap
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.files import atomic_write, explain_write_errors, files_below, printable

FORMATS = (".npy", ".zarr")
DESCRIPTION, ROWS_DONE = "features.json", "rows_done.txt"
CHUNK_BYTES = 2**24  # of a zarr array, at most, unless one row is larger


def find_images(folder: Path) -> list[Path]:
    """Returns the images below a folder, sorted by name. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a folder with images")
    files = list(files_below(folder))
    images = [path for path in files if is_image(path)]
    if not images:
        others = f"none of its {len(files)} files is one" if files else "it is empty"
        raise UserError(f"there are no images in {folder}: {others}; name another folder")
    return images


def extract(
    network: Trained, folder: Path, names: Sequence[str], output: Path, batch_size: int, suffix: str
) -> Iterator[Skipped]:
    """Writes the features of the images in a folder, and yields the files that have none.

    If `output` has part of them, because a process was killed, the others are added.

    Args:
      names: of taps (`models.names`).
      output: a folder.
      suffix: of `FORMATS`.

    Raises:
      UserError: the network has no such tap, there are no images, or `output` has other features or
        cannot be written.
    """
    shapes = _shapes(network, names)
    images = find_images(folder)
    description = _description(network, folder, images, {n: f"{n}{suffix}" for n in shapes}, shapes)
    with explain_write_errors(output, "another --output"):
        output.mkdir(parents=True, exist_ok=True)
        _check_same(output, description)
        finals = {name: output / f"{name}{suffix}" for name in shapes}
        parts = {name: output / f"{name}.part{suffix}" for name in shapes}
        if all(path.exists() for path in finals.values()):
            return
        is_begun = all(parts[name].exists() or finals[name].exists() for name in shapes)
        done = _rows_done(output) if is_begun else 0
        if done == 0:
            for name, path in parts.items():
                _create(path, (len(images), *shapes[name]), batch_size)
        bar = tqdm(total=len(images), initial=done, unit="image", disable=None)
        for rows, skipped in _rows(network, images[done:], list(names), batch_size):
            yield from skipped
            for name, values in rows.items():
                _write(parts[name], done, values)
            done += len(values)
            with atomic_write(output / ROWS_DONE) as new:
                new.write_text(f"{done}\n")
            bar.update(len(values))
        bar.close()
        for name, path in parts.items():
            if path.exists():  # else a process was killed after it had renamed this one
                path.replace(finals[name])
        (output / ROWS_DONE).unlink(missing_ok=True)


def _shapes(network: Trained, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of one image's values at each tap."""
    for name in names:
        find_tap(network.model.variant, name)
    size = network.config.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    outputs = jax.eval_shape(inference.features_of(network, names), network.variables, image)
    return {name: output.shape[1:] for name, output in outputs.items()}


def _description(
    network: Trained,
    folder: Path,
    images: Sequence[Path],
    files: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, Any]:
    checksum = 0
    for array in jax.tree.leaves(network.variables):
        checksum = crc32c.crc32c(np.ascontiguousarray(array), checksum)
    variant = network.model.variant
    return {
        "network": {"variant": variant, "step": network.step, "crc32c": f"{checksum:08x}"},
        "layers": {
            name: {
                "operation": find_tap(variant, name),
                "file": file,
                "dtype": "float32",
                "shape": [len(images), *shapes[name]],
            }
            for name, file in files.items()
        },
        "files": [printable(path.relative_to(folder)) for path in images],
    }


def _check_same(output: Path, description: dict[str, Any]) -> None:
    """Writes the description, or compares it with that of a process that was interrupted."""
    path = output / DESCRIPTION
    if not path.exists():
        if any(output.iterdir()):
            raise UserError(f"{output} has other files and no {DESCRIPTION}; choose a new --output")
        with atomic_write(path) as new:
            new.write_text(json.dumps(description, indent=1) + "\n")
        return
    try:
        found = json.loads(path.read_text())
        differing = [name for name in description if found[name] != description[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}); choose a new --output"
        ) from error
    if differing:
        raise UserError(
            f"{output} has features of other {' and '.join(differing)}; choose a new --output"
        )


def _rows_done(output: Path) -> int:
    try:
        return int((output / ROWS_DONE).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _rows(
    network: Trained, images: Sequence[Path], names: Sequence[str], batch_size: int
) -> Iterator[tuple[dict[str, Float32[np.ndarray, "B ..."]], list[Skipped]]]:
    """Yields the rows of consecutive files, and those of them that cannot be decoded."""
    if not images:
        return
    extractor = inference.feature_extractor(network, names)

    def finished(pending: tuple[Any, Any]) -> tuple[dict[str, np.ndarray], list[Skipped]]:
        decoded, outputs = pending
        good = np.array([fault is None for _, fault in decoded])
        rows = {}
        for name, values in outputs.items():
            rows[name] = np.full((len(decoded), *values.shape[1:]), np.nan, np.float32)
            rows[name][good] = np.asarray(values)[: good.sum()]
        return rows, [Skipped(path, fault) for path, fault in decoded if fault is not None]

    pending = None  # is computed while the next batch is decoded
    for decoded, batch in decoded_batches(images, network.config, batch_size):
        following = decoded, extractor(batch)
        if pending:
            yield finished(pending)
        pending = following
    assert pending is not None  # there are images
    yield finished(pending)


def _create(path: Path, shape: tuple[int, ...], batch_size: int) -> None:
    if path.suffix == ".npy":
        np.lib.format.open_memmap(path, "w+", np.float32, shape)  # a sparse file
        return
    rows = max(1, min(batch_size, CHUNK_BYTES // (4 * int(np.prod(shape[1:])))))
    ts.open(
        _zarr(path),
        create=True,
        delete_existing=True,
        dtype=ts.float32,
        shape=shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=(rows, *shape[1:])),
    ).result()


def _write(path: Path, start: int, rows: Float32[np.ndarray, "B ..."]) -> None:
    if path.suffix == ".npy":
        offset = np.load(path, mmap_mode="r").offset + start * rows[0].nbytes
        # Not through the memory map: on a full disk the system would end the process.
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(rows.tobytes())
        return
    array = ts.open(_zarr(path), open=True).result()
    array[start : start + len(rows)].write(rows).result()


def _zarr(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}}
