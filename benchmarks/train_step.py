"""How fast is the training step, beside plain Flax and PyTorch, or beside another version?

    python benchmarks/train_step.py
    JAX_PLATFORMS=cuda python benchmarks/train_step.py --batch 256 --dtype bfloat16
    python benchmarks/train_step.py --against ../other_checkout --variant owt paper --batch 64

All contenders take the same random images; augmentation is left out. Each has its own process and
as many threads as the machine has cores, and they take turns. PyTorch takes part if it is installed
(requirements-torch.txt), torch.compile if there is a C++ compiler.

--against compares with the step of another checkout, including one whose package has another API:
it calls `ours` in the other checkout's own benchmarks/train_step.py.
"""

import argparse
import functools
import importlib.util
import itertools
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from harness import CORES, ROOT, Row, parser, ratio, row, show, take_turns, write

VARIANTS = ("owt", "paper")
BATCHES = (32, 64, 128, 256)
DTYPES = ("float32", "bfloat16")
MODES = ("forward", "train")


def ours(variant: str, batch: int, dtype: str, train: bool) -> Generator[int]:
    """This package's step. --against calls this in other checkouts: keep its signature."""
    import jax
    import our_step

    from alexnet_jax.utils import process

    process.set_up()
    state = jax.jit(lambda: our_step.init_state(variant, dtype))()
    step = our_step.train_step(variant, dtype)
    yield from jax_steps(
        our_step.network(variant, dtype), step, state, our_step.inputs(batch), train
    )


def plain_flax(variant: str, batch: int, dtype: str, train: bool) -> Generator[int]:
    """Flax's own parts."""
    import jax
    import our_step
    import plain_flax as plain

    model = plain.PlainAlexNet(variant, dtype=dtype)
    state = jax.jit(lambda: plain.init_state(model))()
    examples = (*our_step.inputs(batch), jax.random.key(1))
    yield from jax_steps(model, plain.train_step, state, examples, train)


def jax_steps(
    model: Any, train_step: Callable, state: Any, examples: Sequence[Any], train: bool
) -> Generator[int]:
    """Yields the batch size after each finished step or forward pass."""
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
) -> Generator[int]:
    """PyTorch's own parts."""
    import torch
    import torch_alexnet

    torch.set_num_threads(CORES)
    yield from torch_alexnet.steps(variant, batch, dtype, train, channels_last, compiled)


def other_checkout(root: str, variant: str, batch: int, dtype: str, train: bool) -> Generator[int]:
    """Imports the package and `ours` from a checkout. Must run in a process of its own."""
    sys.path[:0] = root, f"{root}/benchmarks"
    import train_step

    assert train_step.__file__.startswith(root), train_step.__file__
    yield from train_step.ours(variant, batch, dtype, train)


def contenders(args: argparse.Namespace) -> dict[str, Callable]:
    """Returns functions of (variant, batch, dtype, train) by name. The first is ours."""
    if args.against:
        roots = {"this checkout": ROOT, "the other": args.against.resolve()}
        return {name: functools.partial(other_checkout, str(of)) for name, of in roots.items()}
    found = {"ours": ours, "plain Flax": plain_flax}
    if args.torch:
        found["PyTorch"] = functools.partial(pytorch, channels_last=False)
        found["PyTorch channels last"] = functools.partial(pytorch, channels_last=True)
        if shutil.which("c++"):
            found["torch.compile"] = functools.partial(pytorch, channels_last=True, compiled=True)
    return found


def measure(cell: tuple[str, int, str, str], args: argparse.Namespace) -> list[Row]:
    """Prints and returns the rows of one combination of variant, batch size, dtype and mode."""
    variant, batch, dtype, mode = cell
    makers = {
        name: functools.partial(make, variant, batch, dtype, mode == "train")
        for name, make in contenders(args).items()
    }
    turns = take_turns(makers, args.rounds, args.seconds)
    fields = {"batch": batch, "dtype": dtype}
    rates = {name: [turn.rate for turn in of] for name, of in turns.items()}
    first, *others = rates
    rows = []
    for name, values in rates.items():
        what = f"{name}, {variant} {mode}"
        rows.append(row(what, values, "images/s", **fields))
        rows.append(row(what, [turns[name][-1].peak_bytes / 1e6], "MB at most", **fields))
    for name in others:
        what = f"{first} / {name}, {variant} {mode}"
        rows.append(ratio(what, rates[first], rates[name], **fields))
    print(f"\n{variant}, batch {batch}, {dtype}, {mode}")
    show(rows)
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Draws images per second of each variant and dtype against the batch size."""
    from matplotlib.figure import Figure

    rows = [of for of in rows if of["unit"] == "images/s"]
    cells = sorted({(of["what"].split(", ")[1], of["dtype"]) for of in rows}, reverse=True)
    figure = Figure(figsize=(4.2 * len(cells), 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(cells), squeeze=False)[0]
    for axes, (what, dtype) in zip(all_axes, cells, strict=True):
        for name in dict.fromkeys(of["what"].split(", ")[0] for of in rows):
            line = [of for of in rows if of["what"] == f"{name}, {what}" and of["dtype"] == dtype]
            spread = [[abs(of["median"] - of[end]) for of in line] for end in ("min", "max")]
            x, y = zip(*((of["batch"], of["median"]) for of in line), strict=True)
            axes.errorbar(x, y, spread, marker="o", label=name)
        axes.set(xscale="log", title=f"{what}, {dtype}", xlabel="batch", ylabel="images/s", ylim=0)
        axes.set_xticks(BATCHES, map(str, BATCHES))
        axes.minorticks_off()
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = parser(__doc__, quick="one small cell, without PyTorch")
    options.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare with this only")
    options.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS)
    options.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    options.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    options.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    options.add_argument("--rounds", type=int, default=3, help="default: 3")
    options.add_argument("--seconds", type=float, default=3.0, help="least duration of a turn (3)")
    options.add_argument("--plot", type=Path, metavar="FILE.png")
    args = options.parse_args()
    if args.quick:
        args.variant, args.batch, args.dtype, args.mode = ["owt"], [4], ["float32"], ["train"]
        args.rounds, args.seconds = 2, 0.1
    args.torch = bool(importlib.util.find_spec("torch")) and not args.quick
    rows = []
    for cell in itertools.product(args.variant, args.batch, args.dtype, args.mode):
        rows += measure(cell, args)
        write(rows, args.json)  # keeps what was measured if a long run is interrupted
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
