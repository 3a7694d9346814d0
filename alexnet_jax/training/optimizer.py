"""The paper's SGD and later optimizers as Optax chains, and the schedule of what changes.

A config's schedule is data: a kind ("steps", "plateau", …) that drives `learning_rate`, and a log
of changes, each (epoch, layer, field, value), that overrides it from that epoch on.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from alexnet_jax.models.alexnet import kernel_layers
from alexnet_jax.models.build import variant_of
from alexnet_jax.utils.errors import UserError

Params = dict[str, Any]
Step = jax.Array | int
Rate = Callable[[Step], jax.Array]
# (layer, whether it is a kernel, step, plateau scale) -> learning rate
LayerRate = Callable[[str, bool, Step, jax.Array], jax.Array]

OPTIMIZERS = ("sgd", "sgdw", "lars", "adamw", "lamb")
# Factor on the learning rate as a function of k = batch_size / scaling_batch_size.
SCALINGS: dict[str, Callable[[float], float]] = {
    "none": lambda k: 1.0,
    "linear": lambda k: k,
    "sqrt": math.sqrt,
}
ALL, DATA = "all", "data"  # what else than a layer schedule.changes can name
CHANGEABLE = ("learning_rate", "bias_learning_rate", "color_noise", "crop_size")


# ------------------------------------------------------------------------------------------
# The update
# ------------------------------------------------------------------------------------------


def make_optimizer(
    config: ConfigDict, steps_per_epoch: float
) -> optax.GradientTransformationExtraArgs:
    """Returns the update of `config.optimizer.kind`.

    "sgd" is the paper's (§5): v ← 0.9 v − 0.0005 ε w − ε ∇;  w ← w + v. The learning rate ε is
    inside the velocity and multiplies the weight decay too, so that lowering it takes effect over
    about ten steps. This is unlike `optax.sgd`, which scales the velocity.

    "lars" multiplies every kernel's ε by its trust ratio 0.001 ‖w‖ / ‖∇ + 0.0005 w‖
    (`optax.lars`). You, Gitman and Ginsburg 2017 (arXiv 1708.03888) divide by ‖∇‖ + 0.0005 ‖w‖,
    which is never smaller.

    "sgdw" and "adamw" (Loshchilov and Hutter 2017, arXiv 1711.05101) and "lamb" (You et al. 2019,
    arXiv 1904.00962) add ε times the weight decay to the step itself, and not to the gradient that
    their moments average. As in Optax, the decay is thus multiplied by ε.

    Biases and batch norm have no trust ratio. `update` needs the extra arguments `step` (int32[])
    and `plateau_scale` (float32[]). The step is not counted here because the train state counts it
    already.

    Raises:
      UserError: as `make_schedule`.
    """
    fields = config.optimizer
    rate = make_schedule(config, steps_per_epoch)
    decay = (
        *_kernel_decays(fields.weight_decay, fields.layer_decays),
        optax.add_decayed_weights(fields.bias_weight_decay, mask=_is_no_kernel),
    )
    factors = [_scale_by_layer(fields.layer_rates)] if fields.layer_rates else []
    velocity = _momentum(fields.momentum, fields.nesterov, rate)
    adam = optax.scale_by_adam(fields.b1, fields.b2, fields.eps)

    def trust(coefficient: float) -> optax.GradientTransformation:
        ratio = optax.scale_by_trust_ratio(trust_coefficient=coefficient)
        return optax.masked(ratio, _is_kernel)

    kinds: dict[str, Sequence[optax.GradientTransformation]] = {
        "sgd": (*decay, *factors, velocity),
        "sgdw": (
            optax.trace(fields.momentum, fields.nesterov),
            *(*decay, *factors, _scale_by_rate(rate)),
        ),
        "lars": (*decay, trust(fields.trust_coefficient), *factors, velocity),
        "adamw": (adam, *decay, *factors, _scale_by_rate(rate)),
        "lamb": (adam, *decay, trust(1.0), *factors, _scale_by_rate(rate)),
    }
    tx = optax.chain(
        optax.clip_by_global_norm(fields.clip_norm) if fields.clip_norm else optax.identity(),
        *kinds[fields.kind],
    )
    if not config.freeze:
        return tx
    # The whole chain is inside: a gradient norm for clipping that included frozen layers would
    # need their gradients, and XLA could not remove the convolutions that compute them.
    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, _freeze_labels(config))


def _freeze_labels(config: ConfigDict) -> Callable[[Params], dict[str, str]]:
    frozen = tuple(config.freeze)
    return lambda params: {
        name: "freeze" if layer_of(name) in frozen else "train" for name in params
    }


def without_frozen(opt_state: optax.OptState) -> optax.OptState:
    """Returns the optimizer state without entries for frozen layers, as version 0.1 had it."""
    if not isinstance(opt_state, optax.transforms.PartitionState):
        return opt_state
    *others, velocity = opt_state.inner_states["train"].inner_state
    trained = {name: v for name, v in velocity.trace.items() if jax.tree.leaves(v)}
    return *others, velocity._replace(trace=trained)


def _kernel_decays(
    decay: float, layer_decays: Sequence[tuple[str, float]]
) -> list[optax.GradientTransformation]:
    """Returns the weight decay of all kernels, one transformation for each value."""
    own = dict(layer_decays)

    def has_value(value: float) -> Callable[[Params], Any]:
        def is_decayed(path: Any, _: jax.Array) -> bool:
            of_layer = own.get(layer_of(path[0].key), decay)
            return path[-1].key == "kernel" and of_layer == value

        return lambda params: jax.tree_util.tree_map_with_path(is_decayed, params)

    values = dict.fromkeys((decay, *own.values()))
    return [optax.add_decayed_weights(value, mask=has_value(value)) for value in values]


def _scale_by_layer(
    layer_rates: Sequence[tuple[str, float]],
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of layers. This equals multiplying their ε, which comes after it."""
    scales = {layer: optax.scale(factor) for layer, factor in layer_rates}

    def labels(params: Params) -> dict[str, str]:
        layers = {name: layer_of(name) for name in params}
        return {name: layer if layer in scales else "others" for name, layer in layers.items()}

    return optax.partition({**scales, "others": optax.identity()}, labels)


def _momentum(
    momentum: float, nesterov: bool, rate: LayerRate
) -> optax.GradientTransformationExtraArgs:
    """v ← momentum · v − ε u;  w ← w + v, with an ε for each array.

    With Nesterov's momentum w ← w + momentum · v − ε u, as in torch.optim.SGD.

    ε = 0 leaves v and w as they are. `optax.trace` would let a layer whose ε is 0 coast on its
    velocity. The released program skips the update of such a layer.
    """

    def init(params: Params) -> optax.TraceState:
        return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Params,
        state: optax.TraceState,
        params: Params | None = None,
        *,
        step: Step,
        plateau_scale: jax.Array,
        **_: Any,
    ) -> tuple[Params, optax.TraceState]:
        rates = _rates(rate, updates, step, plateau_scale)
        velocity = jax.tree.map(
            lambda v, u, rate: jnp.where(rate > 0, momentum * v - rate * u, v),
            state.trace,
            updates,
            rates,
        )
        ahead = velocity
        if nesterov:
            ahead = jax.tree.map(
                lambda v, u, rate: momentum * v - rate * u, velocity, updates, rates
            )
        steps = jax.tree.map(lambda v, rate: jnp.where(rate > 0, v, 0.0), ahead, rates)
        return steps, optax.TraceState(trace=velocity)

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_rate(rate: LayerRate) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by −ε, with an ε for each array. For optimizers with moments before it."""

    def update(
        updates: Params,
        state: optax.EmptyState,
        params: Params | None = None,
        *,
        step: Step,
        plateau_scale: jax.Array,
        **_: Any,
    ) -> tuple[Params, optax.EmptyState]:
        rates = _rates(rate, updates, step, plateau_scale)
        return jax.tree.map(lambda u, rate: -rate * u, updates, rates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _rates(rate: LayerRate, updates: Params, step: Step, plateau_scale: jax.Array) -> Any:
    """Returns the learning rate of each array of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: rate(layer_of(path[0].key), path[-1].key == "kernel", step, plateau_scale),
        updates,
    )


def layer_of(name: str) -> str:
    """Returns the layer to which a key of params belongs: "bn1" belongs to "conv1"."""
    return name.replace("bn", "conv")


def _is_kernel(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _is_no_kernel(params: Params) -> Any:
    return jax.tree.map(lambda kernel: not kernel, _is_kernel(params))


# ------------------------------------------------------------------------------------------
# The schedule
# ------------------------------------------------------------------------------------------


def make_schedule(config: ConfigDict, steps_per_epoch: float) -> LayerRate:
    """Returns `rate(layer, is_kernel, step, plateau_scale) -> float32[]`, a pure function.

    rate("all", True, …) is the learning rate to report. Batch norm counts as a bias.

    Raises:
      UserError: a schedule, scaling, optimizer or layer does not exist, or a change is malformed.
    """
    _check(config)
    base = _base_rate(config, steps_per_epoch)
    changes = [
        (math.ceil(epoch * steps_per_epoch), layer, field, value)
        for epoch, layer, field, value in config.schedule.changes
    ]
    bias_factor = config.optimizer.bias_learning_rate

    def rate(layer: str, is_kernel: bool, step: Step, plateau_scale: jax.Array) -> jax.Array:
        value = base(step) * plateau_scale
        field = "learning_rate"
        if not is_kernel:
            value, field = value * bias_factor, "bias_learning_rate"
        for start, changed_layer, changed_field, new in changes:
            if changed_field == field and changed_layer in (ALL, layer):
                value = jnp.where(step >= start, new, value)
        return jnp.asarray(value, jnp.float32)

    return rate


def make_plateau(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """Returns what lowers its state's `scale` when validation error stops improving (paper §5).

    Call `update({}, state, value=error)` after each evaluation. With other kinds of schedule nobody
    calls it, and the scale stays 1.
    """
    fields = config.schedule
    return optax.contrib.reduce_on_plateau(
        factor=fields.factor,
        patience=fields.patience,
        min_scale=fields.factor**fields.max_drops,
    )


def scaled_rate(config: ConfigDict) -> float:
    """Returns `learning_rate`, which holds at `scaling_batch_size`, scaled to `batch_size`.

    Krizhevsky 2014 (arXiv 1404.5997, §5): a batch k times as large asks for √k times the rate in
    theory and for k times in practice. Goyal et al. 2017 (arXiv 1706.02677) use k.
    """
    k = config.batch_size / config.schedule.scaling_batch_size
    rate: float = config.learning_rate
    return rate * SCALINGS[config.schedule.scaling](k)


def _base_rate(config: ConfigDict, steps_per_epoch: float) -> Rate:
    fields, rate = config.schedule, scaled_rate(config)
    warmup_steps = round(fields.warmup_epochs * steps_per_epoch)
    decay_steps = max(1, math.ceil(config.num_epochs * steps_per_epoch) - warmup_steps)
    drops = {
        math.ceil(epoch * steps_per_epoch) - warmup_steps: fields.factor
        for epoch in fields.step_epochs
    }
    kinds: dict[str, Callable[[], Rate]] = {
        "constant": lambda: optax.constant_schedule(rate),
        "plateau": lambda: optax.constant_schedule(rate),
        "steps": lambda: optax.piecewise_constant_schedule(rate, drops),
        "cosine": lambda: optax.cosine_decay_schedule(rate, decay_steps),
        "polynomial": lambda: optax.polynomial_schedule(rate, 0.0, fields.power, decay_steps),
    }
    if fields.kind not in kinds:
        raise UserError(
            f"schedule.kind={fields.kind!r} does not exist; choose one of {', '.join(kinds)}"
        )
    if not warmup_steps:
        return kinds[fields.kind]()
    warmup = optax.linear_schedule(0.0, rate, warmup_steps)
    joined: Rate = optax.join_schedules([warmup, kinds[fields.kind]()], [warmup_steps])
    return joined


# ------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------


def _check(config: ConfigDict) -> None:
    for name, kind, kinds in (
        ("optimizer.kind", config.optimizer.kind, OPTIMIZERS),
        ("schedule.scaling", config.schedule.scaling, SCALINGS),
    ):
        if kind not in kinds:
            raise UserError(f"{name}={kind!r} does not exist; choose one of {', '.join(kinds)}")
    if not all(isinstance(epoch, int | float) for epoch in config.schedule.step_epochs):
        raise UserError(f"schedule.step_epochs={config.schedule.step_epochs} must be numbers")
    layers = kernel_layers(variant_of(config))
    for layer in config.freeze:
        _check_layer("freeze", layer, layers)
    if set(config.freeze) == set(layers):
        raise UserError("freeze names all layers, so nothing would train; leave one out")
    _check_layer_values(config, layers)
    for change in config.schedule.changes:
        _check_change(change, config.freeze, layers)


def _check_layer_values(config: ConfigDict, layers: Sequence[str]) -> None:
    for name in ("layer_rates", "layer_decays"):
        field, pairs = f"optimizer.{name}", config.optimizer[name]
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise UserError(f'{field}: {pair!r} must be a pair like ("fc8", 10.0)')
            layer, value = pair
            _check_layer(field, layer, layers)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"{field}: {value!r} of {layer} must be a number, not below 0")
            if [other for other, _ in pairs].count(layer) > 1:
                raise UserError(f"{field} names twice {layer}; remove one of them")
    for layer, factor in config.optimizer.layer_rates:
        if not factor:
            raise UserError(
                f"optimizer.layer_rates: the factor of {layer} must be above 0; to keep the layer "
                "as it is, name it in freeze"
            )
        if layer in config.freeze:
            raise UserError(
                f"optimizer.layer_rates and freeze both name {layer}; remove one of them"
            )


def _check_layer(field: str, layer: Any, layers: Sequence[str]) -> None:
    if layer not in layers:
        near = difflib.get_close_matches(str(layer), layers) or layers
        raise UserError(f"{field}: unknown layer {layer!r}; the nearest are {', '.join(near)}")


def _check_change(change: Any, frozen: Sequence[str], layers: Sequence[str]) -> None:
    if not isinstance(change, tuple | list) or len(change) != 4:
        raise UserError(f"schedule.changes: {change!r} must be (epoch, layer, field, value)")
    epoch, layer, field, value = change
    if field not in CHANGEABLE:
        near = difflib.get_close_matches(str(field), CHANGEABLE) or CHANGEABLE
        raise UserError(
            f"schedule.changes: unknown field {field!r}; the nearest are {', '.join(near)}"
        )
    allowed = (DATA,) if field in ("color_noise", "crop_size") else (ALL, *layers)
    if layer not in allowed:
        raise UserError(
            f"schedule.changes: {field} cannot change for {layer!r}, only for {', '.join(allowed)}"
        )
    if layer in frozen:
        raise UserError(
            f"schedule.changes: {change!r} has no effect because freeze names {layer}; to freeze "
            "a layer for a time, set its rates to 0 instead"
        )
    if not all(isinstance(number, int | float) for number in (epoch, value)):
        raise UserError(f"schedule.changes: epoch and value of {change!r} must be numbers")
