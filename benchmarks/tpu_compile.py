"""What does the TPU compiler estimate for the training step, beside plain Flax's? Needs no TPU.

    python benchmarks/tpu_compile.py

Compiles variant owt in bfloat16 for one chip with libtpu, about a minute per step. Nothing is
measured: estimated cycles are the compiler's model of the chip. They show where to look, not how
fast the step is. Augmentation is left out; both steps take bfloat16 images. Ours is compiled with
the options that train.py sets.
"""

from typing import Any

import harness
import jax
import jax.numpy as jnp
import our_step
import plain_flax

from alexnet_jax.analysis import hlo, targets
from alexnet_jax.utils.errors import exits_cleanly
from alexnet_jax.utils.process import TPU_OPTIONS

CHIPS = {"v5e": "v5e:2x4", "v6e": "v6e:2x4"}  # the smallest topologies
BATCHES = (128, 256, 512)
VARIANT, DTYPE = "owt", "bfloat16"
OPERATIONS_SHOWN = 10


def compile_step(name: str, chip: str, batch: int) -> jax.stages.Compiled:
    """Compiles "ours" or "plain Flax" for one chip."""
    images, labels = jax.eval_shape(lambda: our_step.inputs(batch))
    inputs: tuple[Any, ...] = (images.update(dtype=jnp.dtype(DTYPE)), labels)
    if name == "ours":
        step, options = our_step.train_step(VARIANT, DTYPE), TPU_OPTIONS
        state = jax.eval_shape(lambda: our_step.init_state(VARIANT, DTYPE))
    else:
        step, options = plain_flax.train_step, {}
        model = plain_flax.PlainAlexNet(VARIANT, dtype=DTYPE)
        state = jax.eval_shape(lambda: plain_flax.init_state(model))
        inputs += (jax.eval_shape(lambda: jax.random.key(0)),)
    _, devices = targets.topology_devices(CHIPS[chip])
    on_chip = jax.sharding.SingleDeviceSharding(devices[0])
    arguments = jax.tree.map(lambda x: x.update(sharding=on_chip), (state, *inputs))
    return jax.jit(step, donate_argnums=0).lower(*arguments).compile(compiler_options=options)


def measure(name: str, chip: str, batch: int) -> list[harness.Row]:
    """Prints and returns the rows of one step, the estimated cycles first."""
    compiled = compile_step(name, chip, batch)
    operations, unknown = hlo.operation_cycles(compiled.as_text())
    analysis = compiled.cost_analysis()
    values = {
        "M cycles": sum(operation.cycles for operation in operations) / 1e6,
        "TFLOP": analysis["flops"] / 1e12,
        "GB accessed": analysis["bytes accessed"] / 1e9,
        "MB temporary": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    rows = [
        harness.row(f"{name} on {chip}, estimate", [value], unit, batch, DTYPE)
        for unit, value in values.items()
    ]
    harness.show(rows)
    for cycles, operation, origin in operations[:OPERATIONS_SHOWN]:
        print(f"{cycles:11,}  {operation:30.30}  {origin[-86:]}")
    for opcode, count in unknown.items():
        print(f"{'not counted':>11}  {count} {opcode}", flush=True)
    return rows


@exits_cleanly
def main() -> None:
    args = harness.parser(__doc__, quick="only v5e, a small batch").parse_args()
    rows = []
    for chip in ("v5e",) if args.quick else CHIPS:
        for batch in (16,) if args.quick else BATCHES:
            ours, plain = (measure(name, chip, batch) for name in ("ours", "plain Flax"))
            cycles = [ours[0]["median"]], [plain[0]["median"]]
            what = f"ours / plain Flax on {chip}, estimated cycles"
            rows += [*ours, *plain, harness.ratio(what, *cycles, batch=batch, dtype=DTYPE)]
            harness.show(rows[-1:])
            harness.write(rows, args.json)


if __name__ == "__main__":
    main()
