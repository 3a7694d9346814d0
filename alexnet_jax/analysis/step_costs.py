"""Compiles the training step for devices that are not here, and estimates what a step costs.

The program tells the memory, the kernels and the bytes sent exactly. How long it takes is a model:
for TPUs, the cycles that libtpu's compiler estimates; for GPUs a roofline, the larger of bytes over
memory bandwidth and FLOPs over peak for each kernel. The time to send comes from link speeds.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.analysis import hlo
from alexnet_jax.analysis.targets import Target
from alexnet_jax.data.augment import Statistics, make_augment
from alexnet_jax.training import sharding
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.train_step import build_state, build_train_step

Costs = dict[str, Any]  # one layout in plan.json
KERNELS_SHOWN = 10


class CompiledStep(NamedTuple):
    """The training step of a config, compiled for the devices of a topology.

    Attributes:
      state: shapes, dtypes and shardings of the train state.
      batch: the same of a global batch.
      activations: bytes of the outputs of all layers on one chip, in the model's dtype.
      devices: in the order of the mesh.
    """

    config: ConfigDict
    program: Any  # jax.stages.Compiled, whose methods may return None on some backends
    state: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    activations: int
    devices: list[jax.Device]


def compile_step(
    config: ConfigDict, devices: list[jax.Device], options: dict[str, Any] | None = None
) -> CompiledStep:
    """Compiles the training step of a config as train.py does, for devices that are not here.

    Args:
      options: of the compiler, `Target.compiler_options`.
    """
    parallel, model, layers = sharding.build_network(config, devices)
    size, count = config.image_size, config.batch_size
    # The values do not matter, but the compiler would remove the color noise of a zero matrix.
    statistics = Statistics(np.zeros((size, size, 3), np.float32), np.eye(3, dtype=np.float32))
    steps_per_epoch = 1_281_167 / count  # ImageNet's; they change constants of the program only
    tx = make_optimizer(config, steps_per_epoch)
    augment = make_augment(config, statistics, steps_per_epoch)
    train_step = build_train_step(config, model, tx, augment)
    state = jax.eval_shape(lambda: build_state(config, model, tx))
    state = jax.tree.map(lambda x, s: x.update(sharding=s), state, parallel.state_shardings(state))
    batch = parallel.batch_like(config)
    jitted: Any = parallel.compile_train_step(train_step, state)
    values = sum(math.prod(layer.output_shape) for layer in layers)
    return CompiledStep(
        config,
        jitted.lower(state, batch).compile(compiler_options=options),
        state,
        batch,
        count // len(devices) * values * jnp.dtype(config.model.dtype).itemsize,
        list(parallel.mesh.devices.flat),
    )


def step_costs(step: CompiledStep, target: Target, num_hosts: int = 1) -> Costs:
    """Returns the memory, bytes and estimated time of one step, as plan.json has them."""
    config = step.config
    text = step.program.as_text()
    sent = _communication(step, text, target)
    memory = _memory(step)
    computed = (_computation_on_tpu if target.kind == "tpu" else _computation_on_gpu)(
        step, text, target
    )
    compute_s = computed["compute_s"]
    communication_s = sum(found["seconds"] for found in sent)
    step_s = compute_s + communication_s
    return {
        "layout": config.parallel,
        "gradient_dtype": config.optimizer.gradient_dtype,
        "devices": len(step.devices),
        "memory": memory,
        "fits": memory["total"] <= target.memory_bytes,
        "collectives": sent,
        "bytes_sent": sum(found["bytes_sent"] for found in sent),
        **computed,
        "communication_s": communication_s,
        "step_s": step_s,
        "step_s_if_all_overlaps": max(compute_s, communication_s),
        "images_per_s": config.batch_size / step_s,
        "images_per_s_per_host": config.batch_size / step_s / num_hosts,
    }


def _computation_on_tpu(step: CompiledStep, text: str, target: Target) -> Costs:
    operations, unknown = hlo.operation_cycles(text)
    cycles = sum(operation.cycles for operation in operations)
    analysis = step.program.cost_analysis() or {}
    return {
        "cycles": cycles,
        "operations_without_cycles": dict(unknown),
        "kernels": len(operations),
        "bytes_moved": analysis.get("bytes accessed", 0),
        "flops": {step.config.model.dtype: analysis.get("flops", 0)},
        "compute_s": cycles / target.hertz,
    }


def _computation_on_gpu(step: CompiledStep, text: str, target: Target) -> Costs:
    kernels = hlo.kernels(text)
    flops: Counter[str] = Counter()
    for kernel in kernels:
        flops[kernel.dtype] += kernel.flops
    slow = sorted(kernels, key=lambda kernel: -roofline_s(kernel, target))
    return {
        "kernels": sum(kernel.runs for kernel in kernels),
        "bytes_moved": sum(kernel.bytes_moved for kernel in kernels),
        "flops": {dtype: count for dtype, count in flops.items() if count},
        "compute_s": sum(roofline_s(kernel, target) for kernel in kernels),
        "slowest_kernels": [
            kernel._asdict() | {"seconds": roofline_s(kernel, target)}
            for kernel in slow[:KERNELS_SHOWN]
        ],
    }


def roofline_s(kernel: hlo.Kernel, target: Target) -> float:
    """Returns the least time that a kernel takes in all its runs, in seconds."""
    computing = kernel.flops / target.peak_flops[kernel.dtype] if kernel.flops else 0.0
    return max(kernel.bytes_moved / target.memory_bytes_per_s, computing)


def _memory(step: CompiledStep) -> dict[str, int]:
    """Returns the bytes of a chip's memory by use. Activations are among the temporaries."""

    def local_bytes(tree: Any) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    found = step.program.memory_analysis()
    return {
        "params": local_bytes(step.state.params),
        "optimizer": local_bytes(step.state.opt_state),
        "batch": local_bytes(step.batch),
        "temporaries": found.temp_size_in_bytes,
        "activations": step.activations,
        "total": (
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes
            + found.temp_size_in_bytes
            + found.generated_code_size_in_bytes
        ),
    }


def _communication(step: CompiledStep, text: str, target: Target) -> list[dict[str, Any]]:
    """Returns each collective of a program with its bytes, links and estimated time."""
    rows = []
    for found in hlo.collectives(text, len(step.devices)):
        links = 1
        # All GPUs of a machine are connected, each by links that count as one.
        if target.kind == "tpu" and found.kind != "collective-permute":
            coordinates = [tuple(device.coords) for device in step.devices]
            shape = tuple(np.max(coordinates, axis=0) + 1)
            group = [coordinates[position] for position in found.group]
            links = count_links(group, shape, target)
        rows.append(
            {
                "kind": found.kind,
                "dtypes": found.dtypes,
                "group": len(found.group),
                "runs": found.runs,
                "payload_bytes": found.payload_bytes,
                "bytes_sent": found.bytes_sent,
                "links": links,
                "seconds": seconds(found, links, target),
            }
        )
    return rows


def count_links(group: list[tuple[int, ...]], shape: tuple[int, ...], target: Target) -> int:
    """Returns how many links to neighbors each chip of a group can use for a collective.

    Along an axis of the topology on which the chips of the group are neighbors, these are two if
    they close a ring, and one otherwise, because the chips at the ends have one. Along other axes
    messages pass through chips of other groups, which use the same links at the same time.

    Args:
      group: coordinates of its chips.
      shape: of the topology.
    """
    count = 0
    for axis, length in enumerate(shape):
        positions = sorted({coordinates[axis] for coordinates in group})
        first, extent = positions[0], len(positions)
        if extent > 1 and positions == list(range(first, first + extent)):
            count += 2 if extent == length >= target.min_ring else 1
    return max(count, 1)


def seconds(collective: hlo.Collective, links: int, target: Target) -> float:
    """Returns how long a collective takes at the full rate of its links, without latency."""
    sent = collective.bytes_sent
    if collective.kind == "all-to-all":  # half of everything crosses the middle of a line or ring
        payload = collective.runs * collective.payload_bytes
        sent = max(sent, payload * len(collective.group) / 4)
    return sent / (links * target.link_bytes_per_s)
