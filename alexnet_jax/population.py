"""Trains several networks of one config at once, which differ only in their seeds.

    python -m alexnet_jax.population --config quickstart --count 10 --workdir runs/population

Network k has seed + k for all that seeds.weights, seeds.order and seeds.dropout do not fix: with
--config.seeds.order=0 all see the same batches. On an accelerator one step, mapped over the
networks by vmap, trains all of them; on CPU they take turns. Each has a workdir below --workdir,
like one of alexnet_jax.train. The same command continues an interrupted population.
"""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict
from tqdm import tqdm

from alexnet_jax import config as configs
from alexnet_jax import inference
from alexnet_jax.config import seed_for
from alexnet_jax.data import pipeline
from alexnet_jax.data.augment import make_augment, statistics
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import Store
from alexnet_jax.models.summary import format_layer_table
from alexnet_jax.train import check_data, check_data_unchanged, claim_workdir, evaluation_steps
from alexnet_jax.training import sharding
from alexnet_jax.training.checkpoint import Checkpoints, NotFinite, take_snapshot
from alexnet_jax.training.metrics import read_metrics
from alexnet_jax.training.optimizer import make_optimizer, make_schedule
from alexnet_jax.training.train_step import (
    EvalStep,
    TrainState,
    averaged,
    build_state,
    build_train_step,
    make_eval_step,
)
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import EXIT_STOPPED, UserError, exits_cleanly
from alexnet_jax.utils.files import DISK_FULL, atomic_write, explain_write_errors


class Stopped(Exception):
    """The population was asked to stop. It is saved, and the same command continues it."""


def members(config: ConfigDict, count: int) -> list[ConfigDict]:
    """Returns the configs of the networks: each can be trained alone by alexnet_jax.train."""
    found = []
    for index in range(count):
        member = config.copy_and_resolve_references()
        member.seed = config.seed + index
        member.parallel = "jit"
        found.append(member)
    return found


def train_population(config: ConfigDict, count: int, folder: Path) -> TrainState:
    """Trains networks together, from their newest common checkpoint if they have one.

    Writes a workdir seed<n> for each below the folder.

    Returns:
      The state after the last step. Each array has one axis more than that of one network, the
      first one, for the networks.

    Raises:
      UserError: as `train.train_and_evaluate`, or the config cannot be trained so.
      Stopped: SIGINT or SIGTERM arrived; the states are saved.
    """
    _check(config, count)
    runs = members(config, count)
    _, model, layers = sharding.build_network(runs[0])
    workdirs = [folder / f"seed{run.seed}" for run in runs]
    with contextlib.ExitStack() as resources:
        resources.enter_context(explain_write_errors(folder, "another --workdir", DISK_FULL))
        for run, workdir in zip(runs, workdirs, strict=True):
            resources.enter_context(claim_workdir(workdir, run))
            (workdir / "summary.txt").write_text(format_layer_table(layers) + "\n")
        stores = open_or_prepare(config)
        check_data(config, stores)
        steps_per_epoch = stores["train"].num_examples / config.batch_size
        eval_steps = evaluation_steps(config, steps_per_epoch)
        total_steps = max(eval_steps)
        stats = statistics(stores["train"], config)
        for workdir in workdirs:
            check_data_unchanged(workdir, stores, stats)
            inference.save_statistics(workdir, stats, stores["train"].class_names)

        augment = make_augment(config, stats, steps_per_epoch)
        tx = make_optimizer(config, steps_per_epoch)
        rate = make_schedule(config, steps_per_epoch)
        step_of_one = build_train_step(config, model, tx, augment)
        orders = {
            seed_for(run, "order"): pipeline.build_order(stores["train"], run) for run in runs
        }
        shared = len(orders) == 1  # every network sees the same batches
        train_step = over_networks(step_of_one, shared)
        eval_step = over_networks(make_eval_step(model, augment), shared=True, keep=True)
        streams = [
            resources.enter_context(closing(pipeline.train_batches(order)))
            for order in orders.values()
        ]

        stop = resources.enter_context(process.StopRequest())
        checkpoints = [
            resources.enter_context(
                closing(Checkpoints(workdir, configs.to_json(run), config.checkpoint.keep))
            )
            for run, workdir in zip(runs, workdirs, strict=True)
        ]
        seeds = tuple(
            np.array([seed_for(run, purpose) for run in runs], np.uint32)
            for purpose in ("weights", "dropout")
        )
        initial = functools.partial(build_state, config, model, tx)
        state = _restored(checkpoints, jax.eval_shape(initial), streams)
        if state is None:
            state = process.run_once(jax.vmap(initial), seeds)
        step = int(state.step[0])
        for workdir in workdirs:
            _forget_rows_after(workdir, step)

        def save(top1: np.ndarray | None = None) -> None:
            for index, each in enumerate(checkpoints):
                own = _of_network(state, index)
                position = streams[0 if shared else index].get_state()
                accuracy = None if top1 is None else float(top1[index])
                try:
                    each.write(take_snapshot(step, own, position, accuracy))
                except NotFinite as error:
                    raise UserError(
                        f"a parameter of {workdirs[index]} is not finite at step {step}; lower "
                        "learning_rate or set optimizer.clip_norm"
                    ) from error
            for each in checkpoints:
                each.wait()

        done: list[dict[str, jax.Array]] = []  # metrics since the last evaluation
        bar = resources.enter_context(
            tqdm(initial=step, total=total_steps, unit="step", disable=None)
        )
        while step < total_steps:
            if stop.requested():
                save()
                raise Stopped(f"stopped and saved at step {step} of {total_steps}")
            batches = [next(stream) for stream in streams]
            batch = batches[0] if shared else jax.tree.map(lambda *x: np.stack(x), *batches)
            state, metrics = train_step(state, batch)
            step += 1
            done.append(metrics)
            bar.update()
            if step not in eval_steps:
                continue
            trained = {k: np.mean([np.asarray(m[k]) for m in done], axis=0) for k in done[0]}
            done = []
            evaluated = evaluate(eval_step, averaged(state), stores["eval"], config.batch_size)
            lr = float(rate("all", True, step - 1, jnp.ones(())))
            epoch = {"step": step, "epoch": round(step / steps_per_epoch, 4)}
            for index, workdir in enumerate(workdirs):
                rows = [
                    {**epoch, **_of(trained, index), "learning_rate": lr, "split": "train"},
                    {**epoch, **_of(evaluated, index), "split": "eval"},
                ]
                with (workdir / "metrics.jsonl").open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            accuracies = ", ".join(f"{value:.2%}" for value in evaluated["top1"])
            tqdm.write(f"step {step:6d}  epoch {epoch['epoch']:6.2f}  top1 {accuracies}")
            save(evaluated["top1"])
        return state


def over_networks(
    step: Callable[[TrainState, Any], Any],
    shared: bool,
    keep: bool = False,
    by_vmap: bool | None = None,
) -> Callable[[TrainState, Any], Any]:
    """Returns a step of all networks, compiled, whose states and results have an axis for them.

    Args:
      step: of one network.
      shared: whether all get the same batch. Otherwise batches have the axis too.
      keep: whether the states are used again. Otherwise their memory is.
      by_vmap: whether one program computes all. By default not on CPU, where XLA's convolutions
        take ten times as long there: the networks then take turns, each as if it were alone.
    """
    if jax.default_backend() != "cpu" if by_vmap is None else by_vmap:
        mapped = jax.vmap(step, in_axes=(0, None if shared else 0))
        return jax.jit(mapped, donate_argnums=() if keep else 0)
    of_one = jax.jit(step)

    def in_turns(states: TrainState, batch: Any) -> Any:
        results = [
            of_one(_of_network(states, i), batch if shared else {k: x[i] for k, x in batch.items()})
            for i in range(len(states.step))
        ]
        return _stack(results)

    return in_turns


@jax.jit
def _of_network(states: TrainState, index: jax.Array | int) -> Any:
    return jax.tree.map(lambda x: x[index], states)


@jax.jit
def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def evaluate(
    eval_step: EvalStep, state: TrainState, store: Store, batch_size: int
) -> dict[str, np.ndarray]:
    """Returns loss, top1 and top5 of each network, float64[K], as means over all examples.

    Args:
      eval_step: mapped over the networks.
    """
    sums = [
        jax.device_get(eval_step(state, batch))
        for batch in pipeline.eval_batches(store, batch_size)
    ]
    total = {name: np.sum([s[name] for s in sums], axis=0, dtype=np.float64) for name in sums[0]}
    return {name: np.asarray(total[name] / total["count"]) for name in ("loss", "top1", "top5")}


def _of(metrics: dict[str, np.ndarray], index: int) -> dict[str, float]:
    return {name: float(values[index]) for name, values in metrics.items()}


def _check(config: ConfigDict, count: int) -> None:
    configs.check_bounds(config)
    make_augment(config)
    make_optimizer(config, steps_per_epoch=1.0)
    if count < 1:
        raise UserError(f"--count={count} must be at least 1")
    if config.schedule.kind == "plateau":
        raise UserError(
            "schedule.kind=plateau would give each network another learning rate; choose another "
            "schedule, or train them by alexnet_jax.sweep"
        )
    if make_augment(config, steps_per_epoch=1.0).size_changes:
        raise UserError(
            "schedule.changes changes the crop size, and networks trained together have one "
            "size; remove these changes, or train them by alexnet_jax.sweep"
        )
    if config.init_from:
        raise UserError(
            "init_from gives all networks the same weights; leave it out, or train them by "
            "alexnet_jax.sweep"
        )


def _restored(
    checkpoints: Sequence[Checkpoints],
    one: TrainState,
    streams: Sequence[Any],
) -> TrainState | None:
    """Returns the newest states that all networks have, stacked, and moves the data there.

    Args:
      one: shapes and dtypes of the state of one network.
    """
    here = SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: x.update(sharding=here), one)
    common = set.intersection(*({*each.all_steps} for each in checkpoints))
    for step in sorted(common, reverse=True):
        try:
            found = [each.restore(step, like) for each in checkpoints]
        except ValueError as error:
            print(f"the checkpoint of step {step} is damaged: {error}", file=sys.stderr)
            continue
        for stream, restored in zip(streams, found, strict=False):
            stream.set_state(restored.position)
        print(f"resuming from step {step}", flush=True)
        stacked: TrainState = _stack([restored.state for restored in found])
        return stacked
    return None


def _forget_rows_after(workdir: Path, step: int) -> None:
    rows: Iterator[Any] = (row for row in read_metrics(workdir) if row["step"] <= step)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with atomic_write(workdir / "metrics.jsonl") as new:
        new.write_text(text)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.population",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, required=True, help="number of networks")
    parser.add_argument(
        "--workdir", type=buckets.local, required=True, help="folder of the networks' workdirs"
    )
    config, args = configs.parse(argv, parser)
    process.set_up(config.deterministic_gpu)
    folder = args.workdir.expanduser()
    try:
        train_population(config, args.count, folder)
    except Stopped as stopped:
        print(f"{stopped}; run the same command to continue", file=sys.stderr)
        return EXIT_STOPPED
    print(f"wrote {args.count} workdirs to {folder}")
    return 0


if __name__ == "__main__":
    main()
