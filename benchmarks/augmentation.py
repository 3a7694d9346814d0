"""How much longer does the inception crop take on CPU than the paper's random crop?

python benchmarks/augmentation.py
"""

from collections.abc import Generator
from functools import partial

import numpy as np
from harness import parser, ratio, row, show, take_turns, write

BATCH, ROUNDS = 128, 41


def augment(crop: str, batch: int) -> Generator[int]:
    """Yields 1 after augmenting a batch of uint8[B, 256, 256, 3]."""
    import jax
    import our_step

    from alexnet_jax.utils import process

    process.set_up()
    function = our_step.augmentation(crop)
    images = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), batch)
    while True:
        function(images, keys).block_until_ready()
        yield 1


def main() -> None:
    args = parser(__doc__, quick="two rounds of four images").parse_args()
    batch, rounds = (4, 2) if args.quick else (BATCH, ROUNDS)
    makers = {f"{crop} crop": partial(augment, crop, batch) for crop in ("inception", "random")}
    turns = take_turns(makers, rounds, seconds=0)
    times = {name: [1e3 / turn.rate for turn in of] for name, of in turns.items()}
    rows = [row(name, values, "ms", batch, "uint8") for name, values in times.items()]
    rows.append(ratio(" / ".join(times), *times.values(), batch=batch, dtype="uint8"))
    show(rows)
    write(rows, args.json)


if __name__ == "__main__":
    main()
