"""Training that starts from a trained network: `init_from`, a workdir of train or convert."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax import inference
from alexnet_jax.data.augment import Statistics, make_augment
from alexnet_jax.inference import Trained
from alexnet_jax.models.alexnet import AlexNet, kernel_layers, layers_of
from alexnet_jax.models.build import variant_of
from alexnet_jax.models.summary import LayerRow
from alexnet_jax.training.checkpoint import has_checkpoint
from alexnet_jax.training.sharding import from_host
from alexnet_jax.training.train_step import TrainState, restart_average
from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import UserError

SCALES = ("augment.pixel_scale", "augment.channel_scale")


def load_source(config: ConfigDict, model: AlexNet, workdir: Path) -> Trained | None:
    """Returns the network from which a run starts; None if it initializes or resumes.

    A run that has a checkpoint resumes from it and does not need its source any more.

    Raises:
      UserError: there is no such network, or its layers or pixels differ from the config's.
    """
    if not config.init_from:
        return None
    if Path(config.init_from).expanduser().resolve() == workdir.resolve():
        raise UserError(
            f"init_from={config.init_from} is the workdir of this very run; choose another "
            "--workdir, or leave init_from out to resume the run that is there"
        )
    source = None if has_checkpoint(workdir) else inference.load(config.init_from)
    distributed.check_same("init_from", {"step": source and source.step})
    if source:
        _check_fits(config, model, source)
        source = source._replace(variables=jax.device_get(source.variables))
    return source


def with_classes(source: Trained, config: ConfigDict, class_names: Sequence[str]) -> Trained:
    """Returns the source, without its last layer if its classes differ from the run's.

    Raises:
      UserError: a layer would be both new and frozen.
    """
    unnamed = map(inference.unnamed, range(len(class_names), config.model.num_classes))
    if source.class_names != (*class_names, *unnamed):
        params = _without(_last_layer(config), source.variables["params"])
        source = source._replace(variables={**source.variables, "params": params})
    frozen = [name for name in _new_layers(config, source) if name in config.freeze]
    if frozen:
        raise UserError(
            f"freeze names {', '.join(frozen)}, new in this run because init_from="
            f"{config.init_from} has none for the classes of {config.dataset}; leave it out"
        )
    return source


def with_weights(state: TrainState, source: Trained) -> TrainState:
    """Returns a state with the weights of all layers that the source has, after `with_classes`."""
    params, batch_stats = source.variables["params"], source.variables["batch_stats"]
    like = {name: state.params[name] for name in params}
    state = state.replace(
        params={**state.params, **from_host(params, like)},
        batch_stats=from_host(batch_stats, state.batch_stats),
    )
    # Copies, since the step reuses the memory of each array of the state that it is given.
    if state.average:
        copy = restart_average(jax.tree.map(jnp.copy, state))
        state = state.replace(average=copy.average)
    return state


def statistics(
    config: ConfigDict, source: Trained | None, workdir: Path, of_data: Statistics
) -> Statistics:
    """Returns the pixel statistics of a run: the mean with which its source was trained.

    The color noise is that of the new images, since it describes how they may vary. A run that
    resumes has the mean in its own workdir.
    """
    if not config.init_from:
        return of_data
    if source:
        return of_data._replace(mean=source.stats.mean)
    try:
        return of_data._replace(mean=inference.load_statistics(workdir)[0].mean)
    except UserError:
        origin = Path(config.init_from).expanduser()
        return of_data._replace(mean=inference.load_statistics(origin)[0].mean)


def describe_frozen(config: ConfigDict, layers: Sequence[LayerRow]) -> str:
    """Returns which layers are frozen and how many parameters train; "" if all do."""
    if not config.freeze:
        return ""
    total = sum(row.params for row in layers)
    trained = sum(row.params for row in layers if row.name not in config.freeze)
    names = ", ".join(row.name for row in layers if row.name in config.freeze)
    return f"\nfrozen: {names}; {trained:,} of {total:,} parameters train"


def describe_source(config: ConfigDict, source: Trained) -> str:
    """Returns where a run's first weights come from, after `with_classes`."""
    new = _new_layers(config, source)
    are_new = f"new layers, for these classes: {', '.join(new)}" if new else "same classes"
    return f"starting from {config.init_from}, step {source.step}; {are_new}"


def _check_fits(config: ConfigDict, model: AlexNet, source: Trained) -> None:
    """Raises UserError, which names the fields to set, if features would change their meaning."""
    here, there = configs.flat(config), configs.flat(source.config)
    fields = ["model.width", "model.conv1_padding", "augment.mean"]
    layers, of_source = (layers_of(variant_of(c)) for c in (config, source.config))
    if layers[: len(of_source)] != of_source:  # a source of convolutions only lacks the others
        fields[:0] = ["model.variant", "model.ablation"]
    if source.stats.mean.ndim > 1:  # a mean image has the size of the stored images
        fields.append("image_size")
    if not np.allclose(make_augment(config).scale, source.augment.scale, rtol=1e-5):
        fields += SCALES
    differing = [name for name in fields if here[name] != there[name]]
    if differing:
        wanted = [shlex.quote(f"--config.{name}={there[name]}") for name in differing]
        given = ", ".join(f"{name} {here[name]}" for name in differing)
        raise UserError(
            f"the network in init_from={config.init_from} was trained with other values than this "
            f"run's {given}; set {' '.join(wanted)}"
        )
    kept = _without(_last_layer(config), source.variables["params"])
    expected = inference.state_shapes(config, model).params
    mismatch = inference.mismatch({name: expected[name] for name in kept}, kept)
    if mismatch:
        raise UserError(
            f"in init_from={config.init_from} {mismatch}; set --config.augment.crop_size="
            f"{source.config.augment.crop_size}"
        )


def _new_layers(config: ConfigDict, source: Trained) -> list[str]:
    layers = kernel_layers(variant_of(config))
    return [name for name in layers if name not in source.variables["params"]]


def _last_layer(config: ConfigDict) -> str:
    return kernel_layers(variant_of(config))[-1]


def _without(layer: str, params: dict[str, Any]) -> dict[str, Any]:
    return {name: arrays for name, arrays in params.items() if name != layer}
