"""The paper's SGD and LARS as Optax chains, and every field that changes while training runs.

A config's schedule is data: a kind ("steps", "plateau", …) that drives `learning_rate`, and a log
of changes, each (epoch, layer, field, value), that overrides it from that epoch on.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from alexnet_jax.config import check_bounds
from alexnet_jax.models.alexnet import LAYERS
from alexnet_jax.utils.errors import UserError

Params = dict[str, Any]
Rates = dict[str, dict[str, jax.Array]]

OPTIMIZERS = ("sgd", "lars")
# What multiplies the learning rate, as a function of k = batch_size / scaling_batch_size.
SCALINGS: dict[str, Callable[[float], float]] = {
    "none": lambda k: 1.0,
    "linear": lambda k: k,
    "sqrt": math.sqrt,
}
OTHERS = "others"  # layers that optimizer.layer_rates does not name
CHANGEABLE = {
    "learning_rate": ("all", *LAYERS),
    "bias_learning_rate": ("all", *LAYERS),
    "color_noise": ("data",),
}


class Scheduled(NamedTuple):
    """The values that hold at one step.

    Attributes:
      rates: for each layer, {"learning_rate": float32[], "bias_learning_rate": float32[]}.
      learning_rate: float32[], the one that is shown: what the schedule's kind and the changes
        to "all" layers give.
      color_noise: float32[].
    """

    rates: Rates
    learning_rate: jax.Array
    color_noise: jax.Array


Step = jax.Array | int
Rate = Callable[[Step], jax.Array]
Schedule = Callable[[Step, jax.Array], Scheduled]


def make_schedule(config: ConfigDict, steps_per_epoch: float) -> Schedule:
    """Returns `schedule(step, plateau_scale) -> Scheduled`, a pure function.

    `step` is int32[], `plateau_scale` the float32[] of the plateau state. Raises UserError for an
    unknown kind of schedule, scaling or optimizer, for a number out of its bounds, and for a
    change that names what does not exist.
    """
    check(config)
    base = _base_rate(config, steps_per_epoch)
    for change in config.schedule.changes:
        _check_change(change, config.freeze)

    def changed(step: Step, layers: tuple[str, ...], field: str, value: jax.Array) -> jax.Array:
        for epoch, layer, changed_field, new in config.schedule.changes:
            if changed_field == field and layer in layers:
                value = jnp.where(step >= math.ceil(epoch * steps_per_epoch), new, value)
        return jnp.asarray(value, jnp.float32)

    def schedule(step: Step, plateau_scale: jax.Array) -> Scheduled:
        rate = base(step) * plateau_scale
        bias_rate = rate * config.optimizer.bias_learning_rate
        rates = {
            layer: {
                "learning_rate": changed(step, ("all", layer), "learning_rate", rate),
                "bias_learning_rate": changed(
                    step, ("all", layer), "bias_learning_rate", bias_rate
                ),
            }
            for layer in LAYERS
        }
        noise = changed(step, ("data",), "color_noise", config.augment.color_noise)
        return Scheduled(rates, changed(step, ("all",), "learning_rate", rate), noise)

    return schedule


def check(config: ConfigDict) -> None:
    """Raises UserError for an optimizer, scaling or layer that does not exist, or a bad number."""
    check_bounds(config)  # first: batch sizes of 0 or less cannot be divided by, or have no root
    _check_layers(config)
    for name, kind, kinds in (
        ("optimizer.kind", config.optimizer.kind, OPTIMIZERS),
        ("schedule.scaling", config.schedule.scaling, SCALINGS),
    ):
        if kind not in kinds:
            raise UserError(f"{name}={kind!r}; it can be {', '.join(kinds)}")


def scaled_rate(config: ConfigDict) -> float:
    """Returns `learning_rate`, which holds at `scaling_batch_size` images, for `batch_size`.

    Krizhevsky 2014 (arXiv 1404.5997), section 5: a batch k times as large asks for √k times the
    rate in theory, and for k times in practice. Goyal et al. 2017 (arXiv 1706.02677) take k.
    """
    times = config.batch_size / config.schedule.scaling_batch_size
    rate: float = config.learning_rate
    return rate * SCALINGS[config.schedule.scaling](times)


def _base_rate(config: ConfigDict, steps_per_epoch: float) -> Rate:
    fields, rate = config.schedule, scaled_rate(config)
    if not all(isinstance(epoch, int | float) for epoch in fields.step_epochs):
        raise UserError(f"schedule.step_epochs={fields.step_epochs} must be numbers")
    warmup_steps = round(fields.warmup_epochs * steps_per_epoch)
    decay_steps = max(1, math.ceil(config.num_epochs * steps_per_epoch) - warmup_steps)
    kinds: dict[str, Callable[[], Rate]] = {
        "constant": lambda: optax.constant_schedule(rate),
        "plateau": lambda: optax.constant_schedule(rate),
        "steps": lambda: optax.piecewise_constant_schedule(
            rate,
            {
                math.ceil(epoch * steps_per_epoch) - warmup_steps: fields.factor
                for epoch in fields.step_epochs
            },
        ),
        "cosine": lambda: optax.cosine_decay_schedule(rate, decay_steps),
        "polynomial": lambda: optax.polynomial_schedule(rate, 0.0, fields.power, decay_steps),
    }
    if fields.kind not in kinds:
        raise UserError(f"schedule.kind={fields.kind!r}; it can be {', '.join(kinds)}")
    if not warmup_steps:
        return kinds[fields.kind]()
    warmup = optax.linear_schedule(0.0, rate, warmup_steps)
    joined: Rate = optax.join_schedules([warmup, kinds[fields.kind]()], [warmup_steps])
    return joined


def _check_layers(config: ConfigDict) -> None:
    for layer in config.freeze:
        _check_layer("freeze", layer)
    if set(config.freeze) == set(LAYERS):
        raise UserError("freeze names all layers, so that none would train; leave one out")
    rates = config.optimizer.layer_rates
    for pair in rates:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(f'optimizer.layer_rates: {pair!r} must be a pair like ("fc8", 10.0)')
        layer, times = pair
        _check_layer("optimizer.layer_rates", layer)
        if not isinstance(times, int | float) or not 0 < times < math.inf:
            raise UserError(
                f"optimizer.layer_rates: {layer}'s {times!r} must be a number above 0; to keep "
                "the layer as it is, name it in freeze"
            )
        if layer in config.freeze or [other for other, _ in rates].count(layer) > 1:
            where = "in freeze as well" if layer in config.freeze else "twice"
            raise UserError(f"optimizer.layer_rates names {layer}, {where}; take one out")


def _check_layer(field: str, layer: Any) -> None:
    if layer not in LAYERS:
        near = difflib.get_close_matches(str(layer), LAYERS) or LAYERS
        raise UserError(f"{field}: no layer {layer!r}; the nearest are {', '.join(near)}")


def _check_change(change: Any, frozen: tuple[str, ...]) -> None:
    if not isinstance(change, tuple | list) or len(change) != 4:
        raise UserError(f"schedule.changes: {change!r} must be (epoch, layer, field, value)")
    epoch, layer, field, value = change
    if field not in CHANGEABLE:
        near = difflib.get_close_matches(str(field), CHANGEABLE) or list(CHANGEABLE)
        raise UserError(f"schedule.changes: no field {field!r}; the nearest are {', '.join(near)}")
    if layer not in CHANGEABLE[field]:
        raise UserError(
            f"schedule.changes: {field} cannot change for {layer!r}, only for "
            f"{', '.join(CHANGEABLE[field])}"
        )
    if layer in frozen:
        raise UserError(
            f"schedule.changes: {change!r} has no effect, since freeze names {layer}; to freeze a "
            "layer for a time, change its rates to 0 instead"
        )
    if not all(isinstance(number, int | float) for number in (epoch, value)):
        raise UserError(f"schedule.changes: epoch and value of {change!r} must be numbers")


def plateau(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """Divides its state's `scale` when validation error stops improving (paper, section 5).

    Call `update({}, state, value=error)` once after each evaluation. With another kind of
    schedule nobody does, and the scale stays 1.
    """
    fields = config.schedule
    return optax.contrib.reduce_on_plateau(
        factor=fields.factor,
        patience=fields.patience,
        min_scale=fields.factor**fields.max_drops,
    )


def sgd(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """The paper's update, section 5: v ← 0.9 v − 0.0005 ε w − ε ∇;  w ← w + v.

    The learning rate ε is inside the velocity, and scales the weight decay with it. `update` takes
    `rates`, the ε of every layer's weights and biases (`Scheduled.rates`).

    The kind "lars" is the same with every weight array's ε times a ratio of its own, 0.001 ‖w‖ /
    ‖∇ + 0.0005 w‖: optax.lars, after You, Gitman, Ginsburg 2017 (arXiv 1708.03888), who divide by
    ‖∇‖ + 0.0005 ‖w‖, which is never less. Biases and batch norm go without the ratio.

    `optimizer.layer_rates` multiplies a layer's ε, whatever the schedule makes of it.
    """
    fields = config.optimizer
    trust = optax.masked(
        optax.scale_by_trust_ratio(trust_coefficient=fields.trust_coefficient), _is_weight
    )
    return optax.chain(
        optax.clip_by_global_norm(fields.clip_norm) if fields.clip_norm else optax.identity(),
        optax.add_decayed_weights(fields.weight_decay, mask=_is_weight),
        optax.add_decayed_weights(
            fields.bias_weight_decay, mask=lambda p: jax.tree.map(lambda w: not w, _is_weight(p))
        ),
        *([trust] if fields.kind == "lars" else []),
        *([_scaled_by_layer(fields.layer_rates)] if fields.layer_rates else []),
        _momentum(fields.momentum),
    )


def trainable(params: Params, freeze: tuple[str, ...]) -> Params:
    """Returns those of a dict by layer that train: all but the frozen, and the norms of these."""
    return {name: arrays for name, arrays in params.items() if layer_of(name) not in freeze}


def layer_of(name: str) -> str:
    """Returns the layer of LAYERS that a key of params belongs to: "conv1" has bn1 too."""
    return name.replace("bn", "conv")


def _scaled_by_layer(
    layer_rates: Sequence[tuple[str, float]],
) -> optax.GradientTransformationExtraArgs:
    """ε · (times u) is (ε · times) u, so what multiplies the rate may as well multiply the step."""
    scales = {layer: optax.scale(times) for layer, times in layer_rates}

    def label(path: tuple[Any, ...], _: jax.Array) -> str:
        layer = layer_of(path[0].key)
        return layer if layer in scales else OTHERS

    return optax.multi_transform(
        {**scales, OTHERS: optax.identity()},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def _momentum(momentum: float) -> optax.GradientTransformationExtraArgs:
    """v ← momentum · v − ε · u, with one ε for each array; ε = 0 leaves v as it is and w fixed.

    optax.trace would let a frozen layer coast on: the released program skips its update whole.
    """

    def init(params: Params) -> optax.TraceState:
        return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Params,
        state: optax.TraceState,
        params: Params | None = None,
        *,
        rates: Rates,
        **_: Any,
    ) -> tuple[Params, optax.TraceState]:
        del params
        rates = jax.tree_util.tree_map_with_path(lambda path, _: _rate_of(path, rates), updates)
        velocity = jax.tree.map(
            lambda v, u, rate: jnp.where(rate > 0, momentum * v - rate * u, v),
            state.trace,
            updates,
            rates,
        )
        steps = jax.tree.map(lambda v, rate: jnp.where(rate > 0, v, 0.0), velocity, rates)
        return steps, optax.TraceState(trace=velocity)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_weight(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _rate_of(path: tuple[Any, ...], rates: Rates) -> jax.Array:
    """A layer's batch norm, bn1 to bn5, goes with its biases."""
    layer = layer_of(path[0].key)
    return rates[layer]["learning_rate" if path[-1].key == "kernel" else "bias_learning_rate"]
