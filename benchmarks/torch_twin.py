"""Does the same training in PyTorch give the same loss curve and accuracy?

    python benchmarks/torch_twin.py --config configs/imagenette.py --config.dataset=folder:PATH \
        --config.num_epochs=5 --plot twin.png

Trains a config twice: by train.py, and in PyTorch by a network and an update that are written here
from the paper's formulas. Both start from the same weights, see the same augmented images in the
same order, drop the same units, and use the same learning rates. Needs requirements-torch.txt.

The two compute the same sums in another order, so that their losses differ by rounding at first.
Training amplifies that: a ReLU or a pooling window in which a different input wins changes the
gradient a little. So the report has the largest difference over the first steps, over all steps,
and of the averages over an epoch.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from harness import ROOT, Row, parser, row, show, write
from ml_collections import ConfigDict
from torch.nn import functional as F

from alexnet_jax import config as configs
from alexnet_jax.data import pipeline
from alexnet_jax.data.augment import Augment, make_augment, statistics
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import Store
from alexnet_jax.models import alexnet
from alexnet_jax.models.build import build_model, variant_of
from alexnet_jax.models.layers import dropout_mask
from alexnet_jax.train import evaluation_steps
from alexnet_jax.training.metrics import read_metrics
from alexnet_jax.training.optimizer import make_optimizer, make_schedule
from alexnet_jax.training.train_step import DROPOUT, augment_batch, init_state
from alexnet_jax.utils import process

FIRST_STEPS = 20
# The twin has SGD as the paper describes it, and must not be compared with anything else.
KEPT = (
    *("init_from", "freeze", "model.conv1_padding", "schedule.changes", "label_smoothing"),
    *("stored", "augment.mixup", "augment.cutmix", "eval.crop_size", "optimizer.nesterov"),
    *("optimizer.kind", "optimizer.layer_rates", "optimizer.layer_decays", "optimizer.ema_decay"),
    *("optimizer.clip_norm", "optimizer.accumulate_steps"),
)
QUICK = ("num_epochs=1", "train_split=train[:256]", "eval_split=test[:64]", "model.variant=bn")

Tensors = dict[str, dict[str, torch.Tensor]]


class Twin:
    """The network of a config in PyTorch, and the paper's update (§5)."""

    def __init__(self, config: ConfigDict, steps_per_epoch: float) -> None:
        model = build_model(config)
        size = config.augment.crop_size
        tx = make_optimizer(config, steps_per_epoch)
        state = process.run_once(lambda: init_state(model, tx, config.seed, (size, size, 3)))
        self.config = config
        self.layers = alexnet.named_layers(variant_of(config))
        self.key = state.key
        self.statistics = as_tensors(state.batch_stats)
        self.params = as_tensors(state.params)
        for leaf in leaves(self.params):
            leaf.requires_grad_()
        self.velocity = [torch.zeros_like(leaf) for leaf in leaves(self.params)]
        rate = make_schedule(config, steps_per_epoch)
        self.rate = jax.jit(lambda kernel, step: rate("all", kernel, step, 1.0), static_argnums=0)

    def logits(self, images: np.ndarray, step: int | None) -> torch.Tensor:
        """Returns the logits of float32[B, S, S, 3], in training if a step is given."""
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
        kept = {} if step is None else self.kept_units(step, len(images))
        for name, layer in self.layers.items():
            weights = self.params.get(name, {})
            match layer:
                case alexnet.Conv():
                    pad = layer.size // 2 if layer.padding is None else layer.padding
                    kernel = weights["kernel"].permute(3, 2, 0, 1)
                    bias = weights.get("bias")
                    x = F.conv2d(x, kernel, bias, layer.stride, pad, groups=layer.groups)
                case alexnet.BatchNorm():
                    of = self.statistics[name]
                    scale, bias = weights["scale"], weights["bias"]
                    x = F.batch_norm(x, of["mean"], of["var"], scale, bias, step is not None)
                case alexnet.ReLU():
                    x = F.relu(x)
                case alexnet.LRN():  # PyTorch divides alpha by the size
                    alpha = layer.size * layer.alpha
                    x = F.local_response_norm(x, layer.size, alpha, 0.75, layer.k)
                case alexnet.MaxPool():
                    x = F.max_pool2d(x, layer.size, layer.stride, ceil_mode=layer.ceil)
                case alexnet.AdaptiveAvgPool():
                    x = F.adaptive_avg_pool2d(x, layer.size)
                case alexnet.Dense():
                    x = x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x
                    x = F.linear(x, weights["kernel"].T, weights["bias"])
                case alexnet.Dropout(inverted=inverted):
                    rate = self.config.model.dropout
                    if kept:
                        x = x * kept[name](x.shape[1]) / (1 - rate if inverted else 1)
                    elif not inverted:
                        x = x * (1 - rate)
                case _:
                    sys.exit(f"PyTorch's twin has no layer {type(layer).__name__}")
        return x

    def kept_units(self, step: int, batch: int) -> dict[str, Any]:
        """Returns, by the name of a dropout layer, a function from its width to its mask."""
        names = [n for n, layer in self.layers.items() if isinstance(layer, alexnet.Dropout)]

        class Keys(nn.Module):  # Flax derives keys from the module's path and the draw's number
            def __call__(self) -> list[jax.Array]:
                return [self.make_rng("dropout") for _ in names]

        key = jax.random.fold_in(jax.random.fold_in(self.key, step), DROPOUT)
        keys: Any = Keys().apply({}, rngs={"dropout": key})

        def mask_of(key: jax.Array) -> Any:
            def mask(units: int) -> torch.Tensor:
                kept = dropout_mask(key, self.config.model.dropout, 0, (batch, units))
                return torch.from_numpy(np.array(kept, np.float32))

            return mask

        return {name: mask_of(key) for name, key in zip(names, keys, strict=True)}

    def update(self, images: np.ndarray, labels: np.ndarray, step: int) -> float:
        """Makes one step, v ← 0.9 v − ε (∇ + 0.0005 w) and w ← w + v; returns the loss."""
        loss = F.cross_entropy(self.logits(images, step), torch.from_numpy(labels).long())
        loss.backward()
        fields = self.config.optimizer
        with torch.no_grad():
            for w, v in zip(leaves(self.params), self.velocity, strict=True):
                is_kernel = w.ndim > 1
                decay = fields.weight_decay if is_kernel else fields.bias_weight_decay
                assert w.grad is not None
                rate = float(self.rate(is_kernel, step))
                v.mul_(fields.momentum).sub_(rate * (w.grad + decay * w))
                w.add_(v)
                w.grad = None
        return float(loss.detach())


def as_tensors(tree: Any) -> Tensors:
    """Returns copies of a tree's arrays, layer by layer."""
    return {
        layer: {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        for layer, arrays in tree.items()
    }


def leaves(params: Tensors) -> Iterator[torch.Tensor]:
    """Yields all tensors, always in the same order."""
    for arrays in params.values():
        yield from arrays.values()


def train_twin(config: ConfigDict, stores: dict[str, Store]) -> tuple[list[float], float]:
    """Trains in PyTorch; returns the loss of each step, and the top-1 accuracy after the last."""
    steps_per_epoch = stores["train"].num_examples / config.batch_size
    twin = Twin(config, steps_per_epoch)
    stats = statistics(stores["train"], config)
    augment: Augment = make_augment(config, stats, steps_per_epoch)
    order = pipeline.Order(stores["train"], config.batch_size, config.seed, config.shuffle_shards)

    @jax.jit
    def augmented(batch: dict[str, jax.Array], step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(twin.key, step)
        return augment_batch(augment, key, batch, step)["image"]

    losses = []
    total = max(evaluation_steps(config, steps_per_epoch))
    batches = pipeline.train_batches(order)
    for step in range(total):
        batch = next(batches)
        images = np.asarray(augmented(batch, jnp.int32(step)))
        losses.append(twin.update(images, batch["label"], step))
        if step % 20 == 0:
            print(f"PyTorch: step {step} of {total}, loss {losses[-1]:.3f}", flush=True)
    batches.close()

    right = 0
    center = jax.jit(augment.center)
    with torch.no_grad():
        for batch in pipeline.eval_batches(stores["eval"], config.batch_size):
            logits = twin.logits(np.asarray(center(batch["image"])), step=None)
            right += int((logits.argmax(1).numpy() == batch["label"]).sum())
    return losses, right / stores["eval"].num_examples


def compare(ours: list[float], theirs: list[float], steps_per_epoch: float) -> list[Row]:
    """Returns the largest differences of two loss curves."""
    a, b = np.array(ours), np.array(theirs)
    epochs = np.arange(len(a)) // steps_per_epoch
    means = [(a - b)[epochs == epoch].mean() for epoch in np.unique(epochs)]
    return [
        row(
            f"largest difference of the loss, first {FIRST_STEPS} steps",
            [abs(a - b)[:FIRST_STEPS].max()],
            "nats",
        ),
        row("largest difference of the loss, all steps", [abs(a - b).max()], "nats"),
        row("largest difference of an epoch's mean loss", [np.abs(means).max()], "nats"),
    ]


def plot(ours: list[float], theirs: list[float], path: Path) -> None:
    """Draws both loss curves over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(theirs, label="PyTorch", linewidth=2.5, alpha=0.5)
    axes.plot(ours, label="alexnet_jax", linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss in nats")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    words, overrides = configs.split_overrides(None)
    options = parser(__doc__, quick="one epoch of 256 digits")
    options.add_argument("--config", default="configs/quickstart.py")
    options.add_argument("--plot", type=Path, metavar="FILE.png")
    args = options.parse_args(words)
    if args.quick:
        overrides += [tuple(field.split("=", 1)) for field in QUICK]
    config = configs.load(args.config, overrides)
    values, defaults = configs.flat(config), configs.flat(configs.default_config())
    for name in KEPT:
        if values[name] != defaults[name]:
            sys.exit(f"PyTorch's twin has no {name}={values[name]}; leave it at {defaults[name]!r}")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "train.py", f"--config={args.config}", f"--workdir={folder}/run"),
            *(f"--config.{name}={value}" for name, value in overrides),
            *("--config.log_every_steps=1", "--config.parallel=jit"),
        ]
        subprocess.run(command, cwd=ROOT, check=True)
        metrics = read_metrics(Path(folder) / "run")
    ours = [of["loss"] for of in metrics if of["split"] == "train"]
    our_top1 = [of["top1"] for of in metrics if of["split"] == "eval"][-1]
    process.set_up()
    stores = open_or_prepare(config)
    theirs, their_top1 = train_twin(config, stores)
    steps_per_epoch = stores["train"].num_examples / config.batch_size
    rows = [
        *compare(ours, theirs, steps_per_epoch),
        row("top-1, ours", [100 * our_top1], "%"),
        row("top-1, PyTorch", [100 * their_top1], "%"),
    ]
    show(rows)
    write(rows, args.json)
    if args.plot:
        plot(ours, theirs, args.plot)


if __name__ == "__main__":
    main()
