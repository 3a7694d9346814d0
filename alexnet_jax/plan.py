"""What a TPU slice would make of a config, told by the compiler, with no TPU at hand.

    python -m alexnet_jax.plan --config configs/imagenet_pod.py --topology v5e:16x16

Compiles the training step for each way of sharing it, in a minute or two each, and prints what a
chip holds, sends and computes in a step. Writes plan.json and plan.png beside. Nothing is measured
but the rate at which this machine reads images.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax.analysis import figures as plots
from alexnet_jax.analysis import tpu
from alexnet_jax.analysis.slice_costs import Row, compile_layout, row_of, scaling
from alexnet_jax.data import pipeline
from alexnet_jax.data.prepare import prepare_store
from alexnet_jax.data.sources import Example, Source
from alexnet_jax.data.store import Store, needs_preparation, open_store, store_path
from alexnet_jax.training import checks, placement
from alexnet_jax.training import sharding as parallel
from alexnet_jax.utils.errors import UserError, exits_cleanly
from alexnet_jax.utils.files import explain_write_errors

LAYOUTS = tuple(
    itertools.product(("mesh.data", "mesh.zero", "mesh.hybrid"), parallel.GRADIENT_DTYPES)
)
TRIAL_IMAGES = 1024
TRIAL_S = 3.0


def reading_rate(config: ConfigDict) -> tuple[float, str]:
    """Returns how many images a second this machine reads for training, and of which data.

    From the config's own store if that is complete, else from one of noise in a temporary folder.
    """
    path = store_path(config, config.train_split)
    if not needs_preparation(path):
        return _rate(open_store(path), config), path
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0)
        shape = (config.image_size, config.image_size, 3)

        def read(first: int, end: int) -> Iterator[Example]:
            for number in range(first, end):
                pixels = noise.integers(0, 256, shape, np.uint8)
                yield Example(str(number), 0, pixels.copy)

        source = Source("noise", TRIAL_IMAGES, ("noise",), read)
        prepare_store(source, f"{folder}/noise", config.image_size, config.storage)
        return _rate(open_store(f"{folder}/noise"), config), "noise in the page cache"


def _rate(opened: Store, config: ConfigDict) -> float:
    size = min(config.batch_size, 256)
    batches = pipeline.train_batches(opened, size, config.seed)
    next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < TRIAL_S:
        next(batches)
        count += size
    return count / (time.perf_counter() - started)


def assumptions(topology: str, chip: tpu.Chip, config: ConfigDict, chips: int) -> list[str]:
    """Returns what the figures rest on, a sentence each."""
    return [
        f"cycles are estimates of libtpu's compiler, at {chip.hertz / 1e9:.2f} GHz; nothing ran",
        f"a link carries {chip.link_bytes_per_s / 1e9:.0f} GB/s in each direction, from the "
        "published bandwidth of a chip over its ports; latency is not counted",
        "bytes are what a chip sends: 2 (n-1)/n of an all-reduce over n chips, (n-1)/n of the rest",
        "the step's time is compute plus communication; with perfect overlap it would be the "
        "larger of the two",
        f"{config.batch_size // chips} images a chip; a chip has {chip.hbm_bytes / 1e9:.0f} GB",
        "activations are the layers' outputs in the model's dtype, and part of the temporaries",
        "pmap shares a step as mesh.data does; jit is for one chip",
        f"slices smaller than {topology} are computed from its program, not compiled",
    ]


def describe(row: Row) -> str:
    """Returns one layout's lines of the table."""
    held, megabyte = row["memory"], 1e6
    sums: dict[tuple[str, str], list[float]] = {}
    for found in row["collectives"]:
        total = sums.setdefault((found["kind"], found["dtypes"]), [0, 0.0])
        total[0] += 1
        total[1] += found["bytes_sent"]
    listed = ", ".join(
        f"{count} {kind} ({dtypes}) {sent / megabyte:.1f} MB"
        for (kind, dtypes), (count, sent) in sorted(sums.items(), key=lambda item: -item[1][1])
    )
    return (
        f"{row['layout']}, gradients in {row['gradient_dtype']}\n"
        f"  memory a chip   {held['total'] / megabyte:.0f} MB"
        f"{'' if row['fits'] else ', which DOES NOT FIT'}: params "
        f"{held['params'] / megabyte:.0f}, optimizer {held['optimizer'] / megabyte:.0f}, batch "
        f"{held['batch'] / megabyte:.0f}, temporaries {held['temporaries'] / megabyte:.0f} (of "
        f"layers' outputs {held['activations'] / megabyte:.0f})\n"
        f"  sent a step     {row['bytes_sent'] / megabyte:.1f} MB a chip: {listed or 'nothing'}\n"
        f"  time            {row['cycles'] / 1e6:.2f} M cycles, {row['compute_s'] * 1e3:.2f} ms, "
        f"and {row['communication_s'] * 1e3:.2f} ms of communication: "
        f"{row['step_s'] * 1e3:.2f} ms a step "
        f"({row['step_s_if_all_overlaps'] * 1e3:.2f} if all overlaps), "
        f"{row['images_per_s']:,.0f} images/s"
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topology", required=True, help="e.g. v5e:16x16")
    parser.add_argument("--layouts", nargs="+", help="e.g. mesh.data; default: all")
    parser.add_argument("--workdir", type=Path, help="default: runs/<config name>_plan")
    config, args = configs.parse(argv, parser)
    jax.config.update("jax_platforms", "cpu")
    layouts = _chosen(args.layouts)
    chip, devices = tpu.topology_devices(args.topology)
    for layout in layouts:
        checks.check_config(_with(config, *layout), len(devices))
    workdir = (args.workdir or Path("runs") / f"{config.name}_plan").expanduser()
    with explain_write_errors(workdir, "another --workdir"):
        workdir.mkdir(parents=True, exist_ok=True)
        _plan(config, args.topology, chip, devices, layouts, workdir)


def _chosen(names: Sequence[str] | None) -> list[tuple[str, str]]:
    known = {",".join(layout): layout for layout in LAYOUTS}
    for name in names or ():
        if not any(whole.startswith(name) for whole in known):
            raise UserError(f"--layouts {name}: it can be {', '.join(known)}, or a kind alone")
    return [
        layout
        for whole, layout in known.items()
        if not names or any(whole.startswith(name) for name in names)
    ]


def _with(config: ConfigDict, kind: str, gradient_dtype: str) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.parallel, changed.optimizer.gradient_dtype = kind, gradient_dtype
    return changed


def _plan(
    config: ConfigDict,
    topology: str,
    chip: tpu.Chip,
    devices: list[jax.Device],
    layouts: list[tuple[str, str]],
    workdir: Path,
) -> None:
    hosts = len({device.process_index for device in devices})
    told = assumptions(topology, chip, config, len(devices))
    print(f"{config.name} on {topology}, {len(devices)} chips of {hosts} hosts. Assumed:")
    print(*(f"- {text}" for text in told), sep="\n", end="\n\n", flush=True)
    rows, curves = [], {}
    for kind, gradient_dtype in layouts:
        layout = compile_layout(_with(config, kind, gradient_dtype), devices)
        rows.append(row_of(layout, chip, hosts))
        curve = scaling(rows[-1], layout, topology, chip)
        curves[f"{kind}, {gradient_dtype}"] = curve
        print(describe(rows[-1]), end="\n\n", flush=True)
    rate, data = reading_rate(config)
    for row in rows:
        row["reads_enough"] = rate >= row["images_per_s_of_a_host"]
    needed = [row["images_per_s_of_a_host"] for row in rows]
    image_bytes = config.image_size**2 * 3
    print(
        f"Each host must read {min(needed):,.0f} to {max(needed):,.0f} images/s "
        f"({max(needed) * image_bytes / 1e9:.1f} GB/s). This machine reads {rate:,.0f} images/s "
        f"({data}): {'enough' if rate >= max(needed) else 'NOT enough'} for all of these."
    )
    compared = _compared(
        rows, placement.fc_parts(_with(config, "mesh.hybrid", "float32"), len(devices))
    )
    print(*compared, sep="\n")
    whole = {
        "config": config.name,
        "topology": topology,
        "assumptions": told,
        "layouts": rows,
        "scaling": curves,
        "images_per_s_read": rate,
        "images_read_from": data,
        "compared": compared,
    }
    (workdir / "plan.json").write_text(json.dumps(whole, indent=2) + "\n")
    plots.save_scaling(curves, topology, workdir / "plan.png")
    print(f"written: {workdir / 'plan.json'}, {workdir / 'plan.png'}")


def _compared(rows: list[Row], fc_parts: int) -> list[str]:
    """Says what each layout sends against data parallelism, and what hybrid's bytes are for."""
    base = {row["gradient_dtype"]: row for row in rows if row["layout"] == "mesh.data"}
    shares = [
        f"{row['layout']} with {row['gradient_dtype']} gradients sends "
        f"{row['bytes_sent'] / base[dtype]['bytes_sent']:.2f} of the bytes of mesh.data with "
        f"{dtype} gradients"
        for row in rows
        for dtype in base
        if row is not base[dtype]
    ]
    for row in rows:
        if row["layout"] == "mesh.hybrid":
            sent: dict[int, float] = {}
            for found in row["collectives"]:
                sent[found["group"]] = sent.get(found["group"], 0.0) + found["bytes_sent"] / 1e6
            by_size = (f"{sent[size]:.1f} MB over groups of {size}" for size in sorted(sent))
            shares.append(
                f"mesh.hybrid with {row['gradient_dtype']} gradients sends {', '.join(by_size)}; "
                f"those of {fc_parts} are activations and grow with hybrid_group, those of "
                f"{row['chips'] // fc_parts} fc gradients, which shrink with it"
            )
    return shares


if __name__ == "__main__":
    main()
