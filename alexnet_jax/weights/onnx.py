"""A JAX function as an ONNX model, by jax2onnx, in operations that onnxruntime has."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax2onnx
from flax import linen as nn
from jax import Array
from jax.extend.core import JaxprEqn, Literal

Function = Callable[[Array], Array]
Padding = Sequence[tuple[int, int]]


def convert(function: Function, shape: tuple[int, ...]) -> Any:
    """Returns the onnx.ModelProto of a function of uint8[batch, *shape], for every batch.

    Its input is called "images", its output "probabilities". Of what the function does by backend
    it has what is no backend's own.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)
    # Traced here, since jax2onnx would put its own layers in the place of Flax's.
    traced = jax.make_jaxpr(function)(images)
    return jax2onnx.to_onnx(
        lambda x: _results(traced, [x])[0],
        [images],
        model_name="alexnet",
        input_names=["images"],
        output_names=["probabilities"],
    )


def _results(closed: Any, args: Sequence[Array]) -> list[Array]:
    """Computes a jaxpr, in other operations where jax2onnx 0.17 or onnxruntime 1.32 lack one."""
    jaxpr = closed.jaxpr
    values: dict[Any, Array] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)

    def value(atom: Any) -> Array:
        known: Array = atom.val if isinstance(atom, Literal) else values[atom]
        return known

    for equation in jaxpr.eqns:
        outputs = _outputs(equation, [value(atom) for atom in equation.invars])
        values |= zip(equation.outvars, outputs, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _outputs(equation: JaxprEqn, inputs: list[Array]) -> list[Array]:
    params = equation.params
    match equation.primitive.name:
        case "platform_index":
            return [jnp.int32(0)]  # not read
        case "cond" if params["branches_platforms"]:
            default = params["branches_platforms"].index(None)
            return _results(params["branches"][default], inputs[1:])
        case "jit":
            return _results(params["jaxpr"], inputs)
        case "custom_vjp_call" | "custom_jvp_call":
            return _results(params["call_jaxpr"], inputs)
        case "scan":
            return _unrolled(params, inputs)
        case "pad":  # jax2onnx's takes no symbolic size
            x, value = inputs
            return [_padded(x, value, [pad[:2] for pad in params["padding_config"]])]
        case "reduce_window_max":  # onnxruntime's takes no window over all four axes
            return [_max_pooled(params, *inputs)]
    outputs = equation.primitive.bind(*inputs, **params)
    return outputs if equation.primitive.multiple_results else [outputs]


def _unrolled(params: dict[str, Any], inputs: list[Array]) -> list[Array]:
    """A scan that carries nothing, as `jax.lax.map` makes: onnxruntime's loops hold no weights."""
    consts, stacked = inputs[: params["num_consts"]], inputs[params["num_consts"] :]
    rows = []
    for number in range(params["length"]):
        row = [jax.lax.index_in_dim(x, number, keepdims=False) for x in stacked]
        rows.append(_results(params["jaxpr"], [*consts, *row]))
    return [
        jax.lax.concatenate([jax.lax.expand_dims(y, (0,)) for y in ys], 0)
        for ys in zip(*rows, strict=True)
    ]


def _max_pooled(params: dict[str, Any], x: Array) -> Array:
    padded = _padded(x, jnp.asarray(-jnp.inf, x.dtype), params["padding"])
    # jax2onnx takes this function of Flax's for an operation, and its arguments by name only.
    pooled: Array = nn.max_pool(
        padded,
        window_shape=params["window_dimensions"][1:3],
        strides=params["window_strides"][1:3],
        padding="VALID",
    )
    return pooled


def _padded(x: Array, value: Array, padding: Padding) -> Array:
    for axis, pads in enumerate(padding):
        rims = [
            jax.lax.broadcast(value, (*x.shape[:axis], pad, *x.shape[axis + 1 :])) for pad in pads
        ]
        parts = [part for part in (rims[0], x, rims[1]) if part.shape[axis] != 0]
        x = jax.lax.concatenate(parts, axis) if len(parts) > 1 else x
    return x
