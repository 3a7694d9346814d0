"""Measures how fast this machine trains, and what limits it.

    python -m alexnet_jax.bench

Measures the peak of the matrix product and of the memory. Then, for each variant, dtype and batch
size: the training step on images that are already on the devices, reading from a store alone, and
training from the store. Names the bottleneck. Writes bench.json and bench.png, which draws the
rates next to published ones. Ends within three minutes; Ctrl-C keeps what is measured.
"""

import argparse
import collections
import copy
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import __version__
from alexnet_jax import config as configs
from alexnet_jax.analysis import hlo
from alexnet_jax.data import augment, pipeline
from alexnet_jax.data.prepare import prepare_store
from alexnet_jax.data.sources import Example, Source
from alexnet_jax.data.store import Store, needs_preparation, open_store, store_path
from alexnet_jax.models.alexnet import DTYPES, VARIANTS
from alexnet_jax.models.summary import LayerRow
from alexnet_jax.train import STEPS_IN_FLIGHT
from alexnet_jax.training import sharding
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.sharding import Parallel
from alexnet_jax.training.train_step import TrainState, build_state, build_train_step
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import EXIT_KILLED_BY_CTRL_C, exit_now, exits_cleanly, one_line
from alexnet_jax.utils.files import explain_write_errors

LIMIT_S = 150.0  # besides this, JAX has to be imported and the plot drawn
REPEATS = 3
SCALINGS = 10  # between two waits
RANDOM_IMAGES = 1024  # 201 MB at 256 pixels
PUBLISHED = Path(__file__).with_name("published.json")

Results = dict[str, Any]  # bench.json or a part of it, which docs/performance.md explains


def calls_per_s(call: Callable[[], Any], seconds: float) -> float:
    """Returns how often per second a function can be called that starts work on the devices.

    The median of REPEATS. As in training, the latest calls are not waited for.
    """

    def rate(count: int) -> float:
        started = time.perf_counter()
        pending: collections.deque[Any] = collections.deque()
        for _ in range(count):
            pending.append(call())
            if len(pending) > STEPS_IN_FLIGHT:
                jax.block_until_ready(pending.popleft())
        jax.block_until_ready(list(pending))
        return count / (time.perf_counter() - started)

    rate(1)  # compiles
    # How many calls a repetition needs. They also use up what was read ahead.
    started, count = time.perf_counter(), 0
    while not count or time.perf_counter() - started < seconds / REPEATS:
        rate(1)
        count += 1
    return statistics.median(rate(count) for _ in range(REPEATS))


# ------------------------------------------------------------------------------------------
# Measurements
# ------------------------------------------------------------------------------------------


def measure(
    cases: Sequence[ConfigDict], results: Results, seconds: float, open_data: Callable[[], Store]
) -> None:
    """Measures all cases, and first the peaks of their devices. Fills in `results`."""
    peaks = {one["devices"]: one for one in results["peaks"]}
    store = None
    for config, row in zip(cases, results["cases"], strict=True):
        own = peaks[row["devices"]]
        if own["bytes_per_s"] is None:
            measure_peaks(
                sharding.make_parallel(config.parallel, config.hybrid_group), own, seconds
            )
        store = store or open_data()
        try:
            measure_case(config, store, own, row, seconds)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            row["note"] = "does not fit into memory" if full else one_line(error)[:100]
            print(f"{name_of(row)}: {row['note']}", flush=True)


def measure_peaks(parallel: Parallel, peaks: Results, seconds: float) -> None:
    """Adds flops_per_s by dtype and bytes_per_s. All devices work at once; these are their sums."""
    mesh, split = parallel.mesh, parallel.batch_sharding

    def on_each_device(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        mapped = jax.shard_map(function, mesh=mesh, in_specs=split.spec, out_specs=split.spec)
        return jax.jit(mapped, **options)

    # The virtual devices of a CPU share its processors and memory.
    on_cpu = jax.default_backend() == "cpu"
    processors = os.cpu_count() or 1
    side = round(1024 * (processors / mesh.size) ** (1 / 3)) if on_cpu else 8192
    for name in peaks["flops_per_s"]:
        dtype, _, precision = name.partition(" ")
        # Random, because the power that a product takes, and so its speed, depends on the values.
        shape = (mesh.size * side, side)
        random = functools.partial(jax.random.normal, jax.random.key(0), shape, dtype)
        square = functools.partial(_square, precision=precision or None)
        try:
            matrix = jax.jit(random, out_shardings=split)()
            multiply = functools.partial(on_each_device(square), matrix)
            rate = calls_per_s(multiply, seconds) * mesh.size * 2 * side**3
        except jax.errors.JaxRuntimeError as error:  # such as a dtype that the device lacks
            print(f"matrix product, {name}: not measured ({one_line(error)[:100]})", flush=True)
            continue
        peaks["flops_per_s"][name] = rate
        print(f"matrix product, {name}: {number(rate / 1e12)} TFLOP/s", flush=True)

    count = 2**26 if on_cpu else 2**28 * mesh.size
    scale = on_each_device(lambda x: 1.0000001 * x, donate_argnums=0)
    array = jax.jit(lambda: jnp.ones(count), out_shardings=split)()

    def scale_in_place() -> None:  # reads and writes each of the float32 values
        nonlocal array
        for _ in range(SCALINGS):
            array = scale(array)
        jax.block_until_ready(array)

    peaks["bytes_per_s"] = calls_per_s(scale_in_place, seconds) * SCALINGS * 8 * count
    print(f"memory: {number(peaks['bytes_per_s'] / 1e9)} GB/s", flush=True)


def _square(x: jax.Array, precision: str | None) -> jax.Array:
    return jnp.matmul(x, x, precision=precision)


def measure_case(
    config: ConfigDict, store: Store, peaks: Results, row: Results, seconds: float
) -> None:
    """Adds to `row` the rates of the training step, of the store, and of both together.

    The step and the batches are those of `train_and_evaluate`.
    """
    parallel, model, layers = sharding.build_network(config)
    steps_per_epoch = store.num_examples / config.batch_size
    tx = make_optimizer(config, steps_per_epoch)
    stats = augment.statistics(store, config)
    augmentation = augment.make_augment(config, stats, steps_per_epoch)
    train_step = build_train_step(config, model, tx, augmentation)

    def initial_state() -> TrainState:
        return build_state(config, model, tx)

    def place(batch: pipeline.Batch) -> dict[str, jax.Array]:
        return parallel.put_batch(batch, config.batch_size)

    shapes = jax.eval_shape(initial_state)
    state = process.run_once(initial_state, out_shardings=parallel.state_shardings(shapes))
    rows = parallel.local_rows(config.batch_size)
    order = pipeline.build_order(store, config)
    with closing(pipeline.train_batches(order, rows, place)) as batches:
        batch = next(batches)
        jitted: Any = parallel.compile_train_step(train_step, shapes)
        compiled = jitted.lower(state, batch).compile()

        def step(batch: Any) -> Any:
            nonlocal state
            state, metrics = compiled(state, batch)
            return metrics

        def record(what: str, call: Callable[[], Any]) -> float:
            rate: float = config.batch_size * calls_per_s(call, seconds)
            row[f"{what}_images_per_s"] = rate
            print(f"{name_of(row)}: {what} {number(rate)} images/s", flush=True)
            return rate

        rate = record("step", lambda: step(batch))
        row["flops_per_image"] = flops_per_image(layers, model.frozen)
        if peak := peaks["flops_per_s"][config.model.dtype]:
            row["flops_share"] = rate * row["flops_per_image"] / peak
        if accessed := bytes_moved(compiled):  # by each device
            row["bytes_per_image"] = accessed * parallel.mesh.size / config.batch_size
            row["bandwidth_share"] = rate * row["bytes_per_image"] / peaks["bytes_per_s"]
        record("store", lambda: next(batches))
        record("both", lambda: step(next(batches)))


def bytes_moved(program: jax.stages.Compiled) -> float:
    """Returns the bytes that each device reads and writes according to the compiler; 0: unknown."""
    if jax.default_backend() == "gpu":  # as `alexnet_jax.plan` counts them
        return sum(kernel.bytes_moved for kernel in hlo.kernels(program.as_text() or ""))
    analysis: Any = program.cost_analysis() or {}
    return float(analysis.get("bytes accessed", 0))


def flops_per_image(layers: Sequence[LayerRow], frozen: Sequence[str] = ()) -> int:
    """Returns the FLOPs of a training step per image, by the formulas of the layers.

    They are those of the forward pass, of the gradients of the kernels that train, and of the
    gradients of the inputs of all layers behind the first of those.
    """
    trained = [row for row in layers if row.params and row.name not in frozen]
    behind = layers[layers.index(trained[0]) + 1 :] if trained else ()
    return sum(row.flops for row in (*layers, *trained, *behind))


def open_data(config: ConfigDict, has_own: bool, folder: str) -> Store:
    """Opens the training data of a config if it is prepared; else prepares random images."""
    path = store_path(config, config.train_split)
    if has_own and not needs_preparation(path):
        print(f"data: {path}", flush=True)
        return open_store(path)
    reason = f", because {path} is not prepared" if has_own else ""
    print(f"data: {RANDOM_IMAGES:,} random images{reason}", flush=True)
    classes = tuple(map(str, range(config.model.num_classes)))
    # Preparation enlarges them. JPEGs of noise would be far larger than those of photographs.
    shape = (max(1, config.image_size // 4),) * 2 + (3,)

    def read(first: int, end: int) -> Iterator[Example]:
        for index in range(first, end):
            image = np.random.default_rng(index).integers(0, 256, shape, np.uint8)
            yield Example(str(index), index % len(classes), functools.partial(np.copy, image))

    source = Source("random images", RANDOM_IMAGES, classes, read)
    with explain_write_errors(folder, "another TMPDIR"):
        prepare_store(source, f"{folder}/random", config.image_size, config.storage)
    return open_store(f"{folder}/random")


# ------------------------------------------------------------------------------------------
# Results
# ------------------------------------------------------------------------------------------


def number(value: float | None, scale: float = 1.0) -> str:
    """Returns `value / scale` with three significant digits, or more if it is large."""
    if value is None:
        return "-"
    return f"{value / scale:,.0f}" if value / scale >= 100 else f"{value / scale:.3g}"


def percent(share: float | None) -> str:
    """Returns a share in percent."""
    return "-" if share is None else f"{100 * share:.0f} %"


def name_of(row: Results) -> str:
    """Returns what a row is about."""
    return f"{row['variant']}, {row['parallel']}, {row['dtype']}, batch {row['batch_size']}"


def describe(results: Results) -> str:
    """Returns the printed summary: the peaks, a line for each case, and the bottleneck."""
    lines = [
        f"peaks of {peaks['devices']} device(s): "
        + "".join(f"{k} {number(v, 1e12)} TFLOP/s, " for k, v in peaks["flops_per_s"].items())
        + f"memory {number(peaks['bytes_per_s'], 1e9)} GB/s"
        for peaks in results["peaks"]
    ]
    table = [("images/s", "step", "of peak", "of memory", "store", "both", "")]
    for row in results["cases"]:
        step, store, both = (number(row[f"{w}_images_per_s"]) for w in ("step", "store", "both"))
        shares = percent(row["flops_share"]), percent(row["bandwidth_share"])
        table.append((name_of(row), step, *shares, store, both, row["note"]))
    width = max(len(cells[0]) for cells in table)
    for name, *cells, note in table:
        lines.append(f"{name:{width}}{''.join(f'{x:>11}' for x in cells)}  {note}".rstrip())
    return "\n".join((*lines, results["bottleneck"]))


def bottleneck(cases: Sequence[Results]) -> str:
    """Returns a sentence about what limits training in the case with the fastest step."""
    complete = [row for row in cases if row["both_images_per_s"]]
    if not complete:
        return "No case was measured to its end, so the bottleneck is not known."
    row = max(complete, key=lambda row: row["step_images_per_s"])
    step, store, both = (row[f"{what}_images_per_s"] for what in ("step", "store", "both"))
    if store < step:
        return (
            f"The store is the bottleneck of {name_of(row)}: the training step could take "
            f"{number(step / store)} times as many images, and training from the store reaches "
            f"{percent(both / store)} of its rate."
        )
    return (
        f"The training step is the bottleneck of {name_of(row)}: it reaches "
        f"{percent(row['flops_share'])} of the peak matrix product and "
        f"{percent(row['bandwidth_share'])} of the memory bandwidth; the store could feed "
        f"{number(store / step)} times as many images, and training from it reaches "
        f"{percent(both / step)} of the step's rate."
    )


def save_plot(results: Results, path: Path) -> None:
    """Draws the measured images/s next to published ones."""
    from matplotlib.figure import Figure  # takes a while

    machine = results["machine"]
    where = f"{machine['devices']} × {machine['device']}, {results['date'][:10]}"
    bars = [
        (rate, f"{name_of(row)}: {label}\n{where}", "tab:blue")
        for row in results["cases"]
        for what, label in (("step", "training step"), ("both", "training from a store"))
        if (rate := row[f"{what}_images_per_s"])
    ]
    for other in json.loads(PUBLISHED.read_text()):
        setting = f"{other['dtype']}, batch {other['batch_size']}, {other['year']}"
        label = f"{other['device']}, {setting}: {other['what']}\n{other['source']}"
        bars.append((other["images_per_s"], label, "silver"))
    rates, labels, colors = zip(*sorted(bars), strict=True)
    figure = Figure(figsize=(11, 0.5 * len(bars) + 0.8), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(range(len(bars)), rates, color=colors)
    axes.bar_label(drawn, [number(rate) for rate in rates], padding=4, fontsize=8)
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.set(xscale="log", xlabel="images/s; blue: measured here, gray: published")
    axes.set_xlim(left=min(1.0, *rates), right=5 * max(rates))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def empty_results(cases: Sequence[ConfigDict]) -> Results:
    """Returns results in which nothing is measured yet."""
    parallels = [sharding.make_parallel(config.parallel, config.hybrid_group) for config in cases]
    device = jax.devices()[0]
    # At its default precision, that of training, float32 can mean TF32, or bfloat16 on TPUs.
    precisions = ("float32", *([] if device.platform == "cpu" else ["float32 highest"]), "bfloat16")
    measured = (
        *("step_images_per_s", "flops_per_image", "flops_share", "bytes_per_image"),
        *("bandwidth_share", "store_images_per_s", "both_images_per_s"),
    )
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {
            "platform": device.platform,
            "device": device.device_kind,
            "devices": jax.device_count(),
            "processors": os.cpu_count(),
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "alexnet_jax": __version__,
        },
        "peaks": [
            {"devices": count, "flops_per_s": dict.fromkeys(precisions), "bytes_per_s": None}
            for count in sorted({parallel.mesh.size for parallel in parallels})
        ],
        "cases": [
            {
                "variant": config.model.variant,
                "parallel": parallel.kind,
                "devices": parallel.mesh.size,
                "dtype": config.model.dtype,
                "batch_size": config.batch_size,
                **dict.fromkeys(measured),
                "note": "",
            }
            for config, parallel in zip(cases, parallels, strict=True)
        ],
        "bottleneck": bottleneck([]),
    }


def write(results: Results, folder: Path) -> None:
    """Writes bench.json. Raises UserError if that is not possible."""
    with explain_write_errors(folder, "another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(results, indent=2) + "\n")


# ------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------


def make_cases(args: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> list[ConfigDict]:
    """Returns a config for each combination of the options.

    Raises:
      UserError: a value does not exist, or does not fit the devices.
    """
    config = configs.load(args.config or str(configs.bundled_configs()["imagenet"]), overrides)
    configs.check_bounds(config)
    # The last changes fastest. A GPU compiles a step in 40 s, so that the limit may end the list.
    of_machine: dict[str, list[Any]] = {
        "batch_size": [64],
        "parallel": ["auto"],
        "model.dtype": ["float32"],
        "model.variant": ["owt"],
    }
    if jax.default_backend() != "cpu":
        of_machine["model.variant"] = ["owt", "paper"]
        of_machine["model.dtype"] = ["bfloat16"]
        of_machine["batch_size"] = [size * jax.device_count() for size in (256, 1024)]
    options = (args.batch_sizes, args.parallel, args.dtypes, args.variants)
    fields = configs.flat(config)
    given = fields if args.config else dict(overrides)
    choices = [
        option or ([fields[name]] if name in given else default)
        for option, (name, default) in zip(options, of_machine.items(), strict=True)
    ]
    cases = []
    for values in itertools.product(*choices):
        case = config.copy_and_resolve_references()
        case.update_from_flattened_dict(dict(zip(of_machine, values, strict=True)))
        sharding.build_network(case)  # checks it
        cases.append(case)
    return cases


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="measure with this config and its data, if that is prepared (default: random images "
        "of ImageNet's size); --config.FIELD=VALUE changes a field",
    )
    parser.add_argument("--variants", nargs="+", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="over all devices")
    parser.add_argument("--dtypes", nargs="+", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--parallel", nargs="+", help=f"of auto, {', '.join(sharding.KINDS)}")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of each measurement; default: 2"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, help=f"seconds in all; default: {LIMIT_S:.0f}"
    )
    parser.add_argument(
        "--out", type=buckets.local, default=Path("runs/bench"), help="default: runs/bench"
    )
    words, overrides = configs.split_overrides(argv)
    args = parser.parse_args(words)
    process.set_up()
    cases = make_cases(args, overrides)
    results = empty_results(cases)
    write(results, args.out)  # finds out now whether it can be written
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()), flush=True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            own = functools.partial(open_data, cases[0], bool(args.config), folder)
            measure(cases, results, args.seconds, own)
        except BaseException as error:
            failures.append(error)

    # In a thread of its own, so that the main thread, which gets Ctrl-C, is never waiting for XLA.
    worker = threading.Thread(target=work, daemon=True)
    code, stopped, deadline = 0, "", time.monotonic() + args.limit
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        worker.start()
        try:
            while worker.is_alive() and not stopped:
                worker.join(1.0)
                write(results, args.out)  # the system may kill a process that needs much memory
                if time.monotonic() > deadline:
                    stopped = f"stopped by --limit {args.limit:.0f}"
        except KeyboardInterrupt:
            code, stopped = EXIT_KILLED_BY_CTRL_C, "interrupted"
    results = copy.deepcopy(results)  # the thread may still add to the other one
    for row in results["cases"]:
        if not row["both_images_per_s"]:
            row["note"] = row["note"] or stopped or "failed"
    results["bottleneck"] = bottleneck(results["cases"])
    write(results, args.out)
    save_plot(results, args.out / "bench.png")
    print(f"\n{describe(results)}\nwrote bench.json and bench.png to {args.out}", flush=True)
    if failures:
        raise failures[0]
    if stopped:  # a normal exit would take the interpreter away from the other thread
        exit_now(code, f"{stopped}; what was measured before is in {args.out}")


if __name__ == "__main__":
    main()
