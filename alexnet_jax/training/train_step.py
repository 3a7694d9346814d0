"""One step of training and one of evaluation: pure functions of (state, batch)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Float32, Int32, UInt8
from ml_collections import ConfigDict

from alexnet_jax.data import augment
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.training.optimizer import Params, Schedule, plateau, sgd, trainable

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# What draws are for, folded into their keys.
INIT, TRAIN = 0, 1
AUGMENT, DROPOUT = 0, 1


class TrainState(flax.struct.PyTreeNode):
    """All that training needs to go on, as one pytree.

    Attributes:
      step: int32[], number of updates made.
      params: float32 arrays by layer: `params["conv1"]["kernel"]`, …
      batch_stats: running statistics of the `bn` variant, {} for the others.
      opt_state: Optax's, with the velocity of the layers that train.
      plateau: state of the plateau schedule; its `scale` multiplies the learning rate.
      key: the base random key; a step's draws come from it and the step's number alone.
    """

    step: jax.Array
    params: Params
    batch_stats: dict[str, Any]
    opt_state: optax.OptState
    plateau: Any
    key: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch], Metrics]


def train_key(seed: int) -> jax.Array:
    """Returns the base key of a run's random draws: a step folds its number into it."""
    return jax.random.fold_in(jax.random.PRNGKey(seed), TRAIN)


def init_state(model: AlexNet, config: ConfigDict) -> TrainState:
    """Returns the state before the first step, a function of config.seed alone."""
    init_key = jax.random.fold_in(jax.random.PRNGKey(config.seed), INIT)
    size = config.augment.crop_size
    return state_of(model.init(init_key, jnp.zeros((1, size, size, 3)), train=False), config)


def state_of(variables: Mapping[str, Any], config: ConfigDict) -> TrainState:
    """Returns the state before the first step of a network of {"params": …, "batch_stats": …}."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=sgd(config).init(trainable(params, config.freeze)),
        plateau=plateau(config).init(params),
        key=train_key(config.seed),
    )


Gradients = Callable[[Params, Batch, Any], tuple[Params, Any]]
Sums = Callable[[Params, Batch, Any], Metrics]


class Spread(NamedTuple):
    """How the part of a step that sees the batch is spread over devices; by default it is not.

    That part is a function of (params, batch, the rest), of which a device has its share of the
    batch, and of the parameters what its layers need.

    Attributes:
      gradients: maps such a function, whose gradients are already those of the global batch.
      sums: the same for the evaluation's.
      mean: the gradients of a device's share -> those of the global batch, or its shards of them.
    """

    gradients: Callable[[Gradients], Gradients] = lambda function: function
    sums: Callable[[Sums], Sums] = lambda function: function
    mean: Callable[[Params], Params] = lambda gradients: gradients


UNSPREAD = Spread()


def make_train_step(
    model: AlexNet,
    config: ConfigDict,
    stats: augment.Statistics,
    schedule: Schedule,
    spread: Spread = UNSPREAD,
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, metrics)`.

    The batch is {"image": uint8[B, S, S, 3], "label": int32[B]}; augmentation happens inside.
    Metrics are float32[] means over the global batch: loss (nats), top1 and top5 (accuracies, 0
    to 1); and learning_rate. With `optimizer.clip_norm` also grad_norm, the global norm of the
    gradients before clipping; without, it would cost a pass over all of them. No gradient is
    taken of the layers of `freeze`.

    Every random draw comes from (seed, step) and an image's place in the global batch, so that a
    step is the same on any number of devices. Where `model.batch_axes` are mapped, the batch is
    one device's share.
    """
    optimizer = sgd(config)
    axes = model.batch_axes

    def gradients(params: Params, batch: Batch, rest: Any) -> tuple[Params, Any]:
        batch_stats, key, step, color_noise = rest

        def loss_of(trained: Params, *given: Any) -> Any:
            return _loss(model, {**params, **trained}, *given)

        images = augmented(key, step, batch["image"], color_noise, stats, config, axes)
        grads, metrics, batch_stats = _accumulate(
            jax.grad(loss_of, has_aux=True),
            (trainable(params, config.freeze), batch_stats),
            (images, batch["label"]),
            jax.random.fold_in(jax.random.fold_in(key, step), DROPOUT),
            config.optimizer.accumulate_steps,
        )
        metrics = jax.lax.pmean(metrics, axes) if axes else metrics
        return spread.mean(grads), (metrics, batch_stats)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        now = schedule(state.step, state.plateau.scale)
        rest = (state.batch_stats, state.key, state.step, now.color_noise)
        grads, (metrics, batch_stats) = spread.gradients(gradients)(state.params, batch, rest)
        params = trainable(state.params, config.freeze)
        updates, opt_state = optimizer.update(grads, state.opt_state, params, rates=now.rates)
        state = state.replace(
            step=state.step + 1,
            params={**state.params, **optax.apply_updates(params, updates)},
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        if config.optimizer.clip_norm:
            metrics["grad_norm"] = optax.tree.norm(grads)
        return state, {**metrics, "learning_rate": now.learning_rate}

    return train_step


def _loss(
    model: AlexNet,
    params: Params,
    batch_stats: dict[str, Any],
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, tuple[Metrics, dict[str, Any]]]:
    logits, updated = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    metrics = {"loss": loss, **_in_first(logits, labels, jnp.mean)}
    return loss, (metrics, updated.get("batch_stats", {}))


def augmented(
    key: jax.Array,
    step: jax.Array | int,
    images: UInt8[jax.Array, "B S S 3"],
    color_noise: jax.Array,
    stats: augment.Statistics,
    config: ConfigDict,
    axes: tuple[str, ...] = (),
) -> Float32[jax.Array, "B crop_size crop_size 3"]:
    """Returns the batch that the network sees at one step.

    Every image has a key of its own by its place in the global batch, so that what happens to it
    does not depend on how many devices share the batch.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, step), AUGMENT)
    first = jax.lax.axis_index(axes) * len(images) if axes else 0
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(first + jnp.arange(len(images)))
    return augment.augment(images, keys, color_noise, stats, config)


def _accumulate(
    grad_fn: Callable[..., Any],
    variables: tuple[Params, dict[str, Any]],
    examples: tuple[jax.Array, jax.Array],
    key: jax.Array,
    parts: int,
) -> tuple[Params, Metrics, dict[str, Any]]:
    """Gradients and metrics of the batch, computed in so many parts one after the other.

    A part takes every parts-th image, of each device's share as of the whole batch.
    """
    params, batch_stats = variables
    if parts == 1:
        grads, (metrics, batch_stats) = grad_fn(params, batch_stats, *examples, key)
        return grads, metrics, batch_stats

    def add_part(carry: Any, part: Any) -> tuple[Any, Metrics]:
        grads, batch_stats = carry
        part_grads, (metrics, batch_stats) = grad_fn(params, batch_stats, *part)
        return (jax.tree.map(lambda total, g: total + g / parts, grads, part_grads), batch_stats), (
            metrics
        )

    split = [x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for x in examples]
    (grads, batch_stats), metrics = jax.lax.scan(
        add_part,
        (jax.tree.map(jnp.zeros_like, params), batch_stats),
        (*split, jax.random.split(key, parts)),
    )
    return grads, jax.tree.map(jnp.mean, metrics), batch_stats


def log_probabilities(
    model: AlexNet,
    variables: dict[str, Any],
    images: UInt8[jax.Array, "B S S 3"],
    stats: augment.Statistics,
    config: ConfigDict,
    views: str,
) -> Float32[jax.Array, "B classes"]:
    """Returns the logarithms of what the network gives to stored images.

    Args:
      views: "center", the centre crop; or "ten", the softmax averaged over the ten views.
    """

    def of_view(view: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, view, train=False)
        return nn.log_softmax(logits)

    if views == "center":
        return of_view(augment.center_crop(images, stats, config))
    return mean_softmax(jax.lax.map(of_view, augment.ten_views(images, stats, config)))


def mean_softmax(log_probs: Float32[jax.Array, "N B C"]) -> Float32[jax.Array, "B C"]:
    """Returns the logarithm of the mean of N probabilities, given as logarithms."""
    return nn.logsumexp(log_probs, axis=0) - jnp.log(len(log_probs))


def first_five(
    scores: Float32[jax.Array, "B C"],
) -> tuple[Float32[jax.Array, "B best"], Int32[jax.Array, "B best"]]:
    """Returns the five highest of the scores, falling, and their classes. Of fewer classes, all."""
    values, classes = jax.lax.top_k(scores, min(5, scores.shape[-1]))
    return values, classes


def make_eval_step(
    model: AlexNet,
    config: ConfigDict,
    stats: augment.Statistics,
    spread: Spread = UNSPREAD,
) -> EvalStep:
    """Returns `eval_step(state, batch) -> sums` over the examples whose label is not -1.

    Sums, each float32[] over the global batch: loss (nats), top1, top5, count. With ten views
    the softmax is averaged over them first (paper, section 4.1), and the loss is of the average.
    """

    axes = model.batch_axes

    def sums(params: Params, batch: Batch, batch_stats: Any) -> Metrics:
        counted = batch["label"] >= 0
        labels = jnp.maximum(batch["label"], 0)
        variables = {"params": params, "batch_stats": batch_stats}
        log_probs = log_probabilities(
            model, variables, batch["image"], stats, config, config.eval.views
        )
        losses = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]

        def total(values: ArrayLike) -> jax.Array:
            return jnp.sum(jnp.where(counted, values, 0.0))

        found = {"loss": total(losses), **_in_first(log_probs, labels, total), "count": total(1.0)}
        return jax.lax.psum(found, axes) if axes else found

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        return spread.sums(sums)(state.params, batch, state.batch_stats)

    return eval_step


def _in_first(
    logits: jax.Array, labels: jax.Array, reduce: Callable[[jax.Array], jax.Array]
) -> Metrics:
    """Whether each label is the first, or among the first five."""
    _, best = first_five(logits)
    hits = (best == labels[:, None]).astype(jnp.float32)
    return {"top1": reduce(hits[:, 0]), "top5": reduce(hits.sum(1))}
