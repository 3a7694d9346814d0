"""Orbax checkpoints: everything a run needs to go on, saved while it runs."""

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax.training.train_step import TrainState
from alexnet_jax.utils import distributed as hosts
from alexnet_jax.utils.errors import UserError, one_line

# Of an array that is the same on several devices Orbax has each write a share, for which it
# compiles a program a device: seconds at the first save, which only large shares give back.
LEAST_SHARE_BYTES = 2**20


class Restored(NamedTuple):
    """A checkpoint's content.

    Attributes:
      state: at rest, not yet placed (see `parallel.Compiled`).
      position: the Grain iterator's state; None in a network that was not trained here.
    """

    state: TrainState
    position: dict[str, Any] | None


class Checkpoints:
    """The checkpoints of one run: the latest `config.checkpoint.keep`, and the best by top-1.

    Writing goes on beside the training; `wait` and `close` return when all is on disk. Each
    checkpoint is a folder that gets its final name only when it is whole. All hosts of a run call
    the same methods in the same order; each writes the shards that it alone has. With `read_only`
    nothing is ever written, so that a run may be looked at while it trains.

    Raises UserError if the workdir cannot be written or holds a run of another config.
    """

    def __init__(self, workdir: Path, config: ConfigDict, read_only: bool = False):
        _share_large_arrays_only()
        self._folder = workdir.absolute() / "checkpoints"
        self._config = config
        policy = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(
                    [
                        policy.LatestN(config.checkpoint.keep),
                        policy.BestN(
                            n=1, get_metric_fn=_top1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
                best_fn=_top1,
                enable_async_checkpointing=True,
                read_only=read_only,
                create=not read_only,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Number of updates made in the newest checkpoint."""
        step: int | None = self._manager.latest_step()
        return step

    @property
    def all_steps(self) -> list[int]:
        """Number of updates made in each checkpoint, rising."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """Number of updates made in the checkpoint of the highest evaluated top-1."""
        step: int | None = self._manager.best_step()
        return step

    def was_evaluated(self, step: int) -> bool:
        """Whether the checkpoint of this step was saved with an evaluation of its state."""
        return step in self._manager.all_steps() and self._manager.metrics(step) is not None

    def save(
        self, state: TrainState, position: dict[str, Any] | None, top1: float | None = None
    ) -> None:
        """Starts saving; the arrays are copied before this returns.

        Args:
          state: at rest, as `Compiled.unplace` gives it.
          position: the Grain iterator's state after the batch of the state's last step; None: at
            the start.
          top1: of an evaluation of this very state, 0 to 1.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            if top1 is None or self.was_evaluated(step):
                return
            self._manager.delete(step)  # saved when the run was stopped before this evaluation
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave({"position": position, "checksums": _checksums(state)}),
                config=ocp.args.JsonSave(json.loads(configs.to_json(self._config))),
            ),
            metrics=None if top1 is None else {"top1": top1},
        )

    def restore_latest(
        self, like: TrainState, warn: Callable[[str], None] = hosts.say
    ) -> Restored | None:
        """Returns the newest checkpoint that can be read, None if the run has none.

        Those that cannot be read are said so, and moved to `damaged/` in the workdir once an older
        one was read. Raises UserError, and moves nothing, if there are some and none can be read.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self.restore(step, like)
            except ValueError as error:
                damaged[step] = one_line(error)[:200]
                continue
            for damaged_step, reason in damaged.items():
                where = self._set_aside(damaged_step)
                warn(f"checkpoint of step {damaged_step} is damaged, moved to {where}: {reason}")
            return restored
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise UserError(
                f"no checkpoint in {self._folder} can be read (step {step}: {reason}); put back a "
                "copy of one, or begin again in another --workdir"
            )
        return None

    def restore(self, step: int, like: TrainState) -> Restored:
        """Returns the checkpoint of one step; `like` gives shapes, dtypes and shardings.

        Raises ValueError, on all hosts, if one of them cannot read it or the arrays are not those
        that were saved.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
        )
        restored: Any = None
        fault: Exception | None = None
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # whatever Orbax or TensorStore make of the damage
            fault = error
        if hosts.any_process(fault is not None):
            raise ValueError(one_line(fault) if fault else "another host cannot read it") from fault
        if _checksums(restored["state"]) != restored["progress"].get("checksums"):
            raise ValueError("its checksum is not that of what was saved")
        return Restored(restored["state"], restored["progress"]["position"])

    def wait(self) -> None:
        """Returns when everything that `save` was given is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the threads."""
        self._manager.close()

    def _set_aside(self, step: int) -> Path:
        place = self._folder.parent / "damaged" / str(step)
        if hosts.is_first():
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            (self._folder / str(step)).rename(place)
        hosts.wait_for_all(f"set aside {step}")
        self._manager.reload()
        return place


@functools.cache
def _share_large_arrays_only() -> None:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Orbax warns that this takes its own handler's place
    ocp.type_handlers.register_type_handler(
        jax.Array,
        ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_SHARE_BYTES),
        override=True,
    )
    logger.setLevel(level)


def _top1(metrics: dict[str, float]) -> float:
    return metrics["top1"]


def _checksums(state: TrainState) -> list[int]:
    """TensorStore reads a flipped bit of a parameter back without a word, so we look ourselves."""
    return [int(checksum) for checksum in jax.tree.leaves(_checksum_leaves(state))]


@jax.jit
def _checksum_leaves(state: TrainState) -> Any:
    """Sums of whole numbers are the same in any order, so for any sharding of the arrays.

    Each 32-bit word is multiplied by an odd number of its place's own, so that no change of one
    word, nor two words in each other's places, go unseen.
    """

    def of_leaf(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, length in enumerate(x.shape):
            place = place * length + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(words * (place * jnp.uint32(2654435769) * 2 + 1), dtype=jnp.uint32)

    return jax.tree.map(of_leaf, state)
