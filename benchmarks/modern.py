"""What do the ingredients of the modern recipe add to the training step?

    python benchmarks/modern.py

Adds one after the other to `configs/imagenette.py` and measures the step on CPU, in turns. Then it
compiles the steps with crops of 224 pixels for a GPU and a TPU that are not here, if their
compilers are (requirements-plan.txt). Of these nothing is measured: bytes are what kernels move,
and cycles are libtpu's model of a chip, which has none for some fusions, such as those of look-ups.
"""

import importlib.util
from collections.abc import Generator
from functools import partial
from typing import Any

import jax
import numpy as np
from harness import Row, parser, ratio, row, show, take_turns, write
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax.analysis import hlo, step_costs, targets
from alexnet_jax.data.augment import Statistics, make_augment
from alexnet_jax.training import sharding
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.train_step import build_state, build_train_step
from alexnet_jax.utils import process

# In the order in which they are added. The crop size is the same in all.
INGREDIENTS = {
    "plain": {},
    "+ label smoothing": {"label_smoothing": 0.1},
    "+ moving average": {"optimizer.ema_decay": 0.999},
    "+ MixUp and CutMix": {"augment.mixup": 0.2, "augment.cutmix": 1.0},
    "+ erasing": {"augment.erase": 0.1},
    "+ whole photographs": {"stored": "whole"},
    "+ TrivialAugment": {"augment.trivial": True},
}
ROUNDS, STEPS = 5, 4
TOPOLOGIES = ("h100:1", "v5e:2x4")
COMPILED_BATCH = 256


def config_with(name: str, base: str, **fields: Any) -> ConfigDict:
    """Returns a plain config with the ingredients up to one of INGREDIENTS."""
    config = configs.load_config(base, parallel="jit", **fields)
    for ingredient, values in INGREDIENTS.items():
        config.update_from_flattened_dict(values)
        if ingredient == name:
            break
    return config


def steps(name: str, batch_size: int) -> Generator[int]:
    """Yields the number of images after each step."""
    process.set_up()
    config = config_with(name, "imagenette", batch_size=batch_size)
    parallel, model, _ = sharding.build_network(config)
    tx = make_optimizer(config, steps_per_epoch=100.0)
    augment = make_augment(config, Statistics(np.full(3, 120, np.float32), np.eye(3) / 9))
    step = jax.jit(build_train_step(config, model, tx, augment), donate_argnums=0)
    state = process.run_once(lambda: build_state(config, model, tx))
    batch: Any = {
        name: np.ones(like.shape, like.dtype) for name, like in parallel.batch_like(config).items()
    }
    rng = np.random.default_rng(0)
    batch["image"] = rng.integers(0, 256, batch["image"].shape, np.uint8)
    if "size" in batch:
        batch["size"] *= config.image_size
        batch["size"][::2, 1] += config.image_size // 3
    while True:
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        yield batch_size


def measured(names: list[str], batch_size: int, rounds: int, count: int) -> list[Row]:
    """Returns the rates of the step on CPU, and their ratios to the plain one."""
    makers = {name: partial(steps, name, batch_size) for name in names}
    turns = take_turns(makers, rounds, seconds=0, group=count)
    rates = {name: [turn.rate for turn in of] for name, of in turns.items()}
    rows = [row(name, of, "images/s", batch_size) for name, of in rates.items()]
    last = names[-1]
    return [*rows, ratio(f"{last} / plain", rates[last], rates["plain"], batch=batch_size)]


def compiled(topology: str) -> list[Row]:
    """Returns bytes and roofline time, or cycles, of the step for a device that is not here."""
    target, (device, *_) = targets.topology_devices(topology)
    rows = []
    fields = {"image_size": 256, "augment.crop_size": 224, "batch_size": COMPILED_BATCH}
    fields |= {"model.num_classes": 1000, "model.dtype": "bfloat16"}
    for name in INGREDIENTS:
        config = config_with(name, "imagenette", **fields)
        program = step_costs.compile_step(config, [device], target.compiler_options).program
        if target.kind == "gpu":
            kernels = hlo.kernels(program.as_text())
            values = {
                "GB moved": sum(kernel.bytes_moved for kernel in kernels) / 1e9,
                "ms, roofline": 1e3 * sum(step_costs.roofline_s(k, target) for k in kernels),
            }
        else:
            operations, others = hlo.operation_cycles(program.as_text())
            values = {
                "M cycles": sum(operation.cycles for operation in operations) / 1e6,
                "not estimated": others["fusion"],
            }
        what = f"{topology.partition(':')[0]}, {name}"
        rows += [row(what, [value], unit, COMPILED_BATCH) for unit, value in values.items()]
        show(rows[-len(values) :])
    return rows


def main() -> None:
    args = parser(__doc__, quick="two contenders on CPU, a small batch").parse_args()
    if args.quick:
        rows = measured(["plain", "+ TrivialAugment"], batch_size=4, rounds=1, count=1)
    else:
        rows = measured(list(INGREDIENTS), batch_size=64, rounds=ROUNDS, count=STEPS)
    show(rows)
    write(rows, args.json)
    if not args.quick and importlib.util.find_spec("libtpu"):
        for topology in TOPOLOGIES:
            rows += compiled(topology)
            write(rows, args.json)


if __name__ == "__main__":
    main()
