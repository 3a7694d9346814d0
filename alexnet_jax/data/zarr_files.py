"""The zarr v3 files of a store besides its shards: attributes, small arrays, a description."""

import json
from typing import Any

import numpy as np
import tensorstore as ts

from alexnet_jax.data.shards import INDEX_CODECS, JPEG_QUALITY, rows_per_shard


def read_array(root: ts.KvStore, name: str) -> np.ndarray:
    """Returns a whole array. Raises ValueError if it is missing or damaged."""
    spec = {
        "driver": "zarr3",
        "kvstore": (root / f"{name}/").spec().to_json(),
        "fill_missing_data_reads": False,  # zarr's default makes zeros of what is missing
    }
    return ts.open(spec, open=True).result().read().result()


def write_image_metadata(root: ts.KvStore, size: int, num_rows: int, storage: str) -> None:
    """Describes the shards as a zarr array, which zarr and TensorStore open if they are raw."""
    jpeg = {"name": "jpeg", "configuration": {"quality": JPEG_QUALITY}}
    sharding = {
        "chunk_shape": [1, size, size, 3],
        "codecs": INDEX_CODECS if storage == "raw" else [jpeg, INDEX_CODECS[1]],
        "index_codecs": INDEX_CODECS,
        "index_location": "end",
    }
    grid = {"chunk_shape": [rows_per_shard(size), size, size, 3]}
    array = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_rows, size, size, 3],
        "data_type": "uint8",
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    root.write("image/zarr.json", json.dumps(array, indent=1).encode()).result()


def write_array(root: ts.KvStore, name: str, values: np.ndarray) -> None:
    """Writes an array in one chunk with a checksum, over one of the same shape if it is there."""
    spec = {
        "driver": "zarr3",
        "kvstore": (root / f"{name}/").spec().to_json(),
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": values.shape,
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": values.shape}},
            "codecs": INDEX_CODECS,
        },
    }
    ts.open(spec, create=True, open=True).result().write(values).result()


def write_attributes(root: ts.KvStore, attributes: dict[str, Any]) -> None:
    """Writes the attributes of the store's zarr group."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    root.write("zarr.json", json.dumps(group, indent=1).encode()).result()
