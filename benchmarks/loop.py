"""How long do the devices wait for the training loop: its logging, evaluations, saves and drawing?

    python benchmarks/loop.py

`train_and_evaluate` trains on 8 CPU devices with steps that do nothing but sleep: 5 ms in training,
2 ms in evaluation. Everything else is real, at the default intervals: it logs every 20 steps
(0.1 s), saves every 1,000 (5 s) and evaluates after an epoch, here 4,000 steps (20 s).

Each step records when it was called, and when it ran. The devices are idle from the end of a step
until the start of the next one, unless that was called before: then the loop was ahead, and the
time is the runtime's own. The time until the end of the first evaluation, when everything has been
compiled, is not counted.
"""

import itertools
import os
import tempfile
import time
from collections import defaultdict, namedtuple
from pathlib import Path
from typing import Any

from harness import parser, row, show, write

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402  (it reads XLA_FLAGS)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from alexnet_jax import config as configs  # noqa: E402
from alexnet_jax import train  # noqa: E402
from alexnet_jax.data.prepare import open_or_prepare  # noqa: E402
from alexnet_jax.training import sharding  # noqa: E402
from alexnet_jax.utils import process  # noqa: E402

SECONDS = {"train": 0.005, "evaluate": 0.002}
FIELDS = {
    "model.width": 0.1,  # copying and checking the parameters is work and not idle time
    "parallel": "mesh.data",
    "eval.every_epochs": 64,  # of 62.5 steps
    "num_epochs": 320,  # 100 s, so that it draws once more
}
NEAR = 0.5  # seconds after a save that it can disturb


Step = namedtuple("Step", "kind start end")


class Trace:
    """What the steps record."""

    def __init__(self) -> None:
        self.calls: list[float] = []
        self.waited: list[float] = []  # for the batch of each training step
        self.steps: list[Step] = []

    def sleep(self, kind: str) -> Any:
        """Returns 1 after a time, in a jitted function, on one of its devices."""

        def work() -> Any:
            start = time.perf_counter()
            time.sleep(SECONDS[kind])
            self.steps.append(Step(kind, start, time.perf_counter()))
            return np.float32(1)

        return jax.pure_callback(work, jax.ShapeDtypeStruct((), jnp.float32))

    def recorded(self, compiled: Any) -> Any:
        """Returns a compiled step that records when it is called."""

        def step(*args: Any) -> Any:
            self.calls.append(time.perf_counter())
            return compiled(*args)

        step.lower, step.trace = compiled.lower, compiled.trace
        return step


def replace_steps(trace: Trace) -> None:
    """Makes `train_and_evaluate` use steps that sleep, and leave all arrays as they are."""

    def train_step(state: Any, batch: Any) -> Any:
        one = trace.sleep("train")
        loss = one + batch["label"].mean()  # waits for the batch
        return state.replace(step=state.step + 1), {"loss": loss, "top1": one, "top5": one}

    def eval_step(state: Any, batch: Any) -> Any:
        one = trace.sleep("evaluate") + 0 * batch["label"].sum() + 0 * state.step
        return {"loss": one, "top1": one, "top5": one, "count": one}

    train.build_train_step = lambda *_: train_step
    train.make_eval_step = lambda *_: eval_step
    for name in ("compile_train_step", "compile_eval_step"):
        compile_step = getattr(sharding.Parallel, name)
        recorded = lambda *args, compile_step=compile_step: trace.recorded(compile_step(*args))  # noqa: E731
        setattr(sharding.Parallel, name, recorded)
    add = train.Meter.add

    def recorded_add(meter: Any, step: int, metrics: Any, waited: float, *rest: Any) -> None:
        trace.waited.append(waited)
        add(meter, step, metrics, waited, *rest)

    train.Meter.add = recorded_add


def idle_by_cause(trace: Trace, every: int) -> dict[str, float]:
    """Returns the share of the time that the devices waited, by what the loop did meanwhile."""
    idle: dict[str, float] = defaultdict(float)
    number, saved, counted_from = 0, 0.0, 0.0
    for (a, b), called in zip(itertools.pairwise(trace.steps), trace.calls[1:], strict=True):
        number += a.kind == "train"
        ends_evaluation = (a.kind, b.kind) == ("evaluate", "train")
        if ends_evaluation or (a.kind == "train" and number % every == 0):
            saved = a.end
        if ends_evaluation and not counted_from:
            counted_from = b.start
            continue
        cause = {
            ("train", "evaluate"): "an evaluation starts",
            ("evaluate", "evaluate"): "during evaluations",
            ("evaluate", "train"): "an evaluation ends",
            ("train", "train"): f"the {NEAR} s after a save" if a.end < saved + NEAR else "other",
        }[a.kind, b.kind]
        if counted_from and called > a.end:
            seconds = b.start - a.end
            for_data = min(seconds, trace.waited[number]) if b.kind == "train" else 0.0
            idle[cause] += seconds - for_data
            idle["waiting for the next batch"] += for_data
    idle["in all"] = sum(idle.values())
    total = trace.steps[-1].end - counted_from
    return {cause: seconds / total for cause, seconds in idle.items()}


def main() -> None:
    args = parser(__doc__, quick="few steps").parse_args()
    process.set_up()
    trace = Trace()
    replace_steps(trace)
    with tempfile.TemporaryDirectory() as name:
        fields = FIELDS | {"data_dir": Path(name) / "data"}
        if args.quick:
            fields |= {"num_epochs": 2, "eval.every_epochs": 1, "checkpoint.every_steps": 30}
        config = configs.load("quickstart", [(key, str(value)) for key, value in fields.items()])
        open_or_prepare(config)
        train.train_and_evaluate(config, Path(name) / "run")
    causes = idle_by_cause(trace, config.checkpoint.every_steps)
    rows = [row(f"idle: {cause}", [100 * share], "%") for cause, share in causes.items()]
    show(rows)
    write(rows, args.json)


if __name__ == "__main__":
    main()
