"""Training from a config to a workdir: the loop that joins data, step, checkpoints and report."""

import argparse
import collections
import fcntl
import functools
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax import inference as trained
from alexnet_jax.analysis import figures as plots
from alexnet_jax.analysis.samples import save_samples
from alexnet_jax.data import augment, pipeline
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import Store
from alexnet_jax.inference import Trained
from alexnet_jax.models.alexnet import VARIANTS, AlexNet, format_layer_table, layer_table
from alexnet_jax.training import checks, finetune, placement
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import sharding as parallel
from alexnet_jax.training.checkpoint import Checkpoints
from alexnet_jax.training.metrics import Meter, NoReport, Report
from alexnet_jax.training.train_step import Metrics, TrainState, init_state
from alexnet_jax.utils import distributed as hosts
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import EXIT_STOPPED, UserError, exits_cleanly
from alexnet_jax.utils.files import DISK_FULL, atomic_write, explain_write_errors
from alexnet_jax.utils.process import StopRequest

# Steps that JAX may be behind the loop. It runs on while the next batches are read; without a
# limit they would pile up on the device.
STEPS_IN_FLIGHT = 4


class Stopped(Exception):
    """The run was asked to stop; it is saved, and the same command goes on with it."""


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains as `config` says, going on from the workdir's newest checkpoint if it has one.

    Writes config.json, summary.txt, statistics.npz, samples.png, checkpoints/, metrics.jsonl,
    tensorboard/, curves.png and filters.png into the workdir, which all hosts of a run must share.
    Returns the state after the last step, at rest (see `parallel.Compiled`).

    Raises:
      UserError: a field, the data or the workdir is not usable, the loss is no longer finite,
        or the disk is full. What was saved before stays as it was.
      Stopped: SIGINT or SIGTERM came; the state is saved.
    """
    started = time.perf_counter()
    model = parallel.build_model(config)
    checks.check_config(config)
    hosts.check_same("config", configs.flat(config))
    workdir = Path(workdir).expanduser()
    size = config.augment.crop_size
    layers = layer_table(model, (size, size, 3))
    parallel.check_layers(config, layers)
    source = finetune.load_source(config, model, workdir)
    with (
        explain_write_errors(workdir, "another --workdir", DISK_FULL),
        claimed_workdir(workdir, config) if hosts.is_first() else nullcontext(),
    ):
        table = format_layer_table(layers) + finetune.describe_frozen(config, layers)
        summary = workdir / "summary.txt"
        if hosts.is_first() and (source or not config.init_from):
            summary.write_text(table + "\n")
        hosts.say(f"AlexNet, variant {config.model.variant}:\n{table}\n")
        stores = open_or_prepare(config)
        checks.check_labels(config, stores)
        if source:
            source = finetune.with_classes(source, config, stores["train"].class_names)
            told = finetune.describe_source(config, source)
            hosts.say(told)
            if hosts.is_first():
                summary.write_text(f"{table}\n{told}\n")
        with StopRequest() as stop, closing(Checkpoints(workdir, config)) as checkpoints:
            return _Run(config, workdir, model, stores, source, checkpoints, stop, started).train()


@contextmanager
def claimed_workdir(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Makes the workdir with its config.json, or sees that it holds a run of this config.

    Raises UserError if it cannot be written, holds a run of another config, or another process
    trains there now.
    """
    path = workdir / "config.json"
    with explain_write_errors(workdir, "another --workdir"):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            saved = json.loads(path.read_text()) if path.exists() else {}
            if not isinstance(saved, dict):
                raise ValueError("it is no config")
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
            f"{workdir} holds the run of another config, which differs in "
            f"{', '.join(differing)}; choose another --workdir"
        )
    with lock:
        yield


def evaluate(
    compiled: parallel.Compiled,
    state: TrainState,
    batches: Iterator[pipeline.Batch],
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Returns loss, top1 and top5 as means over all examples; None if asked to stop meanwhile.

    `state` and the batches are placed on the devices.
    """
    total: dict[str, float] = collections.defaultdict(float)
    pending: collections.deque[Metrics] = collections.deque()

    def add(sums: Metrics) -> None:
        for name, value in compiled.unplace(sums).items():
            total[name] += float(value)

    for batch in batches:
        if stopping():
            return None
        pending.append(compiled.eval_step(state, batch))
        if len(pending) > STEPS_IN_FLIGHT:
            add(pending.popleft())
    for sums in pending:
        add(sums)
    return {key: total[key] / total["count"] for key in ("loss", "top1", "top5")}


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


class _Run:
    """One process's part of a run: from the restored state to the last step."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        model: AlexNet,
        stores: dict[str, Store],
        source: Trained | None,
        checkpoints: Checkpoints,
        stop: StopRequest,
        started: float,
    ):
        self.config, self.workdir, self.stores = config, workdir, stores
        self.checkpoints, self.stop, self.started = checkpoints, stop, started
        self.steps_per_epoch: float = stores["train"].num_examples / config.batch_size
        self.total_steps = self._step_at(config.num_epochs)
        every = config.eval.every_epochs
        count = math.ceil(config.num_epochs / every)
        self.eval_steps = {self._step_at(every * i) for i in range(1, count)} | {self.total_steps}

        of_data = augment.statistics(stores["train"], config)
        self.stats = finetune.statistics(config, source, workdir, of_data)
        if hosts.is_first():
            trained.save_statistics(workdir, self.stats, stores["train"].class_names)
        self.schedule = optim.make_schedule(config, self.steps_per_epoch)
        self.compiled = parallel.compile_steps(config, model, self.stats, self.schedule)
        self.batches = pipeline.train_batches(
            stores["train"],
            config.batch_size,
            config.seed,
            self.compiled.own_places,
            place=self.compiled.place_batch,
        )
        self.plateau = optim.plateau(config)

        state = self._restored_or_initial(functools.partial(init_state, model, config), source)
        hosts.check_same("checkpoints", {"step": int(state.step)})
        on = f" of {jax.process_count()} processes" if hosts.is_multi_process() else ""
        hosts.say(
            f"training to step {self.total_steps} on {jax.device_count()} "
            f"{jax.default_backend()} device(s){on}, compiled by {placement.kind(config)}"
        )
        self.step = int(state.step)
        self.state = self.compiled.place(state)
        self.evaluated = checkpoints.was_evaluated(self.step)
        self.report: Report | NoReport = NoReport()
        if hosts.is_first():
            self.report = Report(workdir, self.step, self.total_steps, self.evaluated)
        self.meter = Meter(config.batch_size)

    def _restored_or_initial(
        self, initial: Callable[[], TrainState], source: Trained | None
    ) -> TrainState:
        like = jax.tree.map(
            lambda x, sharding: x.update(sharding=sharding),
            jax.eval_shape(initial),
            self.compiled.shardings,
        )
        restored = self.checkpoints.restore_latest(like)
        if not restored:
            state: TrainState = runtime.run_once(initial, out_shardings=self.compiled.shardings)
            return finetune.with_weights(state, source) if source else state
        if restored.position is not None:
            self.batches.set_state(restored.position)
        hosts.say(f"going on from step {int(restored.state.step)} of {self.total_steps}")
        return restored.state

    def train(self) -> TrainState:
        """Steps, evaluates and saves until the last step or a request to stop."""
        with closing(self.report), closing(self.batches):
            while True:
                stopping = self.stop.requested()
                # A run that was stopped before an evaluation makes it up first.
                if self.step in self.eval_steps and not (self.evaluated or stopping):
                    stopping = not self._evaluate_and_save()
                if stopping:
                    self._settle()
                    self._save()
                    raise Stopped(f"stopped and saved at step {self.step} of {self.total_steps}")
                if self.step == self.total_steps:
                    break
                self._step()
                self.evaluated = False
            self.checkpoints.wait()
            best = self.checkpoints.best_step
            self.report.say(f"finished at step {self.step}; best top-1 at step {best}")
        at_rest: TrainState = self.compiled.unplace(self.state)
        return at_rest

    def _step(self) -> None:
        first = self.meter.first_step
        asked = time.perf_counter()
        with self._saved_if_data_fails():
            batch = next(self.batches)
        waited = time.perf_counter() - asked
        if first and hosts.is_first():
            path = self.workdir / "samples.png"
            save_samples(self.config, self.stores["train"], self.step, path)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
            self.state, metrics = self.compiled.train_step(self.state, batch)
        self.step += 1
        self.meter.add(self.step, metrics, waited, STEPS_IN_FLIGHT)
        if first:
            jax.block_until_ready(metrics)
            self.meter.restart_clock()
            self.report.say(f"first step after {time.perf_counter() - self.started:.1f} s")
        self.report.advance()
        if self.step % self.config.log_every_steps == 0:
            self._record_train()
        if self.step % self.config.checkpoint.every_steps == 0 and self.step not in self.eval_steps:
            self._settle()
            self._save()

    def _record_train(self) -> None:
        """Brings the metrics of the steps since the last time to the host, and checks them."""
        steps, timing = self.meter.drain(self.compiled.unplace)
        for number, metrics in steps:
            if not math.isfinite(metrics["loss"]):
                self._give_up(number, metrics["learning_rate"], f"loss is {metrics['loss']}")
        if steps:
            averaged = [k for k in steps[-1][1] if k != "learning_rate"]
            means = {k: float(np.mean([m[k] for _, m in steps])) for k in averaged}
            rate = steps[-1][1]["learning_rate"]
            self.report.train({**self._place(), **means, "learning_rate": rate, **timing})

    def _evaluate_and_save(self) -> bool:
        """Returns whether the evaluation came to its end."""
        self._settle()
        self.report.show("evaluating")
        batches = pipeline.eval_batches(
            self.stores["eval"],
            self.config.batch_size,
            self.compiled.own_places,
            place=self.compiled.place_batch,
        )
        with self._saved_if_data_fails():
            metrics = evaluate(self.compiled, self.state, batches, self.stop.requested)
        if metrics is None:
            return False
        if self.config.schedule.kind == "plateau":
            before = self.compiled.unplace(self.state.plateau)
            _, after = self.plateau.update({}, placement.whole(before), value=1.0 - metrics["top1"])
            after = placement.replicated(after, like=before)
            self.state = self.state.replace(plateau=self.compiled.place(after))
        self.report.evaluation({**self._place(), **metrics})
        self._save(metrics["top1"])
        kernel = placement.whole(self.compiled.unplace(self.state.params["conv1"]["kernel"]))
        if hosts.is_first():
            towers = max(VARIANTS[self.config.model.variant].groups)
            plots.save_filters(kernel, towers, self.workdir / "filters.png")
        self.meter.restart_clock()
        self.evaluated = True
        return True

    def _save(self, top1: float | None = None) -> None:
        self.checkpoints.save(self.compiled.unplace(self.state), self.batches.get_state(), top1)

    @contextmanager
    def _saved_if_data_fails(self) -> Iterator[None]:
        """Saves the state where a store cannot be read any more.

        Not where there are other processes, which know nothing of it and would not save with it.
        """
        try:
            yield
        except UserError:
            if not hosts.is_multi_process():
                self._settle()
                self._save()
            raise

    def _settle(self) -> None:
        """Records the steps until now, and gives up if the state is not fit to be saved.

        A step's loss is finite when its update is the first that is not.
        """
        self._record_train()
        if not _all_finite(self.compiled.unplace(self.state.params)):
            self._give_up(self.step, float(self._now().learning_rate), "a parameter is not finite")

    def _give_up(self, number: int, rate: float, what: str) -> None:
        self.checkpoints.wait()
        good = self.checkpoints.latest_step
        saved = (
            f"the last good checkpoint is of step {good}"
            if good is not None
            else "nothing was saved yet"
        )
        raise UserError(
            f"{what} at step {number} (learning rate {rate:.3g}); {saved}; a lower learning_rate "
            "or optimizer.clip_norm may help"
        )

    def _now(self) -> optim.Scheduled:
        plateau = placement.whole(self.compiled.unplace(self.state.plateau))
        return self.schedule(self.step, plateau.scale)

    def _place(self) -> dict[str, Any]:
        return {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}

    def _step_at(self, epoch: float) -> int:
        return math.ceil(epoch * self.steps_per_epoch - 1e-9)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains by a config. The same command resumes.")
    parser.add_argument("--workdir", type=Path, help="default: runs/<config name>")
    config, args = configs.parse(argv, parser)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log file is never behind
    runtime.set_up()
    with hosts.joined():
        try:
            train_and_evaluate(config, args.workdir or Path("runs") / config.name)
        except Stopped as stopped:
            print(f"{stopped}; the same command goes on from there", file=sys.stderr)
            return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    main()
