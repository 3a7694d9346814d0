"""How the pure steps are compiled and where their arrays lie: one device, several, or a pod.

What a device has besides its share of the batch:

    jit          everything: there is but one device
    pmap         all parameters
    mesh.data    all parameters
    mesh.zero    a share of each large parameter and of its velocity; parameters are gathered for
                 each step (ZeRO, arXiv 1910.02054)
    mesh.hybrid  conv1 to conv5, and a share of fc6 to fc8 ("One weird trick", arXiv 1404.5997)

Each kind is a function that returns the same `Compiled`, so that the training loop does not know
which one drives it.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.stages import Wrapped
from jaxtyping import Int64
from ml_collections import ConfigDict

from alexnet_jax.data.augment import Statistics
from alexnet_jax.models.alexnet import AlexNet, LayerRow
from alexnet_jax.training import placement
from alexnet_jax.training.optimizer import Schedule, trainable
from alexnet_jax.training.placement import DATA_AXIS, PMAP_AXIS, WHOLE, Devices, Tree, kind
from alexnet_jax.training.train_step import (
    UNSPREAD,
    EvalStep,
    Spread,
    TrainState,
    TrainStep,
    init_state,
    make_eval_step,
    make_train_step,
)
from alexnet_jax.utils.errors import UserError

HostBatch = dict[str, np.ndarray]
PlacedBatch = dict[str, jax.Array]
MakeTrainStep = Callable[[Spread], TrainStep]
MakeEvalStep = Callable[[Spread], EvalStep]

GRADIENT_DTYPES = ("float32", "bfloat16")


class Compiled(NamedTuple):
    """Compiled steps and how to bring arrays to and from them.

    At rest, which is outside of the steps and in checkpoints, the state is one copy, of global
    arrays: whole on every device, or sharded.

    Attributes:
      train_step: (placed state, placed batch) -> (placed state, placed metrics); the state
        passed in is donated.
      eval_step: (placed state, placed batch) -> placed sums.
      shardings: of the state at rest, a tree like it.
      place: a state at rest, or a part of one -> the same as the steps take it.
      unplace: the way back.
      batch_sharding: of a batch.
      place_batch: this host's part of a batch -> the same on its devices; returns while the
        transfer goes on.
      own_places: which places of every global batch are this host's, rising.
    """

    train_step: Wrapped
    eval_step: Wrapped
    shardings: Tree
    place: Callable[[Tree], Tree]
    unplace: Callable[[Tree], Tree]
    batch_sharding: Sharding
    place_batch: Callable[[HostBatch], PlacedBatch]
    own_places: Int64[np.ndarray, " share"]


def build_model(config: ConfigDict) -> AlexNet:
    """Returns the network of `config.model`. Raises UserError for a variant that does not exist."""
    fields = config.model
    return AlexNet(
        variant=fields.variant,
        num_classes=fields.num_classes,
        dtype=fields.dtype,
        dropout=fields.dropout,
        initializer=fields.init,
        hidden_bias=fields.hidden_bias,
        width=fields.width,
        batch_axes=placement.batch_axes(config),
        fc_axis=placement.fc_axis(config),
        frozen=tuple(config.freeze),
    )


def compile_steps(
    config: ConfigDict,
    model: AlexNet,
    stats: Statistics,
    schedule: Schedule,
    devices: Devices | None = None,
) -> Compiled:
    """Compiles both steps of a model as config.parallel asks.

    Args:
      devices: all of them, over all hosts, by default those that there are.

    Raises UserError as `check` does.
    """
    devices = devices or jax.devices()
    check(config, len(devices))
    compiled = KINDS[kind(config)](
        config,
        functools.partial(make_train_step, model, config, stats, schedule),
        functools.partial(make_eval_step, model, config, stats),
        jax.eval_shape(functools.partial(init_state, model, config)),
        devices,
    )
    seen_in_traces = jax.profiler.annotate_function(compiled.place_batch, name="place batch")
    return compiled._replace(place_batch=seen_in_traces)


def check(config: ConfigDict, devices: int | None = None) -> None:
    """Raises UserError if the kind does not exist, or the batch or the devices do not divide."""
    chosen = kind(config)
    devices = devices or jax.device_count()
    if chosen == "jit":
        if jax.process_count() > 1:
            raise UserError("parallel=jit runs on one process alone; take --config.parallel=auto")
        devices = 1
    if config.optimizer.gradient_dtype not in GRADIENT_DTYPES:
        raise UserError(
            f"optimizer.gradient_dtype={config.optimizer.gradient_dtype!r}; it can be "
            f"{', '.join(GRADIENT_DTYPES)}"
        )
    parts = devices * config.optimizer.accumulate_steps
    if config.batch_size <= 0 or config.optimizer.accumulate_steps <= 0:
        raise UserError("batch_size and optimizer.accumulate_steps must be at least 1")
    if config.batch_size % parts:
        below = config.batch_size // parts * parts
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by {devices} device(s) × "
            f"{config.optimizer.accumulate_steps} accumulation step(s); try "
            f"--config.batch_size={below + parts}"
        )
    if chosen == "mesh.hybrid" and devices % placement.group_size(config, devices):
        raise UserError(
            f"{devices} devices do not divide into groups of hybrid_group={config.hybrid_group}"
        )


def check_layers(config: ConfigDict, layers: list[LayerRow], devices: int | None = None) -> None:
    """Raises UserError if a group of devices cannot share the fc layers evenly."""
    parts = placement.fc_parts(config, devices)
    for row in layers:
        units = math.prod(row.output_shape)
        if row.name in ("pool5", "fc6", "fc7") and units % parts:
            raise UserError(
                f"the {units} values of {row.name} cannot be split over groups of {parts} "
                "devices; set another --config.hybrid_group"
            )


def _jit(
    config: ConfigDict,
    train_step_of: MakeTrainStep,
    eval_step_of: MakeEvalStep,
    state: TrainState,
    devices: Devices,
) -> Compiled:
    sharding = SingleDeviceSharding(devices[0])
    return Compiled(
        train_step=jax.jit(train_step_of(UNSPREAD), donate_argnums=0),
        eval_step=jax.jit(eval_step_of(UNSPREAD)),
        shardings=jax.tree.map(lambda _: sharding, state),
        place=lambda tree: tree,
        unplace=lambda tree: tree,
        batch_sharding=sharding,
        place_batch=lambda batch: jax.device_put(batch, sharding),
        own_places=np.arange(config.batch_size),
    )


def _pmap(
    config: ConfigDict,
    train_step_of: MakeTrainStep,
    eval_step_of: MakeEvalStep,
    state: TrainState,
    devices: Devices,
) -> Compiled:
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    local = [device for device in devices if device.process_index == jax.process_index()]
    mesh = Mesh(np.array(devices), (PMAP_AXIS,))
    at_rest = NamedSharding(mesh, WHOLE)
    on_local = NamedSharding(Mesh(np.array(local), (PMAP_AXIS,)), PartitionSpec(PMAP_AXIS))
    mean = functools.partial(
        _mean, axes=(PMAP_AXIS,), dtype=config.optimizer.gradient_dtype, devices=len(devices)
    )
    spread = Spread(mean=lambda gradients: jax.tree.map(mean, gradients))

    def place_batch(batch: HostBatch) -> PlacedBatch:
        shares = jax.tree.map(lambda x: x.reshape(len(local), -1, *x.shape[1:]), batch)
        placed: PlacedBatch = jax.device_put(shares, on_local)
        return placed

    def place(x: jax.Array) -> jax.Array:
        copies = {shard.device: shard.data[None] for shard in x.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            (len(local), *x.shape), on_local, [copies[device] for device in local]
        )

    def unplace(x: jax.Array) -> jax.Array:
        copies = [shard.data[0] for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape[1:], at_rest, copies)

    return Compiled(
        train_step=jax.pmap(train_step_of(spread), PMAP_AXIS, devices=devices, donate_argnums=0),
        eval_step=jax.pmap(eval_step_of(spread), PMAP_AXIS, devices=devices),
        shardings=jax.tree.map(lambda _: at_rest, state),
        place=functools.partial(jax.tree.map, place),
        unplace=functools.partial(jax.tree.map, unplace),
        batch_sharding=on_local,
        place_batch=place_batch,
        own_places=placement.own_places(
            NamedSharding(mesh, PartitionSpec(PMAP_AXIS)), config.batch_size
        ),
    )


def _mesh(
    config: ConfigDict,
    train_step_of: MakeTrainStep,
    eval_step_of: MakeEvalStep,
    state: TrainState,
    devices: Devices,
) -> Compiled:
    mesh = placement.make_mesh(config, devices)
    specs = placement.parameter_specs(config, state.params, mesh)
    spread = _mesh_spread(config, specs, mesh)
    shardings = placement.like_parameters(state, (specs, trainable(specs, config.freeze)), mesh)
    batch_sharding = NamedSharding(mesh, PartitionSpec(placement.batch_axes(config)))
    on_all = NamedSharding(mesh, WHOLE)
    own = placement.own_places(batch_sharding, config.batch_size)

    def place(x: np.ndarray) -> jax.Array:
        def share(index: tuple[slice, ...]) -> np.ndarray:
            rows = range(config.batch_size)[index[0]]
            start = int(np.searchsorted(own, rows.start))
            return x[start : start + len(rows)]

        return jax.make_array_from_callback(
            (config.batch_size, *x.shape[1:]),
            batch_sharding,
            share,  # type: ignore[arg-type]  # it is never given None
        )

    return Compiled(
        train_step=jax.jit(
            train_step_of(spread),
            in_shardings=(shardings, batch_sharding),
            out_shardings=(shardings, on_all),
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            eval_step_of(spread),
            in_shardings=(shardings, batch_sharding),
            out_shardings=on_all,
        ),
        shardings=shardings,
        place=lambda tree: tree,
        unplace=lambda tree: tree,
        batch_sharding=batch_sharding,
        place_batch=functools.partial(jax.tree.map, place),
        own_places=own,
    )


def _mesh_spread(config: ConfigDict, specs: Tree, mesh: Mesh) -> Spread:
    axes = placement.batch_axes(config)
    # ZeRO's gradients leave the devices as shards; its parameters reach them whole.
    inside = jax.tree.map(lambda _: WHOLE, specs) if kind(config) == "mesh.zero" else specs
    in_specs = (inside, PartitionSpec(axes), WHOLE)
    of_gradients, inside = trainable(specs, config.freeze), trainable(inside, config.freeze)
    spread_out = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    def mean(gradient: jax.Array, spec: PartitionSpec, spec_inside: PartitionSpec) -> jax.Array:
        held = jax.tree.leaves(tuple(spec_inside))
        over = tuple(axis for axis in axes if axis not in held)
        scatter = None if spec == spec_inside else spec.index(DATA_AXIS)
        return _mean(gradient, over, config.optimizer.gradient_dtype, mesh.size, scatter)

    return Spread(
        gradients=functools.partial(spread_out, in_specs=in_specs, out_specs=(of_gradients, WHOLE)),
        sums=functools.partial(spread_out, in_specs=in_specs, out_specs=WHOLE),
        mean=lambda gradients: jax.tree.map(mean, gradients, of_gradients, inside),
    )


KINDS = {"jit": _jit, "pmap": _pmap, "mesh.data": _mesh, "mesh.zero": _mesh, "mesh.hybrid": _mesh}


def _mean(
    gradient: jax.Array,
    axes: tuple[str, ...],
    dtype: str,
    devices: int,
    scatter: int | None = None,
) -> jax.Array:
    """The sum over mapped axes, in `dtype` on its way, over the number of all devices.

    Of a sum of shares of the loss, each of which is a mean over one device's images.
    """
    sent = gradient.astype(dtype)
    total: jax.Array
    if scatter is None:
        total = jax.lax.psum(sent, axes)
    else:
        total = jax.lax.psum_scatter(sent, axes, scatter_dimension=scatter, tiled=True)
    return total.astype(jnp.float32) / devices
