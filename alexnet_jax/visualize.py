"""Looking at what the network sees: `python -m alexnet_jax.visualize data --config …`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import augment, hosts, optim, pipeline, plots, step
from alexnet_jax import config as configs
from alexnet_jax.errors import exits_cleanly, explained_write_errors
from alexnet_jax.store import Store, open_or_prepare

SAMPLES = 36


def save_samples(config: ConfigDict, store: Store, number: int, path: Path) -> None:
    """Writes the first images of training batch `number`, as its step augments them, with labels.

    The mean is left in, so that the picture can be looked at; all else is what the step does.
    """
    batch = pipeline.first_of_batch(store, config.batch_size, config.seed, number, SAMPLES)
    schedule = optim.make_schedule(config, store.num_examples / config.batch_size)
    stats = augment.statistics(store, config)
    stats = stats._replace(mean=np.zeros_like(stats.mean))
    noise = schedule(np.int32(number), np.float32(1.0)).color_noise
    key = step.train_key(config.seed)
    images = jax.jit(lambda x: step.augmented(key, number, x, noise, stats, config))(batch["image"])
    pixels = np.asarray(images) / augment.scale(config)
    names = [store.class_names[label] for label in batch["label"]]
    plots.save_sample_grid(np.uint8(np.clip(np.rint(pixels), 0, 255)), names, path)


def data(config: ConfigDict, workdir: Path) -> Path:
    """Writes `samples.png`, the first augmented batch of a run, without training."""
    configs.check_bounds(config)
    augment.check(config)
    optim.make_schedule(config, steps_per_epoch=1.0)
    store = open_or_prepare(config)["train"]
    path = workdir / "samples.png"
    if hosts.is_first():
        with explained_write_errors(workdir, "another --workdir"):
            workdir.mkdir(parents=True, exist_ok=True)
            save_samples(config, store, 0, path)
    return path


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m alexnet_jax.visualize", description=__doc__)
    parser.add_argument("what", choices=["data"], help="data: the first augmented batch")
    parser.add_argument("--workdir", type=Path, help="default: runs/<config name>")
    config, args = configs.parse(argv, parser)
    with hosts.joined():
        hosts.say(str(data(config, args.workdir or Path("runs") / config.name)))


if __name__ == "__main__":
    main()
