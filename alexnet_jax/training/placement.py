"""Where arrays lie: how devices form a mesh, and which of them hold what of batch and state."""

from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int64
from ml_collections import ConfigDict

from alexnet_jax.training.train_step import TrainState
from alexnet_jax.utils.errors import UserError

Devices = list[jax.Device]
Tree = Any

PMAP_AXIS = "devices"
DATA_AXIS = "data"  # groups of devices that each have a whole copy of the parameters
GROUP_AXIS = "group"  # the devices of one group, which share the fc layers
BATCH_AXES: dict[str, tuple[str, ...]] = {
    "jit": (),
    "pmap": (PMAP_AXIS,),
    "mesh.data": (DATA_AXIS,),
    "mesh.zero": (DATA_AXIS,),
    "mesh.hybrid": (DATA_AXIS, GROUP_AXIS),
}
SPLIT_LAYERS = ("fc6", "fc7", "fc8")
LEAST_SHARDED = 2**14  # values; smaller arrays are not worth a message of their own
WHOLE = PartitionSpec()


def kind(config: ConfigDict) -> str:
    """Returns the key of BATCH_AXES that config.parallel means; raises UserError for none."""
    asked: str = config.parallel
    if asked == "auto":
        return "mesh.data" if jax.device_count() > 1 else "jit"
    if asked not in BATCH_AXES:
        raise UserError(f"parallel={asked!r}; it can be auto, {', '.join(BATCH_AXES)}")
    return asked


def batch_axes(config: ConfigDict) -> tuple[str, ...]:
    """Returns the mapped axes over which the batch is split; none where the step is not mapped."""
    return BATCH_AXES[kind(config)]


def fc_axis(config: ConfigDict) -> str | None:
    """Returns the one of `batch_axes` over which the fc layers are split as well."""
    return GROUP_AXIS if kind(config) == "mesh.hybrid" else None


def fc_parts(config: ConfigDict, devices: int | None = None) -> int:
    """Returns how many devices share the fc layers of one copy of the network."""
    return group_size(config, devices or jax.device_count()) if fc_axis(config) else 1


def group_size(config: ConfigDict, devices: int) -> int:
    wanted: int = config.hybrid_group
    return min(wanted, devices)


def make_mesh(config: ConfigDict, devices: Devices) -> Mesh:
    """Returns the devices by `batch_axes`, neighbours on the machine's network in one group."""
    shape: tuple[int, ...] = (len(devices),)
    if fc_axis(config):
        group = group_size(config, len(devices))
        shape = (len(devices) // group, group)
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, batch_axes(config))


def parameter_specs(config: ConfigDict, params: Tree, mesh: Mesh) -> Tree:
    """Returns how each parameter is sharded at rest, by its layer's name, as a tree like params."""

    def spec(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> PartitionSpec:
        layer, name = path[0].key, path[-1].key
        match kind(config):
            case "mesh.hybrid" if layer in SPLIT_LAYERS and name == "kernel":
                return PartitionSpec(GROUP_AXIS, None)
            case "mesh.zero" if x.size >= LEAST_SHARDED:
                divisible = [length % mesh.size == 0 for length in x.shape]
                if any(divisible):
                    lengths = np.where(divisible, x.shape, 0)
                    axes: list[str | None] = [None] * x.ndim
                    axes[int(lengths.argmax())] = DATA_AXIS
                    return PartitionSpec(*axes)
        return WHOLE

    return jax.tree_util.tree_map_with_path(spec, params)


def like_parameters(state: TrainState, specs: tuple[Tree, Tree], mesh: Mesh) -> Tree:
    """Shardings of a whole state: what has a tree like that of params lies as params do.

    Args:
      specs: of all params, and of those that train, which are those with a velocity.
    """
    known = {jax.tree.structure(tree, is_leaf=_is_spec): tree for tree in specs}

    def is_like_params(part: Any) -> bool:
        return jax.tree.structure(part) in known

    def shardings(part: Any) -> Tree:
        return known.get(jax.tree.structure(part), WHOLE)

    of_state = jax.tree.map(shardings, state, is_leaf=is_like_params)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        of_state,
        is_leaf=_is_spec,
    )


def _is_spec(part: Any) -> bool:
    return isinstance(part, PartitionSpec)


def own_places(sharding: NamedSharding, batch_size: int) -> Int64[np.ndarray, " share"]:
    """Which rows of an array of so many this host's devices hold."""
    index = sharding.addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in index.values()]))


def whole(tree: Tree) -> Tree:
    """Returns global arrays at rest as numpy arrays, the same on every host."""
    return jax.tree.map(lambda x: np.asarray(_gathered(x)), tree)


def _gathered(x: jax.Array) -> jax.Array:
    if not isinstance(x, jax.Array) or x.is_fully_replicated:
        return x
    assert isinstance(x.sharding, NamedSharding)
    everywhere = NamedSharding(x.sharding.mesh, WHOLE)
    gathered: jax.Array = jax.jit(lambda x: x, out_shardings=everywhere)(x)
    return gathered


def replicated(tree: Tree, like: Tree) -> Tree:
    """Returns numpy arrays that every host has alike as global arrays, which lie as `like` do."""

    def placed(x: np.ndarray, like: jax.Array) -> jax.Array:
        x = np.asarray(x, like.dtype)
        return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])

    return jax.tree.map(placed, tree, like)
