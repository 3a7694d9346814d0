"""Trains AlexNet by a config, from its data to a workdir with checkpoints and metrics."""

import argparse
import collections
import contextlib
import fcntl
import gc
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax import inference
from alexnet_jax.analysis import figures
from alexnet_jax.data import pipeline
from alexnet_jax.data.augment import Statistics, make_augment, statistics
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import Store
from alexnet_jax.models.alexnet import towers
from alexnet_jax.models.build import variant_name
from alexnet_jax.models.summary import format_layer_table
from alexnet_jax.training import finetune, sharding
from alexnet_jax.training.checkpoint import (
    Checkpoints,
    NotFinite,
    Snapshot,
    has_checkpoint,
    take_snapshot,
)
from alexnet_jax.training.metrics import Meter, Report, read_metrics
from alexnet_jax.training.optimizer import make_optimizer, make_plateau, make_schedule
from alexnet_jax.training.train_step import (
    Metrics,
    TrainState,
    averaged,
    build_state,
    build_train_step,
    make_eval_step,
)
from alexnet_jax.utils import buckets, distributed, process
from alexnet_jax.utils.errors import EXIT_STOPPED, UserError, exits_cleanly
from alexnet_jax.utils.files import (
    DISK_FULL,
    atomic_write,
    checkpoint_steps,
    explain_write_errors,
)

# Steps that may be dispatched and not finished. The loop prepares the next batches meanwhile;
# without a limit their inputs would pile up in device memory.
STEPS_IN_FLIGHT = 4
# Drawing takes 0.4 s of Python, which slows down the loop although it has its own thread.
DRAW_EVERY_S = 60


class Stopped(Exception):
    """The run was asked to stop. It is saved, and the same command continues it."""


class Diverged(UserError):
    """The loss or a parameter is infinite or NaN, so the state must not be saved."""


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains as `config` says, from the workdir's newest checkpoint if it has one.

    Writes config.json, summary.txt, statistics.npz, samples.png, checkpoints/, metrics.jsonl,
    tensorboard/, curves.png and filters.png into the workdir, a path or a URL such as
    gs://bucket/folder, which all hosts of a run share.

    Returns:
      The state after the last step, as global arrays.

    Raises:
      UserError: a field, the data or the workdir cannot be used, the loss is no longer finite, or
        the disk is full. What was saved before stays intact.
      Stopped: SIGINT or SIGTERM arrived; the state is saved.
    """
    started = time.perf_counter()
    in_bucket = buckets.is_url(workdir)
    is_first = distributed.is_first()
    resources = contextlib.ExitStack()
    with resources:
        # ---- Check the config -----------------------------------------------------------------
        # All of it now: a wrong field must not show after an hour of preparing data, nor leave a
        # file behind. What is built here without data is built again below with it.
        configs.check_bounds(config)
        make_augment(config)
        make_optimizer(config, steps_per_epoch=1.0)
        parallel, model, layers = sharding.build_network(config)
        distributed.check_same("config", configs.flat(config))

        # ---- Claim the workdir, and open the data, which may have to be prepared first ---------
        # The workdir first: two runs that write to one workdir would lose each other's work.
        if in_bucket:  # what a run writes is a file, so it works in a local copy
            workdir = resources.enter_context(buckets.local_copy(str(workdir)))
        workdir = Path(workdir).expanduser()
        source = finetune.load_source(config, model, workdir)
        resources.enter_context(explain_write_errors(workdir, "another --workdir", DISK_FULL))
        if is_first:
            resources.enter_context(claim_workdir(workdir, config))
        if not in_bucket:
            distributed.check_shared(workdir)
        summary = format_layer_table(layers) + finetune.describe_frozen(config, layers)
        distributed.say(f"AlexNet, variant {variant_name(config)}:\n{summary}\n")
        stores = open_or_prepare(config)
        check_data(config, stores)
        if source:
            source = finetune.with_classes(source, config, stores["train"].class_names)
            origin = finetune.describe_source(config, source)
            distributed.say(origin)
            summary += f"\n{origin}"
        if is_first and (source or not config.init_from):
            (workdir / "summary.txt").write_text(summary + "\n")

        # ---- Build what the config describes ---------------------------------------------------
        # Batches run across the ends of epochs, so this need not be a whole number.
        steps_per_epoch = stores["train"].num_examples / config.batch_size
        eval_steps = evaluation_steps(config, steps_per_epoch)
        total_steps = max(eval_steps)

        # The mean and the color noise are part of the network's input, so they are saved with it.
        stats = statistics(stores["train"], config)
        stats = finetune.statistics(config, source, workdir, stats)
        if is_first:
            check_data_unchanged(workdir, stores, stats)
            inference.save_statistics(workdir, stats, stores["train"].class_names)
        augment = make_augment(config, stats, steps_per_epoch)
        learning_rate = make_schedule(config, steps_per_epoch)
        plateau = make_plateau(config)
        tx = make_optimizer(config, steps_per_epoch)

        def initial_state() -> TrainState:
            return build_state(config, model, tx)

        shapes = jax.eval_shape(initial_state)
        shardings = parallel.state_shardings(shapes)
        # One program for each size of the crops. XLA programs have fixed shapes.
        sizes = {augment.crop_size, *(size for _, size in augment.size_changes)}
        train_steps = {
            size: parallel.compile_train_step(
                build_train_step(config, model, tx, replace(augment, crop_size=size)), shapes
            )
            for size in sizes
        }
        eval_step = parallel.compile_eval_step(make_eval_step(model, augment), shapes)

        # A thread for what must hold up neither the start nor the steps. The step that it compiles
        # is not compiled again when it is called with these shapes. `result` raises its errors.
        background = resources.enter_context(ThreadPoolExecutor(1, "background"))
        state_like = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)
        batch_like = parallel.batch_like(config)
        first_step = max(checkpoint_steps(workdir), default=0)
        first_size = augment.crop_size_at(first_step)
        compiled = background.submit(_compile, train_steps[first_size], state_like, batch_like)

        # Background threads read the next batches and transfer them while a step runs.
        def place(batch: pipeline.Batch) -> dict[str, jax.Array]:
            return parallel.put_batch(batch, config.batch_size)

        place = jax.profiler.annotate_function(place, name="place batch")
        local_rows = parallel.local_rows(config.batch_size)
        order = pipeline.build_order(stores["train"], config)
        batches = resources.enter_context(closing(pipeline.train_batches(order, local_rows, place)))

        # ---- Restore the newest checkpoint, or initialize --------------------------------------
        # From here on, a signal asks the loop to save and stop. Before, there is nothing to save.
        stop = resources.enter_context(process.StopRequest())
        checkpoints = resources.enter_context(
            closing(
                Checkpoints(
                    workdir,
                    configs.to_json(config),
                    config.checkpoint.keep,
                    is_shared=not in_bucket,
                )
            )
        )
        # With shardings, each process reads only the parts that its devices hold.
        restored = checkpoints.restore_latest(state_like)
        if restored:
            state = restored.state
            if restored.position is not None:  # None in a converted network
                batches.set_state(restored.position)
            distributed.say(f"resuming from step {int(state.step)} of {total_steps}")
        else:
            state = process.run_once(initial_state, out_shardings=shardings)
            if source:
                state = finetune.with_weights(state, source)
        step = int(state.step)
        distributed.check_same("checkpoints", {"step": step})
        evaluated = checkpoints.was_evaluated(step)
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        distributed.say(
            f"training to step {total_steps} on {jax.device_count()} {jax.default_backend()} "
            f"device(s){processes}, parallel={parallel.kind}; the first step compiles"
        )

        # ---- Train -----------------------------------------------------------------------------
        report = resources.enter_context(closing(Report(workdir, step, total_steps, evaluated)))
        meter = Meter(config.batch_size)

        def rates_of_all_steps(plateau_scale: jax.Array) -> np.ndarray:
            """Returns the learning rate of each update, float32[total_steps].

            All at once: a device computes a single rate after the steps in flight, so that a row of
            metrics would wait for them.
            """
            rate: Callable[..., jax.Array] = jax.vmap(
                lambda step: learning_rate("all", True, step, plateau_scale)
            )
            # Compiling the operations of a schedule one by one takes 0.8 s on CPU, together 0.1.
            return np.asarray(process.run_once(lambda: rate(np.arange(total_steps))))

        rates = rates_of_all_steps(sharding.to_host(state.plateau.scale))

        def log_train(steps_in_flight: int = 0) -> None:
            """Reports the steps since the last call, except for the latest `steps_in_flight`."""
            steps, timing = meter.drain(steps_in_flight)
            for number, metrics in steps:
                if not math.isfinite(metrics["loss"]):
                    what = f"loss is {metrics['loss']}"
                    raise _diverged(what, number, rates[number - 1], checkpoints)
            # A row ends at each multiple of log_every_steps, and before an evaluation or a save.
            for _, group in itertools.groupby(
                steps, lambda s: (s[0] - 1) // config.log_every_steps
            ):
                numbers, values = zip(*group, strict=True)
                means = {k: float(np.mean([v[k] for v in values])) for k in values[-1]}
                number, rate = numbers[-1], float(rates[numbers[-1] - 1])
                epoch = round(number / steps_per_epoch, 4)
                row = {"step": number, "epoch": epoch, **means, "learning_rate": rate, **timing}
                report.train(row)

        def evaluate_all(state: TrainState) -> dict[str, float] | None:
            """Evaluates on the whole eval split; returns None if the run was asked to stop."""
            examples = pipeline.eval_batches(stores["eval"], config.batch_size, local_rows, place)
            return evaluate(eval_step, state, examples, stop.requested)

        drawn: Future[None] | None = None
        drawn_at = -math.inf

        def draw(conv1: np.ndarray) -> None:
            figures.save_curves(read_metrics(workdir), workdir / "curves.png")
            figures.save_filters(conv1, towers(model.variant), workdir / "filters.png")

        snapshot: Snapshot | None = None
        lag = min(STEPS_IN_FLIGHT, config.checkpoint.every_steps - 1)  # one snapshot at a time

        def write_snapshot() -> None:
            """Starts to write the snapshot, if there is one."""
            nonlocal snapshot
            if snapshot is None:
                return
            due, snapshot = snapshot, None
            try:
                checkpoints.write(due)
            except NotFinite as error:  # while the loss was finite: this step's update was not
                what = "a parameter is not finite"
                raise _diverged(what, due.step, rates[due.step - 1], checkpoints) from error

        def save(top1: float | None = None) -> None:
            """Reports all steps, then saves the last one."""
            nonlocal snapshot
            log_train()
            snapshot = take_snapshot(step, state, batches.get_state(), top1)
            write_snapshot()

        crop_size = augment.crop_size
        try:
            while True:
                stopping = stop.requested()

                # Evaluate first: a run that was stopped before an evaluation catches up on it.
                if step in eval_steps and not evaluated and not stopping:
                    log_train()
                    write_snapshot()
                    report.show("evaluating")
                    metrics = evaluate_all(averaged(state))
                    if metrics and state.average:
                        of_last = evaluate_all(state)
                        last = {f"last_{name}": value for name, value in (of_last or {}).items()}
                        metrics = metrics | last if of_last else None
                    if metrics is None:
                        stopping = True
                    else:
                        if config.schedule.kind == "plateau":
                            # On the host, since it happens once per evaluation.
                            old = sharding.to_host(state.plateau)
                            _, new = plateau.update({}, old, value=1.0 - metrics["top1"])
                            state = state.replace(
                                plateau=sharding.from_host(new, like=state.plateau)
                            )
                            rates = rates_of_all_steps(new.scale)
                        epoch = round(step / steps_per_epoch, 4)
                        report.evaluation({"step": step, "epoch": epoch, **metrics})
                        save(metrics["top1"])
                        conv1 = sharding.to_host(state.params["conv1"]["kernel"])
                        since_drawn = time.monotonic() - drawn_at
                        if is_first and (since_drawn > DRAW_EVERY_S or step == total_steps):
                            if drawn:
                                drawn.result()
                            drawn, drawn_at = background.submit(draw, conv1), time.monotonic()
                        evaluated = True
                        meter.restart_clock()
                if stopping:
                    save()
                    checkpoints.wait()
                    raise Stopped(f"stopped and saved at step {step} of {total_steps}")
                if step == total_steps:
                    break

                new_size = augment.crop_size_at(step)
                if new_size != crop_size:
                    report.say(f"step {step:6d}  crops of {new_size} pixels from here on")
                    crop_size = new_size
                    if not meter.first_step:  # else `compiled` is this size's program
                        log_train()
                        _compile(train_steps[crop_size], state_like, batch_like)
                        meter.restart_clock()

                # One step. It is dispatched and not waited for, so the loop runs ahead and the
                # devices never wait for Python.
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                if meter.first_step:
                    if is_first:
                        seen = replace(augment, crop_size=crop_size)
                        draws = configs.seed_for(config, "dropout"), step
                        figures.save_samples(order, seen, draws, workdir / "samples.png")
                    compiled.result()
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, step_metrics = train_steps[crop_size](state, batch)
                step += 1
                evaluated = False
                first = meter.first_step
                meter.add(step, step_metrics, waited, STEPS_IN_FLIGHT)
                if first:  # compilation must not count in images/s
                    jax.block_until_ready(step_metrics)
                    meter.restart_clock()
                    report.say(f"first step after {time.perf_counter() - started:.1f} s")
                    # What exists now stays. Python's garbage collector would search it again and
                    # again, which takes 0.2 to 0.3 s: the devices would run out of steps.
                    gc.collect()
                    gc.freeze()
                    resources.callback(gc.unfreeze)
                report.advance()

                if step % config.checkpoint.every_steps == 0 and step not in eval_steps:
                    snapshot = take_snapshot(step, state, batches.get_state())
                # Fetching the newest steps would wait for them, so rows and checkpoints lag behind.
                is_due = snapshot is not None and snapshot.step == step - lag
                if is_due or (step - lag) % config.log_every_steps == 0:
                    log_train(lag)
                if is_due:  # after the rows of its steps, which a resumed run does not repeat
                    write_snapshot()
        except Diverged:
            raise
        except UserError:  # the data cannot be read any more
            # Other processes do not know of it and would not take part in saving.
            if jax.process_count() == 1:
                save()
            raise

        checkpoints.wait()
        if drawn:
            drawn.result()
        report.say(f"finished at step {step}; best top-1 at step {checkpoints.best_step}")
        return state


def evaluation_steps(config: ConfigDict, steps_per_epoch: float) -> set[int]:
    """Returns the steps after which to evaluate; the last one ends the training."""

    def step_at(epoch: float) -> int:
        # Rounding errors, as in 3 * 0.1, must not add a step.
        return math.ceil(epoch * steps_per_epoch - 1e-9)

    every = config.eval.every_epochs
    count = math.ceil(config.num_epochs / every)
    return {step_at(every * i) for i in range(1, count)} | {step_at(config.num_epochs)}


def evaluate(
    eval_step: Callable[..., Metrics],
    state: TrainState,
    batches: Iterator[Any],
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Returns loss, top1 and top5 as means over all examples; None if asked to stop meanwhile.

    Args:
      eval_step: compiled by `Parallel.compile_eval_step`.
      batches: from `pipeline.eval_batches`, placed on the devices.
    """
    total: dict[str, float] = collections.defaultdict(float)
    pending: collections.deque[Metrics] = collections.deque()

    def add(sums: Metrics) -> None:
        for name, value in jax.device_get(sums).items():
            total[name] += float(value)

    for batch in batches:
        if stopping():
            return None
        pending.append(eval_step(state, batch))
        if len(pending) > STEPS_IN_FLIGHT:
            add(pending.popleft())
    for sums in pending:
        add(sums)
    return {key: total[key] / total["count"] for key in ("loss", "top1", "top5")}


@contextmanager
def claim_workdir(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Creates the workdir with its config.json, or checks that it holds a run of this config.

    Only a checkpoint makes it a run: without one there is no work that another config could harm.

    Raises:
      UserError: it cannot be written, holds a run of another config, or another process trains
        there now.
    """
    path = workdir / "config.json"
    with explain_write_errors(workdir, "another --workdir"):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_run = has_checkpoint(workdir)
            saved = json.loads(path.read_text()) if has_run and path.exists() else {}
            if not isinstance(saved, dict):
                raise ValueError("not a config")
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in {workdir}; wait for it or choose another --workdir"
            ) from error
        except ValueError as error:
            raise UserError(f"{path} is damaged; choose another --workdir or remove it") from error
        differing = configs.differing_fields(config, saved) if saved else []
        if not differing:
            with atomic_write(path) as new:
                new.write_text(configs.to_json(config) + "\n")
    if differing:
        raise UserError(
            f"{workdir} holds a run of another config, which differs in {', '.join(differing)}; "
            f"choose another --workdir, where --config.init_from={workdir} starts from its weights"
        )
    with lock:
        yield


def check_data(config: ConfigDict, stores: dict[str, Store]) -> None:
    """Raises UserError if hosts have different data, or the network has too few classes."""
    fields = ("identity", "num_examples", "mean_channel")
    distributed.check_same(
        "data",
        {f"{use} {name}": getattr(store, name) for use, store in stores.items() for name in fields},
    )
    classes = len(stores["train"].class_names)
    if classes > config.model.num_classes:
        raise UserError(
            f"{config.dataset} has {classes} classes, the network {config.model.num_classes}; "
            f"set --config.model.num_classes={classes}"
        )
    if classes < config.model.num_classes:
        distributed.say(
            f"{config.dataset} has only {classes} classes, the network {config.model.num_classes}; "
            f"--config.model.num_classes={classes} is enough"
        )


def check_data_unchanged(workdir: Path, stores: dict[str, Store], stats: Statistics) -> None:
    """Records in data.json which data a run uses. A folder may move, but its images may not change.

    Runs of version 0.2 have no data.json. The mean of their training images tells as much.

    Raises UserError if the workdir's checkpoints are of a run on other data.
    """
    path = workdir / "data.json"
    identities = {use: store.identity for use, store in stores.items()}
    if max(checkpoint_steps(workdir), default=0) > 0:  # a converted network has step 0
        try:
            saved = json.loads(path.read_text())
            differing = [use for use, identity in identities.items() if saved[use] != identity]
        except FileNotFoundError:
            differing = []
            with contextlib.suppress(UserError):  # they can be missing, and are written again
                before, _ = inference.load_statistics(workdir)
                differing = [] if np.array_equal(before.mean, stats.mean) else ["train"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged; choose another --workdir or remove the file"
            ) from error
        if differing:
            raise UserError(
                f"{workdir} holds a run on other images than the present ones of the "
                f"{' and '.join(differing)} split; put those back, or choose another --workdir "
                f"(--config.init_from={workdir} starts from its network)"
            )
    with explain_write_errors(workdir, "another --workdir"), atomic_write(path) as new:
        new.write_text(json.dumps(identities, indent=2) + "\n")


def _compile(step: Callable[..., Any], *like: Any) -> None:
    """Compiles a jitted step for arguments of these shapes, dtypes and shardings."""
    if isinstance(step, jax.stages.Wrapped):  # not with pmap, which compiles when it is called
        step.lower(*like).compile()


def _diverged(what: str, step: int, rate: float, checkpoints: Checkpoints) -> Diverged:
    checkpoints.wait()
    good = checkpoints.latest_step
    saved = f"the last good checkpoint is of step {good}" if good is not None else "none was saved"
    return Diverged(
        f"{what} at step {step} (learning rate {rate:.3g}); {saved}; a lower learning_rate or "
        "optimizer.clip_norm may help"
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train by a config. The same command resumes a run that was interrupted."
    )
    parser.add_argument(
        "--workdir", help="a folder or gs://bucket/folder; default: runs/<config name>"
    )
    config, args = configs.parse(argv, parser)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log file is never behind
    process.set_up(config.deterministic_gpu)
    with distributed.joined(config.heartbeat_timeout_s):
        try:
            train_and_evaluate(config, args.workdir or Path("runs") / config.name)
        except Stopped as stopped:
            print(f"{stopped}; run the same command to continue", file=sys.stderr)
            return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    main()
