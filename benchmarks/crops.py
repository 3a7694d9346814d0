"""Milliseconds of augmenting a batch by the paper's crop and by the inception crop, in turns.

python benchmarks/crops.py
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax  # noqa: E402  (it must find the variable above)
import numpy as np  # noqa: E402
from rows import options, row, write  # noqa: E402

from alexnet_jax.config import default_config  # noqa: E402
from alexnet_jax.data import augment
from alexnet_jax.utils import process as runtime

BATCH, CALLS = 128, 41
CROPS = ("random", "inception")


def augmenting(crop: str):
    """Returns a compiled function of uint8[B, 256, 256, 3] and one key for each image."""
    config = default_config()
    config.augment.crop = crop
    shape = (config.image_size, config.image_size, 3)
    stats = augment.Statistics(np.full(shape, 120, np.float32), np.eye(3, dtype=np.float32))
    noise = np.float32(config.augment.color_noise)
    return jax.jit(lambda images, keys: augment.augment(images, keys, noise, stats, config))


def main() -> None:
    """Prints a line for each crop, and writes rows if asked."""
    args = options(__doc__, quick="two calls of four images").parse_args()
    runtime.set_up()
    batch, calls = (4, 2) if args.quick else (BATCH, CALLS)
    images = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), batch)
    functions = {crop: augmenting(crop) for crop in CROPS}
    times = {crop: [] for crop in CROPS}
    for number in range(calls + 1):
        for crop, function in functions.items():
            started = time.perf_counter()
            function(images, keys).block_until_ready()
            if number:  # the first is compiled
                times[crop].append(1e3 * (time.perf_counter() - started))
    rows = [row(f"augmentation, {crop} crop", of, "ms", batch) for crop, of in times.items()]
    for of in rows:
        print(f"{of['what']:32} {of['median']:7.1f} ms  ({of['min']:.1f} to {of['max']:.1f})")
    print(f"{'ratio':32} {rows[1]['median'] / rows[0]['median']:7.1f}")
    write(rows, args.json)


if __name__ == "__main__":
    main()
