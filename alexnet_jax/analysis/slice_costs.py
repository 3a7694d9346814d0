"""What the compiler says of one way of sharing the training step over a TPU slice."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.analysis import tpu
from alexnet_jax.data import augment
from alexnet_jax.models.alexnet import layer_table
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import placement
from alexnet_jax.training import sharding as parallel
from alexnet_jax.training import train_step as step
from alexnet_jax.utils import process as runtime

# Slices that can be had of the two-dimensional kinds, and for scale below them one chip.
SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}

Row = dict[str, Any]


class Layout(NamedTuple):
    """One way of sharing the step over a topology, compiled.

    Attributes:
      config: of this layout.
      compiled: its functions and shardings.
      state: shapes and dtypes, whole.
      program: the training step for the topology's chips.
      mesh_places: coordinates of the chips in the order of the mesh.
    """

    config: ConfigDict
    compiled: parallel.Compiled
    state: step.TrainState
    program: Any
    mesh_places: list[tuple[int, ...]]


def compile_layout(config: ConfigDict, devices: list[jax.Device]) -> Layout:
    """Compiles the training step of a config, as train.py would, for devices that are not here."""
    model = parallel.build_model(config)
    size = config.augment.crop_size
    parallel.check_layers(config, layer_table(model, (size, size, 3)), len(devices))
    zero = np.zeros((config.image_size, config.image_size, 3), np.float32)
    stats = augment.Statistics(zero, np.eye(3, dtype=np.float32))
    schedule = optim.make_schedule(config, 1_281_167 / config.batch_size)
    state = jax.eval_shape(lambda: step.init_state(model, config))
    compiled = parallel.compile_steps(config, model, stats, schedule, devices)
    placed = jax.tree.map(lambda x, s: x.update(sharding=s), state, compiled.shardings)
    lowered = compiled.train_step.lower(placed, batch_of(config, compiled.batch_sharding))
    program = lowered.compile(compiler_options={**runtime.TPU_OPTIONS})
    mesh = placement.make_mesh(config, devices)
    places = [tuple(device.coords) for device in mesh.devices.flat]
    return Layout(config, compiled, state, program, places)


def batch_of(config: ConfigDict, sharding: jax.sharding.Sharding) -> dict[str, Any]:
    """Returns the shapes of a global batch."""
    image = (config.batch_size, config.image_size, config.image_size, 3)
    return {
        "image": jax.ShapeDtypeStruct(image, jnp.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct(image[:1], jnp.int32, sharding=sharding),
    }


def memory(layout: Layout) -> dict[str, int]:
    """Returns the bytes of a chip's memory by what they are for.

    Activations are what the layers put out, in the model's dtype; the compiler keeps them among
    the temporaries, and not always all.
    """

    def shards(tree: Any, shardings: Any) -> int:
        sizes = jax.tree.map(
            lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize,
            tree,
            shardings,
        )
        return sum(jax.tree.leaves(sizes))

    config, compiled = layout.config, layout.compiled
    size = config.augment.crop_size
    outputs = layer_table(parallel.build_model(config), (size, size, 3))
    images = config.batch_size / len(layout.mesh_places)
    values = sum(math.prod(row.output_shape) for row in outputs)
    activations = int(images * values * jnp.dtype(config.model.dtype).itemsize)
    found = layout.program.memory_analysis()
    total = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    batch = batch_of(config, compiled.batch_sharding)
    return {
        "params": shards(layout.state.params, compiled.shardings.params),
        "optimizer": shards(layout.state.opt_state, compiled.shardings.opt_state),
        "batch": shards(batch, jax.tree.map(lambda x: x.sharding, batch)),
        "temporaries": found.temp_size_in_bytes,
        "activations": activations,
        "total": total,
    }


def communication(layout: Layout, text: str, chip: tpu.Chip) -> list[Row]:
    """Returns every collective of a compiled step's text with its bytes, links and time."""
    chips = len(layout.mesh_places)
    shape = tuple(np.max(layout.mesh_places, axis=0) + 1)
    rows = []
    for found in tpu.collectives(text, chips):
        places = [layout.mesh_places[place] for place in found.group]
        links = tpu.links(places, shape, chip)
        rows.append(
            {
                "kind": found.kind,
                "dtypes": found.dtypes,
                "group": len(found.group),
                "payload_bytes": found.payload_bytes,
                "bytes_sent": found.bytes_sent,
                "links": links,
                "seconds": tpu.seconds(found, links, chip),
            }
        )
    return rows


def row_of(layout: Layout, chip: tpu.Chip, hosts: int) -> Row:
    """Returns all that is told of one layout."""
    config, chips = layout.config, len(layout.mesh_places)
    text = layout.program.as_text()
    operations, unknown = tpu.entry_operations(text)
    cycles = sum(operation.cycles for operation in operations)
    sent = communication(layout, text, chip)
    held = memory(layout)
    compute_s = cycles / chip.hertz
    send_s = sum(found["seconds"] for found in sent)
    step_s = compute_s + send_s
    return {
        "layout": config.parallel,
        "gradient_dtype": config.optimizer.gradient_dtype,
        "chips": chips,
        "memory": held,
        "fits": held["total"] <= chip.hbm_bytes,
        "collectives": sent,
        "bytes_sent": sum(found["bytes_sent"] for found in sent),
        "cycles": cycles,
        "operations_without_cycles": dict(unknown),
        "compute_s": compute_s,
        "communication_s": send_s,
        "step_s": step_s,
        "step_s_if_all_overlaps": max(compute_s, send_s),
        "images_per_s": config.batch_size / step_s,
        "images_per_s_of_a_host": config.batch_size / step_s / hosts,
    }


def scaling(row: Row, layout: Layout, topology: str, chip: tpu.Chip) -> list[tuple[int, float]]:
    """Returns (chips, images a second) of smaller slices, each chip with as many images.

    A chip computes and sends the same as in the compiled program; how many take part in a
    collective, and over how many links, is the slice's own. So there is no figure for one chip
    but of data parallelism, since of the others it would hold and update more.
    """
    name = topology.partition(":")[0]
    per_chip = layout.config.batch_size // row["chips"]
    parts = placement.fc_parts(layout.config, row["chips"])
    found = []
    for chips, shape in SLICES.items():
        shared = layout.config.parallel != "mesh.data"
        if chips >= row["chips"] or chips < parts or (shared and chips == 1):
            continue
        send_s = 0.0
        if chips > 1:
            _, devices = tpu.topology_devices(f"{name}:{shape}")
            mesh = placement.make_mesh(layout.config, devices).devices.reshape(-1, parts)
            lengths = tuple(int(length) for length in shape.split("x"))
            for collective in row["collectives"]:
                of = {row["chips"]: mesh.ravel(), parts: mesh[0]}
                group = of.get(collective["group"], mesh[:, 0])
                places = [tuple(device.coords) for device in group]
                one = tpu.Collective(
                    collective["kind"], "", collective["payload_bytes"], tuple(range(len(group)))
                )
                if len(group) > 1:
                    send_s += tpu.seconds(one, tpu.links(places, lengths, chip), chip)
        found.append((chips, chips * per_chip / (row["compute_s"] + send_s)))
    return [*found, (row["chips"], row["images_per_s"])]
