"""One training step and one evaluation step: pure functions of (state, batch).

`jax.jit` compiles them for one device or, with a sharded batch, for many: the compiler sees the
global batch, so the mean gradient, batch norm over the whole batch and each image's own random
draws need no code here. Only `jax.pmap`, which shows a step one device's part of the batch, needs
the four places marked "pmap".
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float32, Int32, UInt8
from ml_collections import ConfigDict

from alexnet_jax.config import seed_for
from alexnet_jax.data.augment import Augment, Examples
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.training.optimizer import layer_of

Params = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
EvalStep = Callable[["TrainState", Batch], Metrics]

# Folded into keys, so that draws for different purposes are independent.
INIT, TRAIN = 0, 1
AUGMENT, DROPOUT = 0, 1


class TrainState(flax.struct.PyTreeNode):
    """All that training needs to continue, as one pytree.

    Attributes:
      step: int32[], number of updates made.
      params: float32 arrays by layer: `params["conv1"]["kernel"]`, …
      batch_stats: running statistics of the `bn` variant, {} for the others.
      average: {"params": …, "batch_stats": …}, moving averages of these two; {} without averaging.
      opt_state: of the Optax transformation.
      plateau: state of the plateau schedule. Its `scale` multiplies the learning rate.
      key: uint32[2], the base random key. The draws of a step depend on it and the step only.
    """

    step: jax.Array
    params: Params
    batch_stats: dict[str, Any]
    average: dict[str, Any]
    opt_state: optax.OptState
    plateau: Any
    key: jax.Array


def train_key(seed: int) -> jax.Array:
    """Returns the base key of a run's random draws. A step folds its number into it."""
    return jax.random.fold_in(jax.random.PRNGKey(seed), TRAIN)


def build_state(
    config: ConfigDict,
    model: AlexNet,
    tx: optax.GradientTransformation,
    seeds: tuple[Any, Any] | None = None,
) -> TrainState:
    """Returns the state before the first step, with the input size of a config.

    Args:
      seeds: of the weights and of dropout, which may be traced; by default the config's.
    """
    weights, dropout = seeds or (seed_for(config, "weights"), seed_for(config, "dropout"))
    size = config.augment.crop_size
    state = init_state(model, tx, weights, (size, size, 3)).replace(key=train_key(dropout))
    return restart_average(state) if config.optimizer.ema_decay else state


def init_state(
    model: AlexNet,
    tx: optax.GradientTransformation,
    seed: int,
    input_shape: tuple[int, int, int],
) -> TrainState:
    """Returns the state before the first step, without a moving average.

    Args:
      input_shape: (S, S, C) of the images that the network sees.
    """
    init_key = jax.random.fold_in(jax.random.PRNGKey(seed), INIT)
    variables = model.init(init_key, jnp.zeros((1, *input_shape)), train=False)
    return state_of(variables, tx, seed)


def state_of(
    variables: Mapping[str, Any], tx: optax.GradientTransformation, seed: int
) -> TrainState:
    """Returns the state before the first step of a network with given variables.

    Args:
      variables: {"params": …} and, if there are any, {"batch_stats": …}.
    """
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        average={},
        opt_state=tx.init(params),
        plateau=optax.contrib.reduce_on_plateau().init(params),
        key=train_key(seed),
    )


def restart_average(state: TrainState) -> TrainState:
    """Returns a state whose moving averages start at its parameters and statistics."""
    return state.replace(average={"params": state.params, "batch_stats": state.batch_stats})


def averaged(state: TrainState) -> TrainState:
    """Returns a state with the moving averages as its parameters, itself if it has none."""
    return state.replace(**state.average)


def make_train_step(
    model: AlexNet,
    tx: optax.GradientTransformation,
    augment: Augment,
    *,
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    log_grad_norm: bool = False,
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, metrics)`.

    The batch is what `Store.read` returns; the step augments it. Metrics are
    float32[] means over the global batch: loss (nats), top1 and top5 (accuracies from 0 to 1).
    Those of a mixed image are means over its two labels, weighted by their shares of the image.

    Args:
      tx: any Optax transformation. One that takes extra arguments gets `step` and `plateau_scale`.
      label_smoothing: share of a label's probability that is spread evenly over all classes.
      ema_decay: of the moving averages in the state; 0 for a state without them.
      accumulate_steps: number of parts in which the gradients of a batch are computed, one after
        the other, to save memory.
      log_grad_norm: adds the metric grad_norm, the global norm of the gradients of layers that
        are not frozen. It costs a pass over all gradients.
    """
    tx = optax.with_extra_args_support(tx)

    def loss_fn(
        params: Params, batch_stats: Any, examples: Examples, key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            examples["image"],
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )

        def values(labels: jax.Array) -> Metrics:
            losses = cross_entropy(logits, labels, label_smoothing)
            return {"loss": losses, **accuracies(logits, labels)}

        metrics = values(examples["label"])
        if "partner_label" in examples:
            of_partner, share = values(examples["partner_label"]), examples["share"]
            metrics = {k: share * v + (1 - share) * of_partner[k] for k, v in metrics.items()}
        metrics = {name: values.mean() for name, values in metrics.items()}
        return metrics["loss"], (metrics, updated.get("batch_stats", {}))

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Augmentation is part of the step: the same pixels on any host, a tenth of the bytes to
        # transfer, and (seed, step) alone reproduce a batch exactly.
        key = jax.random.fold_in(state.key, state.step)
        examples = augment_batch(augment, key, batch, state.step, model.axis_name)

        dropout_key = jax.random.fold_in(key, DROPOUT)
        if accumulate_steps == 1:
            grads, (metrics, batch_stats) = grad_fn(
                state.params, state.batch_stats, examples, dropout_key
            )
        else:
            grads, (metrics, batch_stats) = _accumulate(
                grad_fn, state.params, state.batch_stats, examples, dropout_key, accumulate_steps
            )
        if model.axis_name:  # pmap: the mean over devices, which jit's compiler inserts itself
            dtype = model.gradient_dtype or "float32"
            sent = jax.tree.map(lambda g: g.astype(dtype), grads)
            mean = jax.lax.pmean(sent, model.axis_name)
            grads = jax.tree.map(lambda g, like: g.astype(like.dtype), mean, grads)
            metrics = jax.lax.pmean(metrics, model.axis_name)
        if log_grad_norm:
            trained = {n: g for n, g in grads.items() if layer_of(n) not in model.frozen}
            metrics["grad_norm"] = optax.tree.norm(trained)

        # XLA does not compute the gradients of frozen layers, because `tx` ignores them.
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            step=state.step,
            plateau_scale=state.plateau.scale,
        )
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        if ema_decay:
            # The average of few steps must not remember the initial weights for a thousand.
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            new = {"params": state.params, "batch_stats": state.batch_stats}
            state = state.replace(average=optax.incremental_update(new, state.average, 1 - decay))
        return state, metrics

    return train_step


def build_train_step(
    config: ConfigDict, model: AlexNet, tx: optax.GradientTransformation, augment: Augment
) -> TrainStep:
    """Returns `make_train_step` with the options of a config."""
    return make_train_step(
        model,
        tx,
        augment,
        label_smoothing=config.label_smoothing,
        ema_decay=config.optimizer.ema_decay,
        accumulate_steps=config.optimizer.accumulate_steps,
        log_grad_norm=bool(config.optimizer.clip_norm),
    )


def augment_batch(
    augment: Augment,
    key: jax.Array,
    batch: Batch,
    step: jax.Array | int,
    axis_name: str | None = None,
) -> Examples:
    """Returns a training batch as the network sees it, as `Augment.mix` does.

    Args:
      key: the state's key with the step folded in.
    """
    index = jnp.arange(len(batch["label"]))
    if axis_name:  # pmap: the index in the global batch
        index += jax.lax.axis_index(axis_name) * len(index)
    key = jax.random.fold_in(key, AUGMENT)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    images = augment(batch["image"], keys, step, batch.get("size"))
    return augment.mix(images, batch["label"], keys)


def _accumulate(
    grad_fn: Callable[..., Any],
    params: Params,
    batch_stats: Any,
    examples: Examples,
    key: jax.Array,
    parts: int,
) -> tuple[Params, tuple[Metrics, Any]]:
    """Returns what `grad_fn` returns for the whole batch, computed in parts.

    Part p is every parts-th image from the p-th on. Consecutive images would be on one device each
    where the batch is sharded, so that devices would take turns.
    """

    def add_part(carry: Any, part: Any) -> tuple[Any, Metrics]:
        grads, batch_stats = carry
        part_grads, (metrics, batch_stats) = grad_fn(params, batch_stats, *part)
        grads = jax.tree.map(lambda total, g: total + g / parts, grads, part_grads)
        return (grads, batch_stats), metrics

    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), examples)
    (grads, batch_stats), metrics = jax.lax.scan(
        add_part,
        (jax.tree.map(jnp.zeros_like, params), batch_stats),
        (split, jax.random.split(key, parts)),
    )
    return grads, (jax.tree.map(jnp.mean, metrics), batch_stats)


def make_eval_step(model: AlexNet, augment: Augment) -> EvalStep:
    """Returns `eval_step(state, batch) -> sums` over the examples whose label is not -1.

    Sums are float32[] over the global batch: loss (nats), top1, top5, count. Padding examples have
    the label -1, so that every example counts exactly once whatever the batch size. With ten views
    the softmax is averaged over them first (paper §4.1), and the loss is that of the average.
    """

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        counted = batch["label"] >= 0
        labels = jnp.maximum(batch["label"], 0)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        log_probs = log_probabilities(model, variables, augment, batch["image"])
        values = {
            "loss": -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0],
            **accuracies(log_probs, labels),
            "count": jnp.ones(len(labels)),
        }
        sums = {name: jnp.sum(jnp.where(counted, value, 0.0)) for name, value in values.items()}
        return jax.lax.psum(sums, model.axis_name) if model.axis_name else sums  # pmap

    return eval_step


def log_probabilities(
    model: AlexNet, variables: dict[str, Any], augment: Augment, images: UInt8[jax.Array, "B S S 3"]
) -> Float32[jax.Array, "B classes"]:
    """Returns the logarithms of the probabilities, averaged over the views of each image."""

    def of_view(place: Any) -> jax.Array:
        logits: Any = model.apply(variables, augment.view(images, place), train=False)
        return nn.log_softmax(logits)

    if len(augment.views) == 1:
        return of_view(augment.views[0])
    # One view at a time: together they would take 8.5 GB at batch 1,024.
    return mean_softmax(jax.lax.map(of_view, jnp.asarray(augment.views)))


def cross_entropy(
    logits: Float32[jax.Array, "B C"], labels: Int32[jax.Array, " B"], smoothing: float = 0.0
) -> Float32[jax.Array, " B"]:
    """Returns -log p of the labels; with smoothing, a part of it is the mean over all classes."""
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return losses
    of_all_classes = nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    return (1 - smoothing) * losses + smoothing * of_all_classes


def mean_softmax(log_probs: Float32[jax.Array, "N B C"]) -> Float32[jax.Array, "B C"]:
    """Returns the logarithm of the mean of N probabilities, given as logarithms."""
    return nn.logsumexp(log_probs, axis=0) - jnp.log(len(log_probs))


def top_five(
    scores: Float32[jax.Array, "B C"],
) -> tuple[Float32[jax.Array, "B best"], Int32[jax.Array, "B best"]]:
    """Returns the five highest scores in falling order and their classes; all if C < 5."""
    values, classes = jax.lax.top_k(scores, min(5, scores.shape[-1]))
    return values, classes


def accuracies(
    scores: Float32[jax.Array, "B C"], labels: Int32[jax.Array, " B"]
) -> dict[str, Float32[jax.Array, " B"]]:
    """Returns {"top1": …, "top5": …}: 1 where the label's score is among the 1 or 5 highest.

    Of equal scores the first is the highest, as for `jax.lax.top_k`. NaN is the highest of all, but
    never right. Counting the higher scores needs no sort, for which GPUs would collect the scores
    of all devices on each of them.
    """
    own = jnp.take_along_axis(scores, labels[:, None], axis=1)
    higher = ~(scores <= own)
    higher_by_place = (scores == own) & (jnp.arange(scores.shape[1]) < labels[:, None])
    rank = jnp.sum(higher | higher_by_place, axis=1)
    return {"top1": (rank < 1).astype(jnp.float32), "top5": (rank < 5).astype(jnp.float32)}
