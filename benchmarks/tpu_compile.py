"""What the TPU compiler says of the training step, ours beside plain Flax's; needs no TPU.

    python benchmarks/tpu_compile.py

Compiles variant owt for one chip with libtpu, in a minute or so for each line. The figures are the
compiler's model of the chip, not measurements: they tell what to look at, not how fast it is. Both
steps take the same bfloat16 images, which our augmentation ends in; ours is compiled without that,
and with the compiler options that train.py sets.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rows import Row, options, row, write

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import our_step  # noqa: E402
import plain_flax  # noqa: E402

from alexnet_jax.analysis import tpu
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import exits_cleanly  # noqa: E402

CHIPS = {"v5e": "v5e:2x4", "v6e": "v6e:2x4"}  # the smallest topologies there are
BATCHES = (128, 256, 512)
VARIANT, DTYPE = "owt", "bfloat16"
CAVEAT = "the compiler's model of the chip, nothing was measured"
SHOWN = 10
Inputs = tuple[Any, ...]


class Step(NamedTuple):
    """A step to compile, what it takes, and what the compiler is told."""

    function: Callable
    inputs: Inputs
    options: dict[str, str]


class Cost(NamedTuple):
    """What the compiler expects of one step; `unknown` are the opcodes it gives no cycles for."""

    cycles: int
    flops: float
    bytes_accessed: float
    temporary_bytes: int
    operations: list[tpu.Operation]
    unknown: Counter[str]


def batch_of(size: int) -> Inputs:
    images, labels = jax.eval_shape(lambda: our_step.inputs(size))
    return images.update(dtype=jnp.dtype(DTYPE)), labels


def ours(batch_size: int) -> Step:
    """Our training step without its augmentation."""
    state = jax.eval_shape(lambda: our_step.init_state(VARIANT, DTYPE))
    inputs = (state, *batch_of(batch_size))
    return Step(our_step.train_step(VARIANT, DTYPE), inputs, runtime.TPU_OPTIONS)


def plain(batch_size: int) -> Step:
    """Plain Flax's training step."""
    model = plain_flax.PlainAlexNet(VARIANT, dtype=DTYPE)
    state = jax.eval_shape(lambda: plain_flax.init_state(model))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Step(plain_flax.train_step, (state, *batch_of(batch_size), key), {})


def cost(chip: str, step: Step) -> Cost:
    """Compiles a step for one chip and reads what the compiler says of it."""
    _, devices = tpu.topology_devices(CHIPS[chip])
    placed = jax.sharding.SingleDeviceSharding(devices[0])
    inputs = jax.tree.map(lambda x: x.update(sharding=placed), step.inputs)
    compiled = (
        jax.jit(step.function, donate_argnums=0)
        .lower(*inputs)
        .compile(compiler_options=step.options)
    )
    operations, unknown = tpu.entry_operations(compiled.as_text())
    analysis = compiled.cost_analysis()
    return Cost(
        sum(operation.cycles for operation in operations),
        analysis["flops"],
        analysis["bytes accessed"],
        compiled.memory_analysis().temp_size_in_bytes,
        operations,
        unknown,
    )


def report(what: str, batch: int, found: Cost) -> list[Row]:
    """Prints what was found of one step, and returns it as rows."""
    print(
        f"\n{what}, {batch} images a chip: {found.cycles / 1e6:.2f} M cycles, "
        f"{found.flops / 1e12:.3f} TFLOP, {found.bytes_accessed / 1e9:.2f} GB accessed, "
        f"{found.temporary_bytes / 1e6:.0f} MB temporary ({CAVEAT})",
        flush=True,
    )
    for cycles, name, origin in found.operations[:SHOWN]:
        print(f"{cycles:11,}  {name:30.30}  {origin[-86:]}")
    if found.unknown:
        listed = ", ".join(f"{count} {opcode}" for opcode, count in found.unknown.items())
        print(f"{'not counted':>11}  {listed}")
    figures = {
        "estimated cycles": found.cycles,
        "FLOPs": found.flops,
        "bytes accessed": found.bytes_accessed,
        "temporary bytes": found.temporary_bytes,
    }
    return [row(what, [value], unit, batch, DTYPE) for unit, value in figures.items()]


@exits_cleanly
def main() -> None:
    """Prints what the compiler says of each step, and writes it as rows if asked."""
    args = options(__doc__, quick="only v5e with 128 images a chip").parse_args()
    steps = {"ours": ours, "plain Flax": plain}
    rows, summary = [], []
    for chip in ("v5e",) if args.quick else CHIPS:
        for batch in BATCHES[:1] if args.quick else BATCHES:
            cycles = []
            for name, make in steps.items():
                found = cost(chip, make(batch))
                rows += report(f"{name} on {chip}", batch, found)
                cycles.append(found.cycles)
            ratio = cycles[0] / cycles[1]
            summary.append(f"{chip} {batch:4} images: {ratio:.2f} times plain Flax's cycles")
    print(f"\nOurs ({CAVEAT}):", *summary, sep="\n")
    write(rows, args.json)


if __name__ == "__main__":
    main()
