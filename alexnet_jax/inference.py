"""A trained network loaded from its workdir. It needs neither the data nor the training code."""

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Float32, UInt8
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax.analysis import taps
from alexnet_jax.data.augment import Augment, Statistics, center_window, make_augment
from alexnet_jax.data.preprocess import WHOLE
from alexnet_jax.data.wordnet import display_names
from alexnet_jax.models.alexnet import AlexNet, has_classes
from alexnet_jax.models.build import build_model, variant_name, variant_of
from alexnet_jax.training.checkpoint import Checkpoints, named_leaves
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.train_step import TrainState, build_state, log_probabilities, state_of
from alexnet_jax.utils import buckets
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import DISK_FULL, atomic_write, explain_write_errors

STATISTICS_FILE = "statistics.npz"
OfImages = Callable[[UInt8[np.ndarray, "B S S 3"]], Any]


class Trained(NamedTuple):
    """A trained network and the meaning of its inputs and outputs.

    Example:
      >>> network = load("runs/quickstart")
      >>> probabilities = network.predict(images)  # images: uint8[B, S, S, 3]
      >>> fc7 = network.features(images, ["relu7"])["relu7"]

    Attributes:
      config: of the training.
      variables: {"params": …, "batch_stats": …}, float32 arrays on the first device; their moving
        averages if the training kept any.
      stats: pixel statistics of the training.
      class_names: one for each of the num_classes logits.
      step: number of updates made.
    """

    config: ConfigDict
    model: AlexNet
    variables: dict[str, Any]
    stats: Statistics
    class_names: tuple[str, ...]
    step: int

    @property
    def augment(self) -> Augment:
        """The augmentation, whose `center` and `view` prepare images for the network."""
        return make_augment(self.config, self.stats)

    def predict(self, images: UInt8[np.ndarray, "B S S 3"]) -> Float32[np.ndarray, "B num_classes"]:
        """Returns the class probabilities of stored images, with the views of `config.eval`.

        S is `config.image_size`. Compiles at every call: for many batches use `classifier`.
        """
        probabilities: np.ndarray = np.exp(np.asarray(classifier(self)(images)))
        return probabilities

    def features(
        self, images: UInt8[np.ndarray, "B S S 3"], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of layers for the center crops of stored images, by name.

        Compiles at every call: for many batches use `feature_extractor`.

        Args:
          names: "relu1" or "fc7" for example; `models.names` lists all.
        """
        return {k: np.asarray(x) for k, x in feature_extractor(self, names)(images).items()}


def load(workdir: str | Path, step: int | None = None, needs_classes: bool = False) -> Trained:
    """Returns the network of a workdir, which may still be training. Writes nothing.

    Args:
      workdir: a path or a URL such as gs://bucket/folder.
      step: which checkpoint; by default the best by top-1, or the newest if none was evaluated.
      needs_classes: whether a network without fully connected layers is refused.

    Raises:
      UserError: the workdir holds no run or one that cannot be read, or its network has other
        shapes in this version of the program, or no classes.
    """
    workdir = buckets.readable(workdir)
    config = saved_config(workdir)
    if needs_classes and not has_classes(variant_of(config)):
        raise UserError(
            f"{workdir} has convolutions only and knows no classes; train the other layers with "
            f"--config.init_from={workdir}"
        )
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoint yet; train longer or name another workdir")
    model = build_model(config)
    here = SingleDeviceSharding(jax.local_devices()[0])
    shapes = state_shapes(config, model)
    like = jax.tree.map(
        lambda x: x.update(sharding=here),
        {"params": shapes.params, "batch_stats": shapes.batch_stats},
    )
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        step = _chosen_step(workdir, checkpoints, step)
        try:
            variables = checkpoints.restore_variables(
                step, like, of_average=config.optimizer.ema_decay > 0
            )
        except ValueError as error:
            raise UserError(
                f"the checkpoint of step {step} in {workdir} cannot be read "
                f"({str(error)[:200]}); choose another step, or put back a copy of it"
            ) from error
    stats, class_names = load_statistics(workdir)
    others = map(unnamed, range(len(class_names), config.model.num_classes))
    return Trained(
        config,
        model,
        variables,
        stats,
        (*class_names, *others),
        step,
    )


def with_preprocess(network: Trained, name: str | None) -> Trained:
    """Returns a network that takes images of another preprocessing, of `PREPROCESSING`, or itself.

    Its crop size, mean and scale stay, since its weights depend on them.
    """
    if name in (None, network.config.preprocess):
        return network
    config, stats = network.config.copy_and_resolve_references(), network.stats
    config.preprocess = name
    if name in WHOLE:
        config.image_size = network.augment.view_size
        if stats.mean.ndim > 1:
            stats = stats._replace(mean=center_window(stats.mean, config.image_size))
    return network._replace(config=config, stats=stats)


def state_shapes(config: ConfigDict, model: AlexNet) -> TrainState:
    """Returns shapes and dtypes of the train state of a config."""
    tx = make_optimizer(config, steps_per_epoch=1.0)
    shapes: TrainState = jax.eval_shape(lambda: build_state(config, model, tx))
    return shapes


def create(
    workdir: Path,
    config: ConfigDict,
    variables: dict[str, Any],
    stats: Statistics,
    class_names: Sequence[str],
) -> None:
    """Creates the workdir of a network that was trained elsewhere.

    It looks like the workdir of a run before its first step. It gets its name when it is complete.

    Args:
      variables: as in `Trained`.
      class_names: at most num_classes.

    Raises:
      UserError: the workdir is not empty or cannot be written, or the arrays do not have the shapes
        of the config's network.
    """
    model = build_model(config)
    difference = mismatch(state_shapes(config, model).params, variables["params"])
    if difference:
        raise UserError(f"the weights are not of variant {variant_name(config)}: {difference}")
    tx = make_optimizer(config, steps_per_epoch=1.0)
    state = state_of(jax.tree.map(jnp.asarray, variables), tx, config.seed)
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is not empty; choose another workdir")
    target = workdir.absolute()
    part = target.with_name(f".{target.name}.part")
    with explain_write_errors(workdir, "another workdir"):
        shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
        try:
            part.mkdir(parents=True)
            with contextlib.closing(Checkpoints(part, configs.to_json(config))) as checkpoints:
                checkpoints.save(state, position=None)
            save_statistics(part, stats, class_names)
            (part / "config.json").write_text(configs.to_json(config) + "\n")
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def unnamed(label: int) -> str:
    """Returns the name of a class that has none."""
    return f"class {label}"


def saved_config(workdir: Path) -> ConfigDict:
    """Returns a workdir's config with parallel="jit". Raises UserError if it cannot be read."""
    path = workdir / "config.json"
    try:
        saved = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"no trained network in {workdir}: it has no config.json; name a workdir of train.py "
            "or of alexnet_jax.convert"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; put back a copy of it") from error
    config = configs.from_saved(saved, str(path))
    config.parallel = "jit"
    return config


def save_statistics(workdir: Path, stats: Statistics, class_names: Sequence[str]) -> None:
    """Writes the meaning of a network's inputs and outputs to statistics.npz, atomically."""
    with (
        explain_write_errors(workdir, "another --workdir", DISK_FULL),
        atomic_write(workdir / STATISTICS_FILE) as new,
    ):
        np.savez(new, class_names=np.array(class_names, np.str_), **stats._asdict())


def load_statistics(workdir: Path) -> tuple[Statistics, tuple[str, ...]]:
    """Returns what `save_statistics` wrote. Raises UserError if it cannot be read."""
    path = workdir / STATISTICS_FILE
    try:
        with np.load(path) as saved:
            stats = Statistics(*(saved[field] for field in Statistics._fields))
            return stats, display_names(map(str, saved["class_names"]))
    except Exception as error:  # from zipfile, zlib, NumPy or the file system
        raise UserError(
            f"{path} cannot be read ({error}); run the training command again, which rewrites it "
            "even if the run is finished"
        ) from error


def log_probs(
    trained: Trained, views: str, variables: dict[str, Any], images: UInt8[jax.Array, "B S S 3"]
) -> Float32[jax.Array, "B classes"]:
    """Returns the log-probabilities of images, a pure function.

    Args:
      views: one of `augment.VIEWS`.
      variables: of the network. An argument, so that they are not compiled as constants.
    """
    augment = dataclasses.replace(trained.augment, eval_views=views)
    return log_probabilities(trained.model, variables, augment, images)


def classifier(trained: Trained, views: str | None = None) -> OfImages:
    """Returns a function from images to log-probabilities float32[B, num_classes].

    S is `config.image_size`. See `on_all_devices`.

    Args:
      views: one of `augment.VIEWS`; by default the config's.
    """
    function = functools.partial(log_probs, trained, views or trained.config.eval.views)
    return on_all_devices(function, trained.variables)


def features_of(trained: Trained, names: Sequence[str]) -> Callable[..., dict[str, jax.Array]]:
    """Returns a pure function from variables and images to {name: float32[B, …]}.

    Args:
      names: of taps (`models.names`).
    """

    def features(
        variables: dict[str, Any], images: UInt8[jax.Array, "B S S 3"]
    ) -> dict[str, jax.Array]:
        view = trained.augment.center(images)
        found = taps.responses(trained.model, variables, view, names)
        return {name: x.astype(jnp.float32) for name, x in found.items()}

    return features


def feature_extractor(trained: Trained, names: Sequence[str]) -> OfImages:
    """Returns a function from images to {name: float32[B, …]}, for their center crops.

    Args:
      names: of taps (`models.names`).

    Raises:
      UserError: the network has no such tap.
    """
    return on_all_devices(features_of(trained, names), trained.variables)


def on_all_devices(function: Callable[..., Any], variables: Any) -> Callable[..., Any]:
    """Returns `lambda *arrays: function(variables, *arrays)`, spread over this process's devices.

    All arrays, and those that the function returns, have the same length. Each new length compiles
    again, so use one. The call returns before the result is computed, except where the devices do
    not divide the length: padding is then removed on the host. On the devices that would be an
    all-gather, and on CPU several of those in flight can deadlock if there are more devices than
    threads. For the same reason this uses shard_map, which adds no communication, and not jit.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()
    variables = jax.device_put(variables, NamedSharding(mesh, whole))

    @jax.jit
    def compiled(variables: Any, *shares: jax.Array) -> Any:
        specs = (whole, *(split for _ in shares))
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False
        )
        return mapped(variables, *shares)

    def of_arrays(*arrays: np.ndarray) -> Any:
        missing = -len(arrays[0]) % mesh.size
        if missing:
            arrays = tuple(
                np.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:]))) for x in arrays
            )
        found = compiled(variables, *jax.device_put(arrays, NamedSharding(mesh, split)))
        return jax.tree.map(lambda x: np.asarray(x)[:-missing], found) if missing else found

    return of_arrays


def _chosen_step(workdir: Path, checkpoints: Checkpoints, step: int | None) -> int:
    steps = checkpoints.all_steps
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet; train longer or name another workdir")
    if step is None:
        best = checkpoints.best_step
        return steps[-1] if best is None else best
    if step not in steps:
        raise UserError(
            f"{workdir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}"
        )
    return step


def mismatch(expected: Any, given: Any) -> str | None:
    """Returns a text about the first array that is missing, unexpected or of another shape."""
    shapes = [{name: np.shape(x) for name, x in named_leaves(tree)} for tree in (expected, given)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        here, there = (of_tree.get(name, "none") for of_tree in shapes)
        if here != there:
            return f"{name} has shape {there}, not {here}"
    return None
