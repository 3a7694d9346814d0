"""Checkpoints: the training state and the position in the data, written by Orbax during training.

A checkpoint is the folder `checkpoints/<step>` of the workdir with four items:

    state      the arrays of the TrainState
    progress   JSON: the data position, and a checksum of each array
    config     JSON: the run's config
    metrics    JSON: the top-1 accuracy, if this state was evaluated

A thread writes them while training continues. Orbax renames the folder when it is complete, so that
a killed run leaves no partial checkpoint under a valid name. In a run of several processes each one
writes the shards that it holds.
"""

import contextlib
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from alexnet_jax import __version__
from alexnet_jax.training.optimizer import without_frozen
from alexnet_jax.training.train_step import TrainState
from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.files import checkpoint_steps

# Orbax lets each device write a part of a replicated array, for which it compiles one program per
# device. At the first save this takes seconds, which only pays off for large parts.
MIN_PART_BYTES = 2**20


class Restored(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      state: the saved state, with the shardings that were asked for.
      position: state of the Grain iterator. None: the start of the data.
    """

    state: TrainState
    position: dict[str, Any] | None


class Snapshot(NamedTuple):
    """What `Checkpoints.write` writes: a copy of a state, which the next steps do not overwrite.

    Attributes:
      step: the state's step.
      state: the copy, on the devices.
      checksums: uint32[number of arrays]
      is_finite: bool[], whether all parameters are finite.
      position: state of the Grain iterator after this step's batch. None: the start.
      top1: accuracy of exactly this state, 0 to 1, if it was evaluated.
    """

    step: int
    state: TrainState
    checksums: jax.Array
    is_finite: jax.Array
    position: dict[str, Any] | None
    top1: float | None


class NotFinite(Exception):
    """A parameter is infinite or NaN, so the state must not be saved."""


class _Manager(ocp.CheckpointManager):  # type: ignore[misc]  # Orbax has no types
    """Leaves JAX's preemption service to `process.StopRequest`.

    Orbax would ask it from its threads, and by the number of a training step. The service expects
    one count that all processes advance together.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run.

    All processes of a run must call the same methods in the same order. `wait` and `close` return
    when everything is on disk.

    Args:
      workdir: folder of the run.
      config_json: the run's config, which is stored with each checkpoint. None opens the
        checkpoints read-only, for example those of a run that is still training.
      keep: number of latest checkpoints to keep. The one with the best top-1 is kept as well.
      is_shared: whether all processes have the same workdir. If not, each saves its shards as files
        that make up the whole checkpoint when they are put together.
    """

    def __init__(
        self,
        workdir: Path,
        config_json: str | None = None,
        keep: int = 1,
        is_shared: bool = True,
    ):
        self._folder = workdir.absolute() / "checkpoints"
        self._config_json = config_json
        _write_small_arrays_once()
        policies = ocp.checkpoint_managers
        best = policies.BestN(n=1, get_metric_fn=_top1, keep_checkpoints_without_metrics=False)
        self._is_shared = is_shared
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        if config_json is not None:
            if distributed.is_first() or not is_shared:
                self._folder.mkdir(parents=True, exist_ok=True)
            distributed.wait_for_all("created the folder of checkpoints")
        processes = ocp.options.MultiprocessingOptions(
            # Every process creates folders if they are not shared.
            primary_host=0 if is_shared else None,
            # With the processes named, Orbax waits for them by messages. Otherwise it would run a
            # collective, which must not happen in a thread, between the training steps.
            active_processes=set(range(jax.process_count())),
        )
        self._manager = _Manager(
            self._folder,
            item_handlers={
                # OCDBT would combine the arrays of a process into files that only it can read.
                "state": ocp.StandardCheckpointHandler(
                    multiprocessing_options=processes, use_ocdbt=is_shared
                ),
                "progress": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
                "config": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
            },
            options=ocp.CheckpointManagerOptions(
                multiprocessing_options=processes,
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                best_fn=_top1,
                enable_async_checkpointing=False,  # this class has its own thread
                read_only=config_json is None,
                create=False,
            ),
        )

    @property
    def all_steps(self) -> list[int]:
        """The steps of all checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        step: int | None = self._manager.latest_step()
        return step

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the best top-1, None if none was evaluated."""
        step: int | None = self._manager.best_step()
        return step

    def was_evaluated(self, step: int) -> bool:
        """Returns whether there is a checkpoint of this step with an evaluation of its state."""
        return step in self._manager.all_steps() and self._manager.metrics(step) is not None

    def save(
        self, state: TrainState, position: dict[str, Any] | None, top1: float | None = None
    ) -> None:
        """Starts to save a checkpoint: a `take_snapshot`, and `write` at once."""
        self.write(take_snapshot(int(state.step), state, position, top1))

    def write(self, snapshot: Snapshot) -> None:
        """Starts to write a checkpoint in a thread, after the one before it.

        An error in the thread is raised by the next call of `write`, `wait` or `close`.

        Raises NotFinite, on all processes, if a parameter is not finite.
        """
        assert self._config_json is not None, "opened read-only"
        if not snapshot.is_finite:
            raise NotFinite
        self.wait()
        self._writing = self._thread.submit(self._write, snapshot)

    def _write(self, snapshot: Snapshot) -> None:
        assert self._config_json is not None
        step, top1 = snapshot.step, snapshot.top1
        if step in self._manager.all_steps():
            if top1 is None or self.was_evaluated(step):
                return
            # The run was stopped before it evaluated this step. Save it again with the result, or
            # it could not be the best one.
            self._manager.delete(step)
        progress = {"position": snapshot.position, "checksums": snapshot.checksums.tolist()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(snapshot.state),
                progress=ocp.args.JsonSave(progress),
                config=ocp.args.JsonSave(json.loads(self._config_json)),
            ),
            metrics=None if top1 is None else {"top1": top1},
        )

    def restore_latest(
        self, like: TrainState, warn: Callable[[str], None] = distributed.say
    ) -> Restored | None:
        """Returns the newest checkpoint that can be read, None if the run has none.

        Losing the steps since an older checkpoint is better than losing the run. So a damaged
        checkpoint is moved to `damaged/` in the workdir with a warning, but only after an older
        one was read: if none can be read, the fault may be ours or the file system's.

        Raises UserError, and moves nothing, if there are checkpoints but none can be read.
        """
        damaged = {}
        for step in reversed(self.all_steps):
            try:
                restored = self.restore(step, like)
            except ValueError as error:
                damaged[step] = one_line(error)[:200]
                continue
            for damaged_step, reason in damaged.items():
                where = self._move_to_damaged(damaged_step)
                warn(f"checkpoint of step {damaged_step} is damaged, moved to {where}: {reason}")
            return restored
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise UserError(
                f"no checkpoint in {self._folder} can be read (step {step}: {reason}); put back a "
                "copy of one, or start again in another --workdir"
            )
        return None

    def restore(self, step: int, like: TrainState) -> Restored:
        """Returns the checkpoint of one step.

        Args:
          like: shapes, dtypes and shardings of the state.

        Raises ValueError, on all processes, if one of them cannot read it or an array is not what
        was saved, and UserError if it holds a network of other shapes.
        """
        self._check_shapes(step, like.params)
        try:
            state, progress = self._read(step, *_standard(like))
        except ValueError:
            opt_state = without_frozen(like.opt_state)
            if opt_state is like.opt_state:
                raise
            # Version 0.1 stored no entries for frozen layers. The arrays are the same.
            stored = like.replace(opt_state=opt_state)
            state, progress = self._read(step, *_standard(stored))
            state = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(state))
        if _checksums(state) != progress.get("checksums"):
            raise ValueError(DIFFERENT_CHECKSUM)
        return Restored(state, progress["position"])

    def restore_variables(
        self, step: int, like: dict[str, Any], of_average: bool = False
    ) -> dict[str, Any]:
        """Returns only {"params": …, "batch_stats": …} of one step, for inference.

        This reads half of the bytes, since the velocity is as large as the parameters, and does
        not depend on the optimizer.

        Args:
          like: shapes, dtypes and shardings, as `model.init` would return them.
          of_average: whether to return the moving averages instead.

        Raises ValueError and UserError as `restore` does.
        """
        self._check_shapes(step, like["params"])
        like = {"params": like["params"], "batch_stats": like.get("batch_stats", {})}
        stored = {"average": like} if of_average else like
        args = ocp.args.PyTreeRestore(
            stored,
            restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
            partial_restore=True,
        )
        restored, progress = self._read(step, ocp.PyTreeCheckpointHandler(), args)
        for name, leaf in named_leaves(restored):
            if not isinstance(leaf, jax.Array):  # Orbax leaves what is not there as it was
                raise ValueError(f"it has no {name}")
        # The checksums are in the order of TrainState's leaves: step, params, batch_stats, then
        # those of the average, by name.
        if of_average:
            variables = restored["average"]
            checksums = _checksums(variables)
            first = 1 + len(checksums)
        else:
            variables = restored
            checksums = _checksums(variables["params"]) + _checksums(variables["batch_stats"])
            first = 1
        if checksums != (progress.get("checksums") or [])[first : first + len(checksums)]:
            raise ValueError(DIFFERENT_CHECKSUM)
        return dict(variables)

    def _check_shapes(self, step: int, params: Any) -> None:
        """Raises UserError if a saved parameter has another shape.

        This is no damage, which an older checkpoint could replace: the program computes other
        shapes for this config than the version that wrote the checkpoint.
        """
        try:
            folder = self._manager.directory / str(step) / "state"
            saved = ocp.PyTreeCheckpointHandler().metadata(folder).tree["params"]
        except Exception:  # of many types where it is damaged, which reading it will report
            return
        saved_shapes = dict(named_leaves(saved))
        for name, leaf in named_leaves(params):
            shape = saved_shapes.get(name, leaf).shape
            if shape != leaf.shape:
                config = json.loads((folder.parent / "config" / "metadata").read_text())
                raise UserError(
                    f"the checkpoint of step {step} in {self._folder} cannot be used: {name} has "
                    f"shape {list(shape)}, but variant {config['model']['variant']} at "
                    f"{config['augment']['crop_size']} pixels has {list(leaf.shape)} in version "
                    f"{__version__}; use the version that wrote it, or train again in another "
                    "workdir"
                )

    def wait(self) -> None:
        """Returns when all saved checkpoints are on disk."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """Waits, then ends the background thread."""
        self._thread.shutdown()
        self._manager.close()
        self.wait()

    def _read(
        self, step: int, handler: ocp.CheckpointHandler, args: ocp.args.CheckpointArgs
    ) -> tuple[Any, dict[str, Any]]:
        # The manager's own `restore` has a barrier. A process that fails before it leaves the
        # others waiting there, so each process reads by the handlers, and then all agree.
        folder = self._manager.directory / str(step)
        state: Any = None
        progress: Any = None
        failure: Exception | None = None
        try:
            with contextlib.closing(handler):
                state = handler.restore(folder / "state", args=args)
            progress = json.loads((folder / "progress" / "metadata").read_text())
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            failure = error
        # All processes must fall back to the same checkpoint.
        if distributed.any_process(failure is not None):
            reason = one_line(failure) if failure else "another process cannot read it"
            raise ValueError(reason) from failure
        return state, progress

    def _move_to_damaged(self, step: int) -> Path:
        target = self._folder.parent / "damaged" / str(step)
        if distributed.is_first() or not self._is_shared:
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            (self._folder / str(step)).rename(target)
        distributed.wait_for_all(f"moved checkpoint {step}")
        self._manager.reload()
        return target


def take_snapshot(
    step: int, state: TrainState, position: dict[str, Any] | None, top1: float | None = None
) -> Snapshot:
    """Returns a copy of a state for `Checkpoints.write`, without waiting for the devices.

    Arguments as for `Snapshot`.
    """
    copy, checksums, is_finite = _copy_and_check(state)
    return Snapshot(step, copy, checksums, is_finite, position, top1)


def has_checkpoint(workdir: Path) -> bool:
    """Returns whether a workdir has a complete checkpoint. Needs no other process."""
    return bool(checkpoint_steps(workdir))


@functools.cache
def _write_small_arrays_once() -> None:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Orbax warns that this replaces its own handler
    ocp.type_handlers.register_type_handler(
        jax.Array,
        ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_PART_BYTES),
        override=True,
    )
    logger.setLevel(level)


def _standard(like: TrainState) -> tuple[ocp.CheckpointHandler, ocp.args.CheckpointArgs]:
    return ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(like)


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a tree with names like "fc6.kernel"."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _top1(metrics: dict[str, float]) -> float:
    return metrics["top1"]


# TensorStore does not detect a flipped bit in an uncompressed array: in a test it returned the
# changed parameters without an error. So we save a checksum of each array and compare it.
DIFFERENT_CHECKSUM = "its checksum is not that of what was saved"


def _checksums(tree: Any) -> list[int]:
    """Returns one checksum per array, in the order of `jax.tree.leaves`."""
    return [int(checksum) for checksum in jax.tree.leaves(_checksum_tree(tree))]


@jax.jit
def _copy_and_check(state: TrainState) -> tuple[TrainState, jax.Array, jax.Array]:
    """Returns a copy of a state, the checksums of its arrays, and if all parameters are finite."""
    checksums = jnp.stack(jax.tree.leaves(_checksum_tree(state)))
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]
    return jax.tree.map(jnp.copy, state), checksums, jnp.stack(finite).all()


@jax.jit
def _checksum_tree(tree: Any) -> Any:
    """Returns the checksum of each array, computed on its devices.

    A sum of integers modulo 2^32 does not depend on the order of its terms, and so not on the
    sharding. Each word is multiplied by an odd number that depends on its index in the array.
    Multiplying by an odd number is invertible, so any change of a single word changes the sum; the
    index makes swapped words change it too.
    """

    def checksum(x: jax.Array) -> jax.Array:
        bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")  # an optimizer may keep bfloat16
        words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)  # in row-major order
        for axis, length in enumerate(x.shape):
            index = index * length + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(words * (index * jnp.uint32(2654435769) * 2 + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)
