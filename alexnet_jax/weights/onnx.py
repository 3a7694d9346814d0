"""Converts a JAX function to an ONNX model with jax2onnx, for onnxruntime.

Works around what jax2onnx 0.17 or onnxruntime 1.32 does not support, see `_replace`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax2onnx
from flax import linen as nn
from jax import Array
from jax.extend.core import JaxprEqn, Literal


def convert(function: Callable[[Array], Array], shape: tuple[int, ...]) -> Any:
    """Returns the onnx.ModelProto of a function of uint8[batch, *shape], for any batch size.

    Its input is named "images", its output "probabilities". Where the function has several forms
    for different platforms (`jax.lax.platform_dependent`), the model has the default form.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)
    # Traced before jax2onnx replaces Flax's layers by its own for tracing.
    traced = jax.make_jaxpr(function)(images)
    return jax2onnx.to_onnx(
        lambda x: _evaluate(traced, [x])[0],
        [images],
        model_name="alexnet",
        input_names=["images"],
        output_names=["probabilities"],
    )


def _evaluate(closed: Any, args: Sequence[Array]) -> list[Array]:
    """Evaluates a closed jaxpr, with some of its operations replaced."""
    jaxpr = closed.jaxpr
    values: dict[Any, Array] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)

    def value(atom: Any) -> Array:
        known: Array = atom.val if isinstance(atom, Literal) else values[atom]
        return known

    for equation in jaxpr.eqns:
        outputs = _replace(equation, [value(atom) for atom in equation.invars])
        values |= zip(equation.outvars, outputs, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _replace(equation: JaxprEqn, inputs: list[Array]) -> list[Array]:
    params = equation.params
    match equation.primitive.name:
        # jax.lax.platform_dependent is a cond on the platform's index.
        case "platform_index":
            return [jnp.int32(0)]  # not used
        case "cond" if params["branches_platforms"]:
            default = params["branches_platforms"].index(None)
            return _evaluate(params["branches"][default], inputs[1:])
        case "jit":
            return _evaluate(params["jaxpr"], inputs)
        case "custom_vjp_call" | "custom_jvp_call":
            return _evaluate(params["call_jaxpr"], inputs)
        case "scan":  # the body of an onnxruntime loop cannot contain the weights
            return _unroll(params, inputs)
        case "pad":  # jax2onnx cannot pad arrays with a symbolic size
            x, value = inputs
            return [_pad(x, value, [pad[:2] for pad in params["padding_config"]])]
        case "reduce_window_max":  # onnxruntime cannot pool over all four axes
            return [_max_pool(params, *inputs)]
    outputs = equation.primitive.bind(*inputs, **params)
    return outputs if equation.primitive.multiple_results else [outputs]


def _unroll(params: dict[str, Any], inputs: list[Array]) -> list[Array]:
    """Evaluates a scan without a carry, which is what `jax.lax.map` makes."""
    consts, stacked = inputs[: params["num_consts"]], inputs[params["num_consts"] :]
    rows = []
    for index in range(params["length"]):
        row = [jax.lax.index_in_dim(x, index, keepdims=False) for x in stacked]
        rows.append(_evaluate(params["jaxpr"], [*consts, *row]))
    return [
        jax.lax.concatenate([jax.lax.expand_dims(y, (0,)) for y in ys], 0)
        for ys in zip(*rows, strict=True)
    ]


def _max_pool(params: dict[str, Any], x: Array) -> Array:
    padded = _pad(x, jnp.asarray(-jnp.inf, x.dtype), params["padding"])
    # jax2onnx converts calls of this Flax function, and needs its arguments by name.
    pooled: Array = nn.max_pool(
        padded,
        window_shape=params["window_dimensions"][1:3],
        strides=params["window_strides"][1:3],
        padding="VALID",
    )
    return pooled


def _pad(x: Array, value: Array, padding: Sequence[tuple[int, int]]) -> Array:
    """Pads with concatenations."""
    for axis, sizes in enumerate(padding):
        before, after = (
            jax.lax.broadcast(value, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
            for size in sizes
        )
        parts = [part for part in (before, x, after) if part.shape[axis] != 0]
        x = jax.lax.concatenate(parts, axis) if len(parts) > 1 else x
    return x
