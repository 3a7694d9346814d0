"""Compiles the training step for a TPU slice without having one, and estimates what a step costs.

libtpu compiles for any topology on a CPU. Its program tells the memory and the bytes sent exactly.
Cycles are libtpu's own estimates, and the time to send comes from published link speeds.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from alexnet_jax.analysis import hlo
from alexnet_jax.data.augment import Statistics, make_augment
from alexnet_jax.training import sharding
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.train_step import init_state, make_train_step
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.process import TPU_OPTIONS

Costs = dict[str, Any]  # one layout in plan.json


class Chip(NamedTuple):
    """Published numbers of one chip (docs.cloud.google.com/tpu/docs/v5e, …/v5p-training, …/v6e).

    Attributes:
      hbm_bytes: memory.
      link_bytes_per_s: bandwidth of one link to a neighbor, in one direction.
      hertz: clock rate. It is not published; this value makes the products per cycle of the matrix
        units the published peak.
      min_ring: length from which on the ends of a topology's axis are linked too.
    """

    hbm_bytes: float
    link_bytes_per_s: float
    hertz: float
    min_ring: int


CHIPS = {
    # 400 GB/s in both directions over 4 ports; 197 TFLOP/s of 4 units of 128 × 128.
    "v5e": Chip(16e9, 50e9, 1.5e9, 16),
    # 4,800 Gbit/s, counted as v5e's 1,600, over 6 ports; 459 TFLOP/s of 8 units of 128 × 128.
    "v5p": Chip(95e9, 100e9, 1.75e9, 4),
    # 3,200 Gbit/s over 4 ports; 918 TFLOP/s, at v5p's clock rate.
    "v6e": Chip(32e9, 100e9, 1.75e9, 16),
}


def topology_devices(topology: str) -> tuple[Chip, list[jax.Device]]:
    """Returns the chip and the devices of a topology such as "v5e:16x16".

    Raises:
      UserError: libtpu is not installed or does not know the topology.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(
            f"--topology={topology} is not a topology; write it like v5e:16x16, with one of "
            f"{', '.join(CHIPS)}"
        )
    if not importlib.util.find_spec("libtpu"):
        wanted = [need for need in importlib.metadata.requires("jax") or [] if "libtpu" in need]
        spec = wanted[0].partition(";")[0].strip() if wanted else "libtpu"
        raise UserError(f"libtpu, which compiles for TPUs, is not installed: pip install '{spec}'")
    with _no_local_tpu():
        try:
            found = topologies.get_topology_desc(topology, platform="tpu")
        except Exception as error:  # libtpu raises several types
            raise UserError(f"libtpu knows no topology {topology}: {one_line(error)}") from error
    return CHIPS[name], list(found.devices)


@contextlib.contextmanager
def _no_local_tpu() -> Iterator[None]:
    """Keeps libtpu from looking for a TPU, asking Google Cloud for it, and locking it."""
    before = dict(os.environ)
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


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


def compile_step(config: ConfigDict, devices: list[jax.Device]) -> CompiledStep:
    """Compiles the training step of a config as train.py does, for devices that are not here."""
    parallel, model, layers = sharding.build_network(config, devices)
    size, count = config.image_size, config.batch_size
    # The values do not matter, but the compiler would remove the color noise of a zero matrix.
    statistics = Statistics(np.zeros((size, size, 3), np.float32), np.eye(3, dtype=np.float32))
    steps_per_epoch = 1_281_167 / count  # ImageNet's; they change constants of the program only
    tx = make_optimizer(config, steps_per_epoch)
    train_step = make_train_step(
        model,
        tx,
        make_augment(config, statistics, steps_per_epoch),
        accumulate_steps=config.optimizer.accumulate_steps,
        log_grad_norm=bool(config.optimizer.clip_norm),
    )
    crop = (config.augment.crop_size, config.augment.crop_size, 3)
    state = jax.eval_shape(lambda: init_state(model, tx, config.seed, crop))
    state = jax.tree.map(lambda x, s: x.update(sharding=s), state, parallel.state_shardings(state))
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.batch_sharding)
        for name, shape, dtype in (
            ("image", (count, size, size, 3), jnp.uint8),
            ("label", (count,), jnp.int32),
        )
    }
    jitted: Any = parallel.compile_train_step(train_step, state)
    options = TPU_OPTIONS if devices[0].platform == "tpu" else {}
    values = sum(math.prod(layer.output_shape) for layer in layers)
    return CompiledStep(
        config,
        jitted.lower(state, batch).compile(compiler_options={**options}),
        state,
        batch,
        count // len(devices) * values * jnp.dtype(config.model.dtype).itemsize,
        list(parallel.mesh.devices.flat),
    )


def step_costs(step: CompiledStep, chip: Chip, num_hosts: int) -> Costs:
    """Returns the memory, bytes and estimated time of one step, as plan.json has them."""
    config, chips = step.config, len(step.devices)
    text = step.program.as_text()
    operations, unknown = hlo.operation_cycles(text)
    cycles = sum(operation.cycles for operation in operations)
    sent = _communication(step, text, chip)
    memory = _memory(step)
    compute_s = cycles / chip.hertz
    communication_s = sum(found["seconds"] for found in sent)
    step_s = compute_s + communication_s
    return {
        "layout": config.parallel,
        "gradient_dtype": config.optimizer.gradient_dtype,
        "chips": chips,
        "memory": memory,
        "fits": memory["total"] <= chip.hbm_bytes,
        "collectives": sent,
        "bytes_sent": sum(found["bytes_sent"] for found in sent),
        "cycles": cycles,
        "operations_without_cycles": dict(unknown),
        "compute_s": compute_s,
        "communication_s": communication_s,
        "step_s": step_s,
        "step_s_if_all_overlaps": max(compute_s, communication_s),
        "images_per_s": config.batch_size / step_s,
        "images_per_s_per_host": config.batch_size / step_s / num_hosts,
    }


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


def _communication(step: CompiledStep, text: str, chip: Chip) -> list[dict[str, Any]]:
    """Returns each collective of a program with its bytes, links and estimated time."""
    coordinates = [tuple(device.coords) for device in step.devices]
    shape = tuple(np.max(coordinates, axis=0) + 1)
    rows = []
    for found in hlo.collectives(text, len(coordinates)):
        group = [coordinates[position] for position in found.group]
        links = count_links(group, shape, chip) if found.kind != "collective-permute" else 1
        rows.append(
            {
                "kind": found.kind,
                "dtypes": found.dtypes,
                "group": len(found.group),
                "runs": found.runs,
                "payload_bytes": found.payload_bytes,
                "bytes_sent": found.bytes_sent,
                "links": links,
                "seconds": seconds(found, links, chip),
            }
        )
    return rows


def count_links(group: list[tuple[int, ...]], shape: tuple[int, ...], chip: Chip) -> int:
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
            count += 2 if extent == length >= chip.min_ring else 1
    return max(count, 1)


def seconds(collective: hlo.Collective, links: int, chip: Chip) -> float:
    """Returns how long a collective takes at the full rate of its links, without latency."""
    sent = collective.bytes_sent
    if collective.kind == "all-to-all":  # half of everything crosses the middle of a line or ring
        payload = collective.runs * collective.payload_bytes
        sent = max(sent, payload * len(collective.group) / 4)
    return sent / (links * chip.link_bytes_per_s)
