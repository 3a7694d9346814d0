"""Estimates what GPUs or a TPU slice make of a config, without having them.

    python -m alexnet_jax.plan --config configs/imagenet.py --topology h100:8
    python -m alexnet_jax.plan --config configs/imagenet_pod.py --topology v5e:16x16

Compiles the training step for each way of sharding it, for seconds (GPU) or a minute or two (TPU),
and prints what a device holds, sends and computes in a step. Writes plan.json. Only one thing is
measured: how fast this machine reads images, if the config's data is prepared here. On the devices
themselves, `python -m alexnet_jax.bench` measures.
"""

import argparse
import itertools
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax.analysis import step_costs, targets
from alexnet_jax.data import pipeline
from alexnet_jax.data.store import image_shape, needs_preparation, open_store, store_paths
from alexnet_jax.models.alexnet import DTYPES
from alexnet_jax.training import sharding
from alexnet_jax.utils import buckets
from alexnet_jax.utils.errors import UserError, exits_cleanly
from alexnet_jax.utils.files import explain_write_errors

KINDS = ("mesh.data", "mesh.zero", "mesh.hybrid")
LAYOUTS = tuple(itertools.product(KINDS, DTYPES))
MEASURED_S = 3.0


def reading_rate(config: ConfigDict) -> float | None:
    """Returns how many images per second this machine reads; None if no data is prepared here."""
    path = store_paths(config)["train"]
    if needs_preparation(path):
        return None
    config = config.copy_and_resolve_references()
    config.batch_size = size = min(config.batch_size, 256)
    batches = pipeline.train_batches(pipeline.build_order(open_store(path), config))
    next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < MEASURED_S:
        next(batches)
        count += size
    return count / (time.perf_counter() - started)


def assumptions(target: targets.Target, config: ConfigDict, num_devices: int) -> list[str]:
    """Returns what the numbers assume, one sentence each."""
    link = f"{target.link_bytes_per_s / 1e9:.0f} GB/s in each direction"
    if target.kind == "tpu":
        time = f"Cycles are estimates of libtpu's compiler, at {target.hertz / 1e9:.2f} GHz."
        link = f"A link carries {link}: a chip's published bandwidth over the number of its ports."
    else:
        peaks = ", ".join(
            f"{rate / 1e12:.0f} TFLOP/s in {dtype}" for dtype, rate in target.peak_flops.items()
        )
        time = (
            "Each kernel takes the larger of its bytes over "
            f"{target.memory_bytes_per_s / 1e12:.2f} TB/s and its FLOPs over the peak ({peaks}). "
            "Real kernels are slower: this is a bound, not a prediction."
        )
        link = f"The NVLinks of a GPU carry {link}."
    return [
        f"{time} Nothing ran.",
        f"{link} Latency is not counted.",
        "Bytes are what a device sends: 2 (n-1)/n of the array for an all-reduce over n devices, "
        "all of it for a collective-permute, and (n-1)/n for other collectives.",
        "The step takes computation plus communication. With perfect overlap it takes the larger "
        "of the two.",
        f"A device has {config.batch_size // num_devices} images and "
        f"{target.memory_bytes / 1e9:.0f} GB.",
        "Activations are the outputs of the layers in the model's dtype. They are part of the "
        "temporaries.",
        "pmap sends as many bytes as mesh.data.",
    ]


def describe(costs: step_costs.Costs) -> str:
    """Returns the printed summary of one layout."""
    memory = {use: f"{held / 1e6:.0f}" for use, held in costs["memory"].items()}
    too_large = "" if costs["fits"] else ", DOES NOT FIT"
    sums: dict[tuple[str, str, int], tuple[int, float, float]] = {}
    for found in costs["collectives"]:
        key = (found["kind"], found["dtypes"], found["group"])
        runs, sent, seconds = sums.get(key, (0, 0.0, 0.0))
        sums[key] = runs + found["runs"], sent + found["bytes_sent"], seconds + found["seconds"]
    listed = [
        f"    {sent / 1e6:7.1f} MB  {seconds * 1e3:6.3f} ms  {runs} × {kind} of {dtypes} over "
        f"{group} devices"
        for (kind, dtypes, group), (runs, sent, seconds) in sorted(
            sums.items(), key=lambda item: -item[1][1]
        )
    ]
    slow = [
        f"    {found['bytes_moved'] / 1e6:7.1f} MB  {found['seconds'] * 1e3:6.3f} ms  "
        f"{found['name']} {_layer(found['origin'])}"
        for found in costs.get("slowest_kernels", ())
    ]
    flops = ", ".join(f"{n / 1e12:.3f} TFLOP in {dtype}" for dtype, n in costs["flops"].items())
    missing = costs.get("operations_without_cycles", {})
    unknown = ", ".join(f"{n} {opcode}" for opcode, n in missing.items())
    cycles = f" ({costs['cycles'] / 1e6:.2f} M cycles)" if "cycles" in costs else ""
    return "\n".join(
        (
            f"{costs['layout']}, gradients in {costs['gradient_dtype']}",
            f"  memory per device  {memory['total']} MB{too_large}: "
            f"params {memory['params']}, optimizer {memory['optimizer']}, batch {memory['batch']}, "
            f"temporaries {memory['temporaries']} (activations {memory['activations']})",
            f"  program            {costs['kernels']} kernels, {costs['bytes_moved'] / 1e9:.2f} GB "
            f"read and written, {flops}",
            *slow,
            f"  sent per step      {costs['bytes_sent'] / 1e6:.1f} MB per device",
            *listed,
            f"  time per step      {costs['step_s'] * 1e3:.2f} ms: computation "
            f"{costs['compute_s'] * 1e3:.2f} ms{cycles}, "
            f"communication {costs['communication_s'] * 1e3:.2f} ms; "
            f"{costs['step_s_if_all_overlaps'] * 1e3:.2f} ms if all of it overlaps"
            f"{f'; no estimate for {unknown}' if unknown else ''}",
            f"  throughput         {costs['images_per_s']:,.0f} images/s, "
            f"{costs['images_per_s_per_host']:,.0f} per host",
        )
    )


def _layer(origin: str) -> str:
    """Returns the layer of an operation, and whether it computes a gradient."""
    layers = re.findall(r"\b(?:conv|fc|bn)\d", origin)
    gradient = " gradient" if "transpose(jvp" in origin else ""
    return f"({(layers or origin.split('/'))[-1]}{gradient})"


def choose_layouts(names: Sequence[str] | None) -> list[tuple[str, str]]:
    """Returns the (kind, gradient dtype) pairs that --layouts names; all of them by default.

    Raises:
      UserError: there is no such layout.
    """
    known = {",".join(layout): layout for layout in LAYOUTS}
    chosen = []
    for name in names or KINDS:
        matching = [layout for full, layout in known.items() if name in (full, layout[0])]
        if not matching:
            raise UserError(
                f"--layouts {name} does not exist; choose from {', '.join((*KINDS, *known))}"
            )
        chosen += matching
    return list(dict.fromkeys(chosen))


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--topology",
        required=True,
        help=f"h100:8 or v5e:16x16, for example; one of {', '.join(targets.names())}",
    )
    parser.add_argument(
        "--layouts", nargs="+", help="for example mesh.data or mesh.zero,bfloat16; default: all"
    )
    parser.add_argument("--workdir", type=buckets.local, help="default: runs/<config name>_plan")
    config, args = configs.parse(argv, parser)
    layouts = choose_layouts(args.layouts)
    jax.config.update("jax_platforms", "cpu")
    target, devices = targets.topology_devices(args.topology)
    if len(devices) == 1:
        if args.layouts:
            raise UserError("--layouts needs several devices; leave it out for one")
        layouts = [("jit", config.optimizer.gradient_dtype)]
    variants = [_with_layout(config, *layout) for layout in layouts]
    for variant in variants:  # all of them, before minutes go into compiling the first one
        sharding.build_network(variant, devices)
    workdir = (args.workdir or Path("runs") / f"{config.name}_plan").expanduser()
    with explain_write_errors(workdir, "another --workdir"):
        workdir.mkdir(parents=True, exist_ok=True)

    num_hosts = len({device.process_index for device in devices})
    assumed = assumptions(target, config, len(devices))
    print(
        f"{config.name} on {args.topology}: {len(devices)} device(s), {num_hosts} host(s). "
        "Assumptions:"
    )
    print(*(f"- {text}" for text in assumed), sep="\n", end="\n\n", flush=True)
    costs = []
    for variant in variants:
        step = step_costs.compile_step(variant, devices, target.compiler_options)
        costs.append(step_costs.step_costs(step, target, num_hosts))
        print(describe(costs[-1]), end="\n\n", flush=True)

    needed = max(found["images_per_s_per_host"] for found in costs)
    gigabytes = needed * math.prod(image_shape(config.image_size, config.stored)) / 1e9
    rate = reading_rate(config)
    verdict = "The config's data is not prepared here, so this machine's rate was not measured."
    if rate is not None:
        enough = "enough" if rate >= needed else "NOT enough"
        verdict = f"This machine reads {rate:,.0f} images/s: {enough} for every layout."
    print(f"Each host must read up to {needed:,.0f} images/s ({gigabytes:.1f} GB/s). {verdict}")

    plan = {
        "config": config.name,
        "topology": args.topology,
        "assumptions": assumed,
        "layouts": costs,
        "images_per_s_read": rate,
    }
    path = workdir / "plan.json"
    with explain_write_errors(workdir, "another --workdir"):
        path.write_text(json.dumps(plan, indent=2) + "\n")
    print(f"wrote {path}")


def _with_layout(config: ConfigDict, kind: str, gradient_dtype: str) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.parallel, changed.optimizer.gradient_dtype = kind, gradient_dtype
    return changed


if __name__ == "__main__":
    main()
