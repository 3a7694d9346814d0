"""How fast is LPIPS here, and in PyPI's `lpips` with PyTorch?

    python benchmarks/perceptual_distance.py

Distances of pairs of images in float32, with random weights in both. Each contender has its own
process and as many threads as the machine has cores, and they take turns. Needs
requirements-torch.txt.
"""

import sys
import warnings
from collections.abc import Generator
from functools import partial

import numpy as np
from harness import CORES, ROOT, Row, parser, ratio, row, show, take_turns, write

SIZES = {64: 32, 256: 8}  # pixels: pairs in a batch
ROUNDS, SECONDS = 5, 2.0


def pairs(size: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two batches of images from -1 to 1, float32[B, S, S, 3]."""
    images = np.random.default_rng(0).uniform(-1, 1, (2, batch, size, size, 3))
    a, b = images.astype(np.float32)
    return a, b


def ours(size: int, batch: int) -> Generator[int]:
    """Yields the batch size after each call of `lpips.distance`."""
    import jax

    from alexnet_jax import AlexNet
    from alexnet_jax.analysis import lpips
    from alexnet_jax.utils import process

    process.set_up()
    model = AlexNet("owt_conv")
    a, b = pairs(size, batch)
    variables = jax.jit(model.init)(jax.random.key(0), a)
    widths = [variables["params"][f"conv{n}"]["bias"].shape for n in range(1, 6)]
    linear = [np.full(width, 0.1, np.float32) for width in widths]
    metric = lpips.Metric(model, {**variables, "linear": linear})
    distance = jax.jit(lambda a, b: lpips.distance(metric, a, b))
    while True:
        jax.block_until_ready(distance(a, b))
        yield batch


def pypi(size: int, batch: int) -> Generator[int]:
    """The same of PyPI's `lpips`."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    import torchvision_stub  # noqa: F401  (without it, torchvision fails beside PyTorch for CPUs)

    warnings.filterwarnings("ignore")  # lpips calls torchvision by deprecated names
    import lpips

    torch.set_num_threads(CORES)
    metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    a, b = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in pairs(size, batch))
    while True:
        with torch.inference_mode():
            metric(a, b)
        yield batch


def main() -> None:
    options = parser(__doc__, "two small batches").parse_args()
    rows: list[Row] = []
    for size, batch in ({64: 2} if options.quick else SIZES).items():
        makers = {"ours": partial(ours, size, batch), "PyPI": partial(pypi, size, batch)}
        turns = take_turns(makers, *((2, 0.0) if options.quick else (ROUNDS, SECONDS)))
        rates = {name: [turn.rate for turn in own] for name, own in turns.items()}
        fields = {"batch": batch, "dtype": "float32"}
        rows += [
            row(f"LPIPS, {name}, {size} pixels", rate, "pairs/s", **fields)
            for name, rate in rates.items()
        ]
        rows.append(ratio(f"ours / PyPI, {size} pixels", rates["ours"], rates["PyPI"], **fields))
        show(rows[-3:])
    write(rows, options.json)


if __name__ == "__main__":
    main()
