"""Images a second of one training step, or forward pass, on CPU: ours, plain Flax and PyTorch.

    python benchmarks/train_step.py

Every contender has a process of its own and as many threads as the machine has cores. They take
turns; a figure is the median of its turns.
"Of the peak" counts the operations of the plain convolutions against the best matrix product that
any of the libraries did here: Winograd's convolution takes fewer, so that it can pass 100 %.
PyTorch takes part if it is installed (requirements-torch.txt).
"""

import argparse
import functools
import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rows import Row, options, row, write  # noqa: E402
from turns import CORES, Make, take_turns  # noqa: E402

VARIANTS = ("owt", "paper")
BATCHES = (32, 64, 128, 256)
DTYPES = ("float32", "bfloat16")
MODES = ("forward", "train")
ROUNDS, SECONDS = 3, 3.0
ONE_BY_ONE = {"warm_up": 1, "together": 1}
GEMM_SIZE = 2048


def ours(variant: str, batch: int, dtype: str, train: bool) -> Iterator[int]:
    """Our network, and its step without the augmentation."""
    import our_step

    from alexnet_jax.utils import process as runtime

    runtime.set_up()
    model = our_step.network(variant, dtype)
    step, state, *examples = our_step.step_and_inputs(variant, batch, dtype)
    return jax_steps(model, step, state, examples, train)


def plain_flax(variant: str, batch: int, dtype: str, train: bool) -> Iterator[int]:
    """Flax's own parts, as a user writes it."""
    import jax
    import our_step
    import plain_flax as plain

    model = plain.PlainAlexNet(variant, dtype=dtype)
    state = jax.jit(lambda: plain.init_state(model))()
    examples = [*our_step.inputs(batch), jax.random.key(1)]
    return jax_steps(model, plain.train_step, state, examples, train)


def jax_steps(
    model: Any, train_step: Callable, state: Any, examples: Sequence[Any], train: bool
) -> Iterator[int]:
    """Yields the batch size after each finished step, or each forward pass."""
    import jax

    images = examples[0]
    step = jax.jit(train_step, donate_argnums=0)
    forward = jax.jit(lambda params, images: model.apply({"params": params}, images))
    while True:
        if train:
            state, metrics = step(state, *examples)
            jax.block_until_ready(metrics)
        else:
            forward(state.params, images).block_until_ready()
        yield len(images)


def pytorch(
    variant: str, batch: int, dtype: str, train: bool, channels_last: bool, compiled: bool = False
) -> Iterator[int]:
    """PyTorch's own parts."""
    import torch
    import torch_alexnet

    torch.set_num_threads(CORES)
    return torch_alexnet.steps(variant, batch, dtype, train, channels_last, compiled)


def jax_product(dtype: str) -> Iterator[int]:
    """Yields the millions of operations of matrix products."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (GEMM_SIZE, GEMM_SIZE), dtype)
    product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
    while True:
        product(a, a).block_until_ready()
        yield 2 * GEMM_SIZE**3 // 10**6


def torch_product(dtype: str) -> Iterator[int]:
    """Yields the millions of operations of matrix products."""
    import torch

    torch.set_num_threads(CORES)
    a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(getattr(torch, dtype))
    while True:
        torch.mm(a, a)
        yield 2 * GEMM_SIZE**3 // 10**6


def contenders(has_torch: bool) -> dict[str, Make]:
    """Returns by name what takes (variant, batch, dtype, train) and yields images."""
    found = {"ours": ours, "plain Flax": plain_flax}
    if has_torch:
        found["PyTorch"] = functools.partial(pytorch, channels_last=False)
        found["PyTorch channels last"] = functools.partial(pytorch, channels_last=True)
        if shutil.which("c++"):  # torch.compile builds with it
            found["torch.compile"] = functools.partial(pytorch, channels_last=True, compiled=True)
    return found


def peak_gflops(dtype: str, has_torch: bool, rounds: int, seconds: float) -> float:
    """Returns the best median of the libraries' matrix products, in GFLOP/s."""
    makers = {"JAX": functools.partial(jax_product, dtype)}
    if has_torch:
        makers["PyTorch"] = functools.partial(torch_product, dtype)
    found = take_turns(makers, rounds, seconds, **ONE_BY_ONE)
    return max(median(turn.rate for turn in turns) for turns in found.values()) / 1e3


def plain_gflop(variant: str, train: bool) -> float:
    """Returns the operations of one image, in 10⁹; the gradient of the image is not taken."""
    import our_step

    conv1, *others = our_step.layer_flops(variant)
    return (conv1 + sum(others) if not train else 2 * conv1 + 3 * sum(others)) / 1e9


def measure(cell: tuple[str, int, str, str], args: argparse.Namespace, peak: float) -> list[Row]:
    """Prints a table of one variant, batch size, dtype and mode; returns its rows."""
    variant, batch, dtype, mode = cell
    train = mode == "train"
    makers = {
        name: functools.partial(make, variant, batch, dtype, train)
        for name, make in contenders(args.torch).items()
    }
    rounds, seconds = (2, 0.1) if args.quick else (ROUNDS, SECONDS)
    print(f"\n{variant}, batch {batch}, {dtype}, {mode}: images a second")
    rows = []
    for name, turns in take_turns(makers, rounds, seconds, **ONE_BY_ONE).items():
        what = f"{name}, {variant} {mode}"
        rates = row(what, [turn.rate for turn in turns], "images/s", batch, dtype)
        memory = row(what, [turns[-1].peak_bytes / 1e6], "MB", batch, dtype)
        share = rates["value"] * plain_gflop(variant, train) / peak
        print(
            f"{what:40} {rates['value']:8.1f}  ({rates['min']:.1f} to {rates['max']:.1f})  "
            f"{share:4.0%} of the peak  {memory['value']:6.0f} MB at most"
        )
        rows += [rates, memory]
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Draws the training steps of each variant and dtype against the batch size."""
    from matplotlib.figure import Figure

    cells = sorted({(r["what"].split(", ")[1], r["dtype"]) for r in rows}, reverse=True)
    figure = Figure(figsize=(4.2 * len(cells), 3.4), layout="constrained")
    for axes, (what, dtype) in zip(
        figure.subplots(1, len(cells), squeeze=False)[0], cells, strict=True
    ):
        for name in dict.fromkeys(r["what"].split(", ")[0] for r in rows):
            line = [r for r in rows if r["what"] == f"{name}, {what}" and r["dtype"] == dtype]
            line.sort(key=lambda r: r["batch"])
            x = [r["batch"] for r in line]
            spread = [[abs(r["value"] - r[end]) for r in line] for end in ("min", "max")]
            axes.errorbar(x, [r["value"] for r in line], spread, marker="o", label=name)
        axes.set(xscale="log", title=f"{what}, {dtype}", xlabel="batch", ylabel="images/s", ylim=0)
        axes.set_xticks(BATCHES, map(str, BATCHES), minor=False)
        axes.minorticks_off()
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Prints a table for each cell, and writes rows and plot if asked."""
    parser = options(__doc__, quick="one small cell, without PyTorch")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    args = parser.parse_args()
    if args.quick:
        args.variant, args.batch, args.dtype, args.mode = ["owt"], [4], ["float32"], ["train"]
    args.torch = bool(importlib.util.find_spec("torch")) and not args.quick
    rows = []
    for dtype in args.dtype:
        peak = peak_gflops(dtype, args.torch, 3, 0.1 if args.quick else 1.0)
        print(f"\nbest matrix product, {dtype}: {peak:.0f} GFLOP/s on {CORES} cores")
        rows.append(row("best matrix product", [peak], "GFLOP/s", GEMM_SIZE, dtype))
        for variant, batch, mode in itertools.product(args.variant, args.batch, args.mode):
            rows += measure((variant, batch, dtype, mode), args, peak)
            write(rows, args.json)  # a long run that is stopped leaves what it had
    if args.plot:
        plot([r for r in rows if r["unit"] == "images/s"], args.plot)


if __name__ == "__main__":
    main()
