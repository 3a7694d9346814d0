"""Training that starts from a trained network: `init_from`, a workdir of train.py or convert."""

import functools
import shlex
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax import inference as trained
from alexnet_jax.data import augment
from alexnet_jax.inference import Trained
from alexnet_jax.models.alexnet import AlexNet, LayerRow
from alexnet_jax.training import placement
from alexnet_jax.training.checkpoint import Checkpoints
from alexnet_jax.training.train_step import TrainState, init_state
from alexnet_jax.utils import distributed as hosts
from alexnet_jax.utils.errors import UserError

NEW_WITH_CLASSES = "fc8"
SCALES = ("augment.pixel_scale", "augment.channel_scale")


def load_source(config: ConfigDict, model: AlexNet, workdir: Path) -> Trained | None:
    """Returns the network that a run starts from; None for one that starts by chance, or goes on.

    A run that has a checkpoint goes on from that, and needs its source no longer.

    Raises UserError if there is no such network, or its layers or pixels are others than the
    config's.
    """
    if not config.init_from:
        return None
    origin = Path(config.init_from).expanduser()
    if origin.resolve() == workdir.resolve():
        raise UserError(
            f"init_from={config.init_from} is the workdir of this very run; choose another "
            "--workdir, or leave init_from out to go on with the run that is there"
        )
    source = None if _has_checkpoint(config, workdir) else trained.load(origin)
    hosts.check_same("init_from", {"step": source and source.step})
    if source:
        _check_fits(config, model, source)
        source = source._replace(variables=jax.device_get(source.variables))
    return source


def with_classes(source: Trained, config: ConfigDict, class_names: Sequence[str]) -> Trained:
    """Returns the source; without fc8, if its classes are not those of the run, in their order.

    Raises UserError if fc8 would be both new and frozen.
    """
    unnamed = map(trained.unnamed, range(len(class_names), config.model.num_classes))
    if source.class_names == (*class_names, *unnamed):
        return source
    if NEW_WITH_CLASSES in config.freeze:
        raise UserError(
            f"freeze names {NEW_WITH_CLASSES}, which is new here, since the classes of "
            f"{config.dataset} are not those of init_from={config.init_from}; leave it out"
        )
    params = _without_new(source.variables["params"])
    return source._replace(variables={**source.variables, "params": params})


def with_weights(state: TrainState, source: Trained) -> TrainState:
    """Returns a state at rest with all the layers that the source has, after `with_classes`."""
    given, batch_stats = source.variables["params"], source.variables["batch_stats"]
    like = {name: state.params[name] for name in given}
    return state.replace(
        params={**state.params, **placement.replicated(given, like)},
        batch_stats=placement.replicated(batch_stats, state.batch_stats),
    )


def statistics(
    config: ConfigDict, source: Trained | None, workdir: Path, of_data: augment.Statistics
) -> augment.Statistics:
    """Returns the run's pixel statistics: the source's mean, by which its features were learned.

    The colour noise is that of the new images, as it tells how these may vary. A run that goes on
    has the mean in its own workdir.
    """
    if not config.init_from:
        return of_data
    if source:
        return of_data._replace(mean=source.stats.mean)
    try:
        return of_data._replace(mean=trained.load_statistics(workdir)[0].mean)
    except UserError:
        origin = Path(config.init_from).expanduser()
        return of_data._replace(mean=trained.load_statistics(origin)[0].mean)


def describe_frozen(config: ConfigDict, layers: Sequence[LayerRow]) -> str:
    """Tells which layers do not train, and how many parameters do; nothing if all train."""
    if not config.freeze:
        return ""
    total = sum(row.params for row in layers)
    train = sum(row.params for row in layers if row.name not in config.freeze)
    names = ", ".join(row.name for row in layers if row.name in config.freeze)
    return f"\nfrozen: {names}; {train:,} of {total:,} parameters train"


def describe_source(config: ConfigDict, source: Trained) -> str:
    """Tells where a run's first weights are from, after `with_classes`."""
    kept = NEW_WITH_CLASSES in source.variables["params"]
    told = "the classes are the same" if kept else "fc8 is new, since the classes are others"
    return f"starting from {config.init_from}, step {source.step}; {told}"


def _has_checkpoint(config: ConfigDict, workdir: Path) -> bool:
    if not (workdir / "checkpoints").is_dir():
        return False
    with closing(Checkpoints(workdir, config, read_only=True)) as checkpoints:
        return checkpoints.latest_step is not None


def _check_fits(config: ConfigDict, model: AlexNet, source: Trained) -> None:
    """Raises UserError, which tells what to set, if features would not be what they were."""
    here, there = configs.flat(config), configs.flat(source.config)
    fields = ["model.variant", "model.width", "augment.mean"]
    if source.stats.mean.ndim > 1:  # an image, of the stored images' size
        fields.append("image_size")
    if not np.allclose(augment.scale(config), augment.scale(source.config), rtol=1e-5):
        fields += SCALES
    differing = [name for name in fields if here[name] != there[name]]
    if differing:
        wanted = [shlex.quote(f"--config.{name}={there[name]}") for name in differing]
        given = ", ".join(f"{name} {here[name]}" for name in differing)
        raise UserError(
            f"the network in init_from={config.init_from} was trained otherwise than this run "
            f"would use it ({given}); set {' '.join(wanted)}"
        )
    expected = jax.eval_shape(functools.partial(init_state, model, config)).params
    mismatch = trained.mismatch(_without_new(expected), _without_new(source.variables["params"]))
    if mismatch:
        raise UserError(
            f"in init_from={config.init_from} {mismatch}; set --config.augment.crop_size="
            f"{source.config.augment.crop_size}"
        )


def _without_new(params: dict[str, Any]) -> dict[str, Any]:
    return {name: arrays for name, arrays in params.items() if name != NEW_WITH_CLASSES}
