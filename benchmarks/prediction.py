"""Images a second of prediction from JPEG files beside evaluation from the prepared store.

    python benchmarks/prediction.py

Both run a network of full size, in turn, over the same 10,000 photographs, from start to end,
compilation included.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import photographs
from ml_collections import ConfigDict
from rows import options, row, write

sys.path.insert(0, str(Path(__file__).parent.parent))

from alexnet_jax.analysis import evaluation, prediction
from alexnet_jax.config import default_config  # noqa: E402
from alexnet_jax.data import augment
from alexnet_jax.inference import Trained, unnamed  # noqa: E402
from alexnet_jax.store import Store, open_or_prepare  # noqa: E402
from alexnet_jax.training import sharding as parallel
from alexnet_jax.training.train_step import init_state  # noqa: E402
from alexnet_jax.utils import process as runtime

BATCH = 128
ROUNDS = 3


def untrained(config: ConfigDict, store: Store) -> Trained:
    """Returns an untrained network: what it answers takes no time more or less."""
    model = parallel.build_model(config)
    state = init_state(model, config)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    names = tuple(map(unnamed, range(config.model.num_classes)))
    return Trained(config, model, variables, augment.statistics(store, config), names, 0)


def predict_all(net: Trained, files: Sequence[Path]) -> None:
    """As `python -m alexnet_jax.predict` does."""
    for result in prediction.predict_files(net, files, "center", BATCH):
        assert isinstance(result, prediction.Prediction)


def evaluate_all(net: Trained, store: Store) -> None:
    """As `python -m alexnet_jax.evaluate` does."""
    ensembles = evaluation.all_ensembles([Path("net")], ["center"])
    (metrics,) = evaluation.evaluate([net], store, BATCH, ensembles)
    assert metrics.summary()["count"] == store.num_examples


def main() -> None:
    """Measures and prints."""
    parser = options(__doc__, quick="a narrow network and 200 photographs, one round")
    parser.add_argument("--images", type=int, default=10_000, help="default: 10,000")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    args = parser.parse_args()
    runtime.set_up()
    count, rounds = (200, 1) if args.quick else (args.images, args.rounds)
    with tempfile.TemporaryDirectory() as place:
        photographs.write_folder(Path(place, "photos"), {"train": 10, "val": count})
        config = default_config()
        config.dataset, config.data_dir = f"folder:{place}/photos", place
        config.eval_split = "val"
        config.model.variant = "owt"
        config.model.width = 0.1 if args.quick else 1.0
        stores = open_or_prepare(config)
        net = untrained(config, stores["train"])
        files = prediction.find_files([f"{place}/photos/val"])
        runs = {
            "evaluate, from the store": lambda: evaluate_all(net, stores["eval"]),
            "predict, from JPEG files": lambda: predict_all(net, files),
        }
        rates: dict[str, list[float]] = {what: [] for what in runs}
        for _ in range(rounds):
            for what, run in runs.items():
                started = time.perf_counter()
                run()
                rates[what].append(count / (time.perf_counter() - started))
    table = [row(what, found, "images/s", BATCH, "float32") for what, found in rates.items()]
    for line in table:
        print(f"{line['what']}  {line['value']:8.1f} ({line['min']:.1f} to {line['max']:.1f})")
    evaluated, predicted = (line["value"] for line in table)
    print(f"prediction has {predicted / evaluated:.2f} of the evaluation's images a second")
    write(table, args.json)


if __name__ == "__main__":
    main()
