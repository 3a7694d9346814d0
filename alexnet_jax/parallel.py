"""How the pure steps are compiled and where their arrays lie: jit on one device, pmap on several.

Each kind is a function that returns the same five functions, so that the training loop does not
know which one drives it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.errors import UserError
from alexnet_jax.step import EvalStep, Metrics, TrainState, TrainStep

HostBatch = dict[str, np.ndarray]
PlacedBatch = dict[str, jax.Array]
MakeTrainStep = Callable[[str | None], TrainStep]
MakeEvalStep = Callable[[str | None], EvalStep]

PMAP_AXIS = "devices"


class Compiled(NamedTuple):
    """Compiled steps and how to bring arrays to and from them.

    Attributes:
      train_step: (placed state, placed batch) -> (placed state, placed metrics); the state
        passed in is donated.
      eval_step: (placed state, placed batch) -> placed sums.
      place: TrainState or a part of one -> the same on the devices.
      place_batch: this host's part of a batch -> the same on its devices; returns while the
        transfer goes on.
      fetch: placed state or metrics -> the same as one copy, without the device axis.
    """

    train_step: Callable
    eval_step: Callable
    place: Callable[[Any], Any]
    place_batch: Callable[[HostBatch], PlacedBatch]
    fetch: Callable[[TrainState | Metrics], TrainState | Metrics]


def axis_name(config: ConfigDict) -> str | None:
    """Returns the name of the mapped axis, None where the step is not mapped."""
    return PMAP_AXIS if kind(config) == "pmap" else None


def compile_steps(
    config: ConfigDict, make_train_step: MakeTrainStep, make_eval_step: MakeEvalStep
) -> Compiled:
    """Compiles both steps as config.parallel asks.

    Raises UserError if the kind does not exist, or the batch size does not divide.
    """
    check(config)
    compiled = KINDS[kind(config)](make_train_step, make_eval_step)
    seen_in_traces = jax.profiler.annotate_function(compiled.place_batch, name="place batch")
    return compiled._replace(place_batch=seen_in_traces)


def check(config: ConfigDict) -> None:
    """Raises UserError if the kind does not exist, or the batch size does not divide."""
    devices = jax.device_count() if kind(config) == "pmap" else 1
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


def kind(config: ConfigDict) -> str:
    """Returns the key of KINDS that config.parallel means. Raises UserError if there is none."""
    if config.parallel == "auto":
        return "pmap" if jax.device_count() > 1 else "jit"
    if config.parallel not in KINDS:
        raise UserError(f"parallel={config.parallel!r}; it can be auto, {', '.join(KINDS)}")
    return config.parallel


def _jit(make_train_step: MakeTrainStep, make_eval_step: MakeEvalStep) -> Compiled:
    return Compiled(
        train_step=jax.jit(make_train_step(None), donate_argnums=0),
        eval_step=jax.jit(make_eval_step(None)),
        place=jax.device_put,
        place_batch=jax.device_put,
        fetch=lambda tree: tree,
    )


def _pmap(make_train_step: MakeTrainStep, make_eval_step: MakeEvalStep) -> Compiled:
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), (PMAP_AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(PMAP_AXIS))

    def place_batch(batch: HostBatch) -> PlacedBatch:
        shares = jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch)
        return jax.device_put(shares, sharding)

    def place(state: Any) -> Any:
        copies = jax.tree.map(lambda x: np.broadcast_to(x, (len(devices), *np.shape(x))), state)
        return jax.device_put(copies, sharding)

    return Compiled(
        train_step=jax.pmap(make_train_step(PMAP_AXIS), PMAP_AXIS, donate_argnums=0),
        eval_step=jax.pmap(make_eval_step(PMAP_AXIS), PMAP_AXIS),
        place=place,
        place_batch=place_batch,
        fetch=lambda tree: jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree),
    )


KINDS = {"jit": _jit, "pmap": _pmap}
