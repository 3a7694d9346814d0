"""What do the compilers for GPUs and TPUs make of the training step, beside plain Flax's?

    python benchmarks/compiled.py

Needs their compilers (requirements-plan.txt), but no GPU or TPU. Nothing is measured: bytes are
what kernels read and write, the roofline is the least time for that, and cycles are libtpu's model
of a chip. They show where to look, not how fast the step is. Our step is the one of train.py,
with augmentation. Plain Flax's takes images that are augmented already.
"""

from typing import Any

import harness
import jax
import jax.numpy as jnp
import plain_flax

from alexnet_jax import config as configs
from alexnet_jax.analysis import hlo, step_costs, targets
from alexnet_jax.utils.errors import exits_cleanly

DTYPE = "bfloat16"
CASES = [  # topology, variant, batch
    ("h100:1", "owt", 256),
    ("h100:1", "paper", 256),
    ("h100:1", "bn", 1024),
    ("a100:1", "owt", 256),
    ("v5e:2x4", "owt", 256),  # the smallest topology; the step is that of one chip
    ("v6e:2x4", "owt", 256),
    ("v6e:2x4", "owt", 512),
]
QUICK = [("h100:1", "owt", 32)]
OPERATIONS_SHOWN = 10


def ours(variant: str, batch: int, device: jax.Device, options: dict[str, Any]) -> Any:
    """Compiles the step of train.py for one device."""
    config = configs.default_config()
    config.model.variant, config.model.dtype = variant, DTYPE
    config.batch_size, config.parallel = batch, "jit"
    return step_costs.compile_step(config, [device], options).program


def flaxs(variant: str, batch: int, device: jax.Device) -> Any:
    """Compiles plain Flax's step for one device."""
    model = plain_flax.PlainAlexNet(variant, dtype=DTYPE)
    arguments = (
        jax.eval_shape(lambda: plain_flax.init_state(model)),
        jax.ShapeDtypeStruct((batch, 224, 224, 3), DTYPE),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    on_device = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: x.update(sharding=on_device), arguments)
    options = {} if device.platform == "tpu" else targets.GPU_OPTIONS
    step = jax.jit(plain_flax.train_step, donate_argnums=0)
    return step.lower(*placed).compile(compiler_options=options)


def rows_of(name: str, program: Any, target: targets.Target, batch: int) -> list[harness.Row]:
    """Prints and returns what a program costs, the time or the cycles first."""
    values: dict[str, float] = {}
    if target.kind == "gpu":
        kernels = hlo.kernels(program.as_text())
        times = [step_costs.roofline_s(kernel, target) for kernel in kernels]
        values["ms, roofline"] = 1e3 * sum(times)
        values["GB moved"] = sum(kernel.bytes_moved for kernel in kernels) / 1e9
        values["kernels"] = sum(kernel.runs for kernel in kernels)
        slowest = sorted(zip(times, kernels, strict=True), reverse=True)
        listed = [f"{1e3 * s:9.3f} ms  {k.name:36.36}  {k.origin[-86:]}" for s, k in slowest]
    else:
        operations, unknown = hlo.operation_cycles(program.as_text())
        values["M cycles"] = sum(operation.cycles for operation in operations) / 1e6
        values["GB moved"] = program.cost_analysis()["bytes accessed"] / 1e9
        listed = [f"{o.cycles:12,}  {o.name:36.36}  {o.origin[-86:]}" for o in operations]
        listed[OPERATIONS_SHOWN:] = [f" not counted  {n} {opcode}" for opcode, n in unknown.items()]
    values["MB temporary"] = program.memory_analysis().temp_size_in_bytes / 1e6
    rows = [harness.row(name, [value], unit, batch, DTYPE) for unit, value in values.items()]
    harness.show(rows)
    print(*listed[: OPERATIONS_SHOWN + 3], sep="\n", flush=True)
    return rows


@exits_cleanly
def main() -> None:
    args = harness.parser(__doc__, quick="a small batch for one GPU").parse_args()
    rows = []
    for topology, variant, batch in QUICK if args.quick else CASES:
        target, (device, *_) = targets.topology_devices(topology)
        what = f"{variant} on {topology.partition(':')[0]}"
        program = ours(variant, batch, device, target.compiler_options)
        rows += rows_of(f"ours, {what}", program, target, batch)
        if variant in plain_flax.CONVOLUTIONS:
            program = flaxs(variant, batch, device)
            rows += rows_of(f"plain Flax, {what}", program, target, batch)
        harness.write(rows, args.json)


if __name__ == "__main__":
    main()
