"""Where arrays are placed: one device, several, or a pod.

Every parallel kind runs the same step. What a device holds besides its part of the batch:

    jit          everything; there is one device
    mesh.data    all parameters
    mesh.zero    a part of each large parameter and its velocity (ZeRO, arXiv 1910.02054)
    mesh.hybrid  conv1 to conv5 and a part of fc6 to fc8 ("One weird trick", arXiv 1404.5997)
    pmap         all parameters

jit and mesh kinds are shardings of the state and the batch, from which the compiler derives all
communication. Only pmap runs the step once per device, over the mapped axis AXIS.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int64
from ml_collections import ConfigDict

from alexnet_jax.data.augment import other_crop_sizes
from alexnet_jax.data.store import batch_shapes
from alexnet_jax.models.alexnet import DTYPES, AlexNet, check_choice, has_classes
from alexnet_jax.models.build import build_model, variant_of
from alexnet_jax.models.summary import LayerRow, layer_table
from alexnet_jax.training.train_step import EvalStep, TrainStep
from alexnet_jax.utils.errors import UserError

KINDS = ("jit", "pmap", "mesh.data", "mesh.zero", "mesh.hybrid")
DATA = "data"  # mesh axis: groups of devices, each with a whole copy of the network
GROUP = "group"  # mesh axis: the devices of a group; hybrid splits fc6 to fc8 over them
AXIS = "batch"  # the axis that pmap maps
MIN_SHARDED = 2**14  # values; smaller arrays are not worth a message of their own
REPLICATED = PartitionSpec()

Tree = Any
HostBatch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Parallel:
    """How a run is spread over devices.

    Attributes:
      kind: one of KINDS.
      mesh: the devices by DATA and GROUP. GROUP has length 1 except for mesh.hybrid.
    """

    kind: str
    mesh: Mesh

    # -- What the model needs ----------------------------------------------------------------

    @property
    def axis_name(self) -> str | None:
        """The mapped axis over which the batch is split, under pmap."""
        return AXIS if self.kind == "pmap" else None

    def model_options(self, gradient_dtype: str) -> dict[str, Any]:
        """Returns the attributes of `AlexNet` that depend on devices.

        Args:
          gradient_dtype: in which devices add up gradients. One device adds up nothing, and
            computes all in the model's dtype.
        """
        check_choice("optimizer.gradient_dtype", gradient_dtype, DTYPES)
        options: dict[str, Any] = {"axis_name": self.axis_name}
        if self.mesh.size > 1:
            options["gradient_dtype"] = gradient_dtype
        if self.kind == "mesh.hybrid":
            options["constrain"] = self._constrain_hybrid
        return options

    def _constrain_hybrid(self, name: str, x: jax.Array) -> jax.Array:
        """Pins activations around the fully connected layers to "One weird trick".

        Convolutions run on each device's images. From fc6 on, the images of a whole group are on
        each of its devices, with a part of the features. Krizhevsky's scheme exchanges activations
        within groups, and only the gradients of the parts between groups.

        Each sharding needs two constraints. The first one is between the layer and the exchange,
        and its transpose is a single all-gather of the gradient that serves both the kernel's and
        the input's gradient. Without it XLA moves up to 40 times as many bytes, for example by
        splitting pooling over rows.
        """
        all_devices = PartitionSpec((DATA, GROUP))
        split_features = PartitionSpec(DATA, GROUP)
        if name == "flatten":
            return self._pin(x, all_devices, split_features)
        # The loss needs all classes of an image on one device.
        last = name == "fc8"
        return self._pin(x, PartitionSpec(DATA), all_devices if last else split_features)

    def _pin(self, x: jax.Array, *specs: PartitionSpec) -> jax.Array:
        for spec in specs:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
        return x

    # -- Shardings -----------------------------------------------------------------------------

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array of which every device holds a copy."""
        return NamedSharding(self.mesh, REPLICATED)

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a global batch: every device has its part of the images."""
        return NamedSharding(self.mesh, PartitionSpec((DATA, GROUP)))

    def state_shardings(self, state: Tree) -> Tree:
        """Returns the shardings of a train state, or of any tree that contains params by name.

        An array of the optimizer is sharded as the parameter is whose name it carries.
        """

        def sharding(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> NamedSharding:
            return NamedSharding(self.mesh, self._spec(jax.tree_util.keystr(path), x.shape))

        return jax.tree_util.tree_map_with_path(sharding, state)

    def _spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        match self.kind:
            case "mesh.hybrid" if "fc" in path and "kernel" in path:
                return PartitionSpec(GROUP, None)
            case "mesh.zero" if np.prod(shape) >= MIN_SHARDED:
                divisible = [length % self.mesh.size == 0 for length in shape]
                if any(divisible):
                    # The longest axis that divides evenly.
                    axis = int(np.where(divisible, shape, 0).argmax())
                    return PartitionSpec(*(DATA if i == axis else None for i in range(len(shape))))
        return REPLICATED

    # -- Batches ---------------------------------------------------------------------------------

    def local_rows(self, batch_size: int) -> Int64[np.ndarray, " local_batch_size"]:
        """Returns the rows of every global batch that this process feeds, in rising order."""
        return _local_rows(self.batch_sharding, batch_size)

    def put_batch(self, batch: HostBatch, batch_size: int) -> dict[str, jax.Array]:
        """Starts the transfer of this process's rows of a batch to its devices.

        Returns global arrays; for pmap, arrays [local devices, B, …].
        """
        if self.kind == "pmap":
            local = NamedSharding(self.mesh.local_mesh, PartitionSpec((DATA, GROUP)))
            count = len(self.mesh.local_devices)
            parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
            placed: dict[str, jax.Array] = jax.device_put(parts, local)
            return placed
        own = self.local_rows(batch_size)

        def put(x: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                rows = range(batch_size)[index[0] if index else slice(None)]
                # A process's devices need not be neighbors in the mesh, so neither are its rows.
                start = int(np.searchsorted(own, rows.start))
                return x[start : start + len(rows)]

            shape = (batch_size, *x.shape[1:])
            return jax.make_array_from_callback(shape, self.batch_sharding, part)

        return {name: put(x) for name, x in batch.items()}

    def batch_like(self, config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes, dtypes and shardings of a training batch, except for pmap."""
        return {
            name: jax.ShapeDtypeStruct(
                (config.batch_size, *shape), dtype, sharding=self.batch_sharding
            )
            for name, (shape, dtype) in batch_shapes(config.image_size, config.stored).items()
        }

    # -- Compilation -------------------------------------------------------------------------------

    def compile_train_step(self, train_step: TrainStep, state: Tree) -> Callable[..., Any]:
        """Compiles a train step. It takes and returns global arrays, and donates the state.

        Args:
          state: shapes of the train state.
        """
        if self.kind == "pmap":
            return self._pmap(train_step, out_axes=(None, None), donate_argnums=0)
        shardings = self.state_shardings(state)
        return jax.jit(
            train_step,
            in_shardings=(shardings, self.batch_sharding),
            out_shardings=(shardings, self.replicated),
            donate_argnums=0,  # the new parameters take the place of the old ones
        )

    def compile_eval_step(self, eval_step: EvalStep, state: Tree) -> Callable[..., Any]:
        """Compiles an evaluation step. Arguments are as for `compile_train_step`."""
        if self.kind == "pmap":
            return self._pmap(eval_step, out_axes=None)
        return jax.jit(
            eval_step,
            in_shardings=(self.state_shardings(state), self.batch_sharding),
            out_shardings=self.replicated,
        )

    def _pmap(self, step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        # The state is not mapped (None): it goes in and comes out as one replicated array.
        mapped: Callable[..., Any] = jax.pmap(
            step, AXIS, in_axes=(None, 0), devices=list(self.mesh.devices.flat), **options
        )
        if jax.process_count() == 1:
            return mapped

        # With several processes pmap returns arrays of the local devices. All else in this program
        # takes global arrays; the conversion copies nothing.
        def step_on_global_arrays(state: Tree, batch: Tree) -> Tree:
            return multihost_utils.host_local_array_to_global_array(
                mapped(state, batch), self.mesh, REPLICATED
            )

        return step_on_global_arrays


@functools.cache  # `put_batch` needs them for every batch
def _local_rows(sharding: NamedSharding, batch_size: int) -> Int64[np.ndarray, " rows"]:
    index = sharding.addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in index.values()]))


def make_parallel(
    kind: str = "auto", hybrid_group: int = 8, devices: Sequence[jax.Device] | None = None
) -> Parallel:
    """Returns how to spread a run over devices, by default over all devices of all processes.

    Args:
      kind: one of KINDS, or "auto": mesh.data if there are several devices, else jit.
      hybrid_group: number of devices that share the fully connected layers in mesh.hybrid.

    Raises:
      UserError: the kind does not exist or does not fit the devices.
    """
    devices = list(devices or jax.devices())
    if kind == "auto":
        kind = "mesh.data" if len(devices) > 1 else "jit"
    if kind not in KINDS:
        raise UserError(f"parallel={kind!r} does not exist; choose auto, {', '.join(KINDS)}")
    group = 1
    if kind == "jit":
        if jax.process_count() > 1:
            raise UserError("parallel=jit runs on one process only; use --config.parallel=auto")
        devices = devices[:1]
    if kind == "mesh.hybrid":
        group = min(hybrid_group, len(devices))
        if len(devices) % group:
            raise UserError(
                f"{len(devices)} devices do not divide into groups of hybrid_group={hybrid_group}"
            )
    shape = (len(devices) // group, group)
    if kind == "pmap":
        # pmap wants the devices of a process next to each other.
        by_process = sorted(devices, key=lambda device: (device.process_index, device.id))
        grid = np.array(by_process).reshape(shape)
    else:
        # Neighbors on the machine's network share a group.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Parallel(kind, Mesh(grid, (DATA, GROUP)))


def build_network(
    config: ConfigDict, devices: Sequence[jax.Device] | None = None
) -> tuple[Parallel, AlexNet, list[LayerRow]]:
    """Returns how a config spreads its network over devices, the network and its layer table.

    Args:
      devices: as for `make_parallel`.

    Raises:
      UserError: the config does not fit the devices, or names something that does not exist.
    """
    if not has_classes(variant_of(config)):
        raise UserError(
            f"model.variant={config.model.variant} ends before the logits and cannot be trained; "
            "set --config.model.variant=owt, and --config.init_from to start from its weights"
        )
    parallel = make_parallel(config.parallel, config.hybrid_group, devices)
    check_batch_size(config.batch_size, config.optimizer.accumulate_steps, parallel)
    if config.augment.mixup or config.augment.cutmix:
        _check_pairs(config.batch_size, parallel.mesh.size)
    model = build_model(config, **parallel.model_options(config.optimizer.gradient_dtype))
    layers = layer_table(model, (config.augment.crop_size, config.augment.crop_size, 3))
    check_layers(layers, parallel)
    for name, other in other_crop_sizes(config).items():
        _check_crop_size(model, config.augment.crop_size, other, name)
    return parallel, model, layers


def check_batch_size(batch_size: int, accumulate_steps: int, parallel: Parallel) -> None:
    """Raises UserError if the devices and accumulation steps do not divide a batch evenly."""
    if batch_size <= 0 or accumulate_steps <= 0:
        raise UserError("batch_size and optimizer.accumulate_steps must be at least 1")
    devices = parallel.mesh.size
    if batch_size % devices == 0:
        parts = [n for n in range(1, batch_size // devices + 1) if batch_size // devices % n == 0]
        nearest = min(parts, key=lambda n: abs(n - accumulate_steps))
        fix = f"set --config.optimizer.accumulate_steps={nearest}"
    else:
        # A run that resumes on other devices cannot change its batch size.
        most = max(n for n in range(1, devices + 1) if batch_size % n == 0)
        above = -(-batch_size // devices) * devices
        fix = f"use {most} device(s), or start a new run with --config.batch_size={above}"
    if batch_size % (devices * accumulate_steps):
        raise UserError(
            f"batch_size={batch_size} is not divisible by {devices} device(s) × "
            f"{accumulate_steps} accumulation step(s); {fix}"
        )


def _check_pairs(batch_size: int, devices: int) -> None:
    """Raises UserError if a device has an odd number of images, so that one has no partner."""
    if batch_size % (2 * devices):
        raise UserError(
            f"augment.mixup and augment.cutmix mix pairs of images, but batch_size={batch_size} "
            f"gives each of {devices} device(s) {batch_size // devices} images, an odd number; set "
            f"--config.batch_size={batch_size + devices}"
        )


def check_layers(layers: Sequence[LayerRow], parallel: Parallel) -> None:
    """Raises UserError if a group of devices cannot split the fully connected layers evenly."""
    group = parallel.mesh.shape[GROUP]
    for row in layers:
        inputs = int(np.prod(row.output_shape))
        if row.name.startswith(("pool5", "avgpool5", "fc6", "fc7")) and inputs % group:
            raise UserError(
                f"the {inputs} values of {row.name} cannot be split over groups of {group} "
                "devices; set another --config.hybrid_group"
            )


def _check_crop_size(model: AlexNet, size: int, other: int, name: str) -> None:
    """Raises UserError if the network's parameters have other shapes at another crop size."""

    def shapes(size: int) -> Any:
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        try:
            return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
        except UserError:  # too small for the network
            return None

    expected = shapes(size)
    if shapes(other) != expected:
        fitting = range(size, other, 1 if other > size else -1)
        last = max((s for s in fitting if shapes(s) == expected), key=lambda s: abs(s - size))
        raise UserError(
            f"{name}: the network has other weights for crops of {other} pixels than for those of "
            f"augment.crop_size={size}; choose at "
            f"{'most' if other > size else 'least'} {last}, or variant owt, which takes any size"
        )


# ------------------------------------------------------------------------------------------
# Arrays of several processes
# ------------------------------------------------------------------------------------------


def to_host(tree: Tree) -> Tree:
    """Returns global arrays as numpy arrays, whole and the same on every process.

    All processes must call it together.
    """
    return jax.tree.map(lambda x: np.asarray(_gather(x)), tree)


def _gather(x: jax.Array) -> jax.Array:
    if not isinstance(x, jax.Array) or x.is_fully_replicated:
        return x
    assert isinstance(x.sharding, NamedSharding)
    everywhere = NamedSharding(x.sharding.mesh, REPLICATED)
    gathered: jax.Array = jax.jit(lambda x: x, out_shardings=everywhere)(x)
    return gathered


def from_host(tree: Tree, like: Tree) -> Tree:
    """Returns numpy arrays, the same on every process, as global arrays sharded as `like`."""

    def place(x: np.ndarray, like: jax.Array) -> jax.Array:
        x = np.asarray(x, like.dtype)
        return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])

    return jax.tree.map(place, tree, like)
