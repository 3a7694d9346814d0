"""How much of reading batches and bringing them to the devices goes on beside the steps.

    python benchmarks/prefetch_trace.py [--plot FILE.png]

Trains the quickstart for one epoch on two CPU devices, where a transfer is a copy, under JAX's
profiler, and adds up from the trace which part of the time of "read batch" and "place batch" some
step was being executed.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

TWO_DEVICES = "--xla_force_host_platform_device_count=2"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {TWO_DEVICES}"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402  (it must find the variable above)
from rows import options, row, write  # noqa: E402

from alexnet_jax import config as configs  # noqa: E402
from alexnet_jax.train import train_and_evaluate  # noqa: E402
from alexnet_jax.training.metrics import read_metrics  # noqa: E402

Span = tuple[float, float]  # begin and end, ms
LANES = {
    "ThunkExecutor::Execute": "steps",
    "read batch": "read batch",
    "place batch": "place batch",
}
STEP = "train"  # the trainer's annotation of a step's start
WARM_UP = 8  # steps: the first is compiled, and the next ones find all buffers full
WINDOW_STEPS = 6
QUICK = {"train_split": "train[:1600]", "eval_split": "test[:64]", "model.width": "0.1"}


def traced_epoch(
    data_dir: Path, workdir: Path, changes: Mapping[str, str]
) -> dict[str, list[Span]]:
    """Trains an epoch of the changed quickstart.

    Returns the spans of each lane between the first steps and the last.
    """
    fields = {"data_dir": str(data_dir), "num_epochs": "1", "log_every_steps": "5", **changes}
    config = configs.load(str(ROOT / "configs/quickstart.py"), list(fields.items()))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(workdir / "trace", profiler_options=options):
        train_and_evaluate(config, workdir)
    events = list(_events(next((workdir / "trace").rglob("*.xplane.pb"))))
    starts = sorted(begin for name, begin, _ in events if name == STEP)
    return {
        lane: sorted(
            (begin, end)
            for name, begin, end in events
            if name.startswith(prefix) and starts[WARM_UP] < begin < end < starts[-1]
        )
        for prefix, lane in LANES.items()
    }


def _events(trace: Path) -> Iterator[tuple[str, float, float]]:
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                begin = event.start_ns / 1e6
                yield event.name, begin, begin + event.duration_ns / 1e6


def union(spans: list[Span]) -> list[Span]:
    """Joins spans that touch."""
    joined = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def share_inside(spans: list[Span], others: list[Span]) -> float:
    """Returns the share of the spans' time that lies within the others."""
    spans, others = union(spans), union(others)
    inside = sum(
        max(0.0, min(end, other_end) - max(begin, other_begin))
        for begin, end in spans
        for other_begin, other_end in others
    )
    return inside / sum(end - begin for begin, end in spans)


def save_timeline(spans: dict[str, list[Span]], path: Path) -> None:
    """Draws the middle of the trace, a lane for each kind of event."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    placed = spans["place batch"]
    middle = len(placed) // 2
    begin, end = placed[middle][0], placed[middle + WINDOW_STEPS][1]
    figure, axes = plt.subplots(figsize=(10, 2.2), layout="constrained")
    for lane, (name, color) in enumerate(zip(spans, ("black", "tab:blue", "tab:red"), strict=True)):
        shown = [
            (b - begin, max(e - b, 0.2)) for b, e in union(spans[name]) if begin < e and b < end
        ]
        axes.broken_barh(shown, (-lane - 0.4, 0.8), color=color)
    axes.set(xlabel="ms", xlim=(0, end - begin), yticks=[0, -1, -2], yticklabels=list(spans))
    figure.savefig(path, dpi=100)


def main() -> None:
    """Prints the shares, and writes rows and a timeline if asked."""
    parser = options(__doc__, quick="a narrower network, and fewer of the digits")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a timeline there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder, "run")
        spans = traced_epoch(Path(folder, "data"), workdir, QUICK if args.quick else {})
        waits = [row["data_wait"] for row in read_metrics(workdir) if row["split"] == "train"]
    shares = {
        f"{name} beside a step": share_inside(spans[name], spans["steps"])
        for name in ("read batch", "place batch")
    }
    rows = [row(what, [share], "share of its time", batch=64) for what, share in shares.items()]
    rows.append(row("data wait", waits, "share of the run", batch=64))
    for of in rows:
        print(f"{of['what']:28} {of['value']:6.1%} of {of['unit'].removeprefix('share of ')}")
    if args.plot:
        save_timeline(spans, args.plot)
    write(rows, args.json)


if __name__ == "__main__":
    main()
