"""Looking at what the network sees: `python -m alexnet_jax.visualize data --config …`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import augment, optim, pipeline, plots, step
from alexnet_jax import config as configs
from alexnet_jax.errors import exits_cleanly, explained_write_errors
from alexnet_jax.store import Store, open_or_prepare

SAMPLES = 36


def save_samples(
    config: ConfigDict, store: Store, batch: pipeline.Batch, key: jax.Array, number: int, path: Path
) -> None:
    """Writes the first images of a batch, as training step `number` augments them, with labels.

    The mean is left in, so that the picture can be looked at; all else is what the step does.

    Args:
      batch: {"image": uint8[B, S, S, 3], "label": int32[B]}.
      key: the train state's.
    """
    schedule = optim.make_schedule(config, store.num_examples / config.batch_size)
    stats = augment.statistics(store, config)
    stats = stats._replace(mean=np.zeros_like(stats.mean))
    noise = schedule(np.int32(number), np.float32(1.0)).color_noise
    images = jax.jit(lambda x: step.augmented(key, number, x, noise, stats, config))(
        batch["image"][:SAMPLES]
    )
    pixels = np.asarray(images) / config.augment.pixel_scale
    names = [store.class_names[label] for label in batch["label"][:SAMPLES]]
    plots.save_sample_grid(np.uint8(np.clip(np.rint(pixels), 0, 255)), names, path)


def data(config: ConfigDict, workdir: Path) -> Path:
    """Writes `samples.png`, the first augmented batch of a run, without training."""
    configs.check_bounds(config)
    augment.check(config)
    optim.make_schedule(config, steps_per_epoch=1.0)
    store = open_or_prepare(config)["train"]
    batch = next(pipeline.train_batches(store, config.batch_size, config.seed))
    path = workdir / "samples.png"
    with explained_write_errors(workdir, "another --workdir"):
        workdir.mkdir(parents=True, exist_ok=True)
        save_samples(config, store, batch, step.train_key(config.seed), 0, path)
    return path


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m alexnet_jax.visualize", description=__doc__)
    parser.add_argument("what", choices=["data"], help="data: the first augmented batch")
    parser.add_argument("--workdir", type=Path, help="default: runs/<config name>")
    config, args = configs.parse(argv, parser)
    print(data(config, args.workdir or Path("runs") / config.name))


if __name__ == "__main__":
    main()
