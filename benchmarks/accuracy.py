"""Top-1 that trainings end with, through the command line that users run.

    python benchmarks/accuracy.py --config configs/quickstart.py --seeds 0 1 2

Every training starts from nothing: an empty data_dir, workdir and compilation cache. A case is a
set of fields that differ from the config's, as in `--case "model.variant=owt num_epochs=12"`.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import Row, options, row, write

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from alexnet_jax import config as configs  # noqa: E402
from alexnet_jax.training.metrics import read_metrics  # noqa: E402

Run = tuple[list[Row], float]  # the rows of metrics.jsonl; seconds from start to exit
QUICK = (
    "train_split=train[:200] eval_split=test[:100] batch_size=50 num_epochs=1 model.width=0.1 "
    "eval.every_epochs=1 schedule.warmup_epochs=0"
)


def trained(config: str, fields: list[tuple[str, str]]) -> Run:
    """Trains from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "train.py", "--config", config, f"--workdir={folder}/run"),
            f"--config.data_dir={folder}/data",
            *(f"--config.{name}={value}" for name, value in fields),
        ]
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        return read_metrics(Path(folder, "run")), time.perf_counter() - started


def rows_of(name: str, batch: int, after: list[int], runs: list[Run]) -> list[Row]:
    """Returns top-1 after the last epoch and others, the wait for data, and the seconds."""
    evaluations = [
        {round(r["epoch"]): 100 * r["top1"] for r in metrics if r["split"] == "eval"}
        for metrics, _ in runs
    ]
    epochs = sorted({*evaluations[0].keys() & after, max(evaluations[0])})
    waits = [100 * r["data_wait"] for metrics, _ in runs for r in metrics if r["split"] == "train"]
    return [
        *(
            row(f"{name}: top-1 after epoch {epoch}", [e[epoch] for e in evaluations], "%", batch)
            for epoch in epochs
        ),
        row(f"{name}: time waited for data, by lines", waits, "%", batch),
        row(f"{name}: start to exit", [seconds for _, seconds in runs], "s", batch),
    ]


def overrides(*texts: str) -> list[tuple[str, str]]:
    """Returns the (name, value) of every field of texts like "model.variant=owt num_epochs=12"."""
    words = (word.partition("=") for text in texts for word in shlex.split(text))
    return [(name, value) for name, _, value in words]


def parser() -> argparse.ArgumentParser:
    parser = options(__doc__, quick="one short training of the first case")
    parser.add_argument("--config", required=True, metavar="FILE", help="a config of digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--common", default="", metavar="FIELDS", help="fields of all cases")
    parser.add_argument("--case", action="append", metavar="FIELDS", help="may be repeated")
    parser.add_argument("--after", type=int, nargs="+", default=[], help="told besides the last")
    return parser


def main() -> None:
    """Trains each case with each seed, prints what it ends with, and writes rows if asked."""
    args = parser().parse_args()
    cases, seeds = args.case or [""], args.seeds
    if args.quick:
        cases, seeds = cases[:1], seeds[:1]
    rows = []
    for case in cases:
        fields = overrides(args.common, case, QUICK if args.quick else "")
        batch = configs.load(str(ROOT / args.config), fields).batch_size
        runs = [trained(args.config, [*fields, ("seed", str(seed))]) for seed in seeds]
        found = rows_of(f"{Path(args.config).stem} {case}".strip(), batch, args.after, runs)
        for r in found:
            print(f"{r['what']}  {r['median']:.2f} {r['unit']} ({r['min']:.2f} to {r['max']:.2f})")
        rows += found
        write(rows, args.json)  # a long run that is stopped leaves what it had


if __name__ == "__main__":
    main()
