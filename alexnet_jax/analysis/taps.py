"""What a network computes between any two of its operations: responses, edits and gradients.

All functions are pure: they take the parameters as an argument and run under `jax.jit`, `jax.vmap`
and `jax.grad`. Names are those of `models.names`: ours, torchvision's, Caffe's and the paper's.

Example:
  >>> found = responses(model, variables, images, ["features.11", "relu7"])
  >>> without = responses(model, variables, images, ["fc8"], {"conv5": set_units([3, 7], 0.0)})
  >>> slope = gradients(model, variables, images, ("fc8", lambda x: x[:, 3].sum()), ["relu5"])
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from alexnet_jax.models.alexnet import NO_EDITS, AlexNet, Edits
from alexnet_jax.models.names import PROB, find_tap, taps
from alexnet_jax.utils.errors import UserError


def responses(
    model: AlexNet,
    variables: Mapping[str, Any],
    x: Float[Array, "B S S C"],
    names: Sequence[str],
    edits: Edits = NO_EDITS,
) -> dict[str, Float[Array, "B ..."]]:
    """Returns the values at taps, by the names that were given.

    Args:
      x: images as the network sees them, mean subtracted.
      edits: functions from the values at a tap to those that the network goes on with, by name. The
        taps after it, and the tap itself, have the changed values.

    Raises:
      UserError: the network has no such tap, or the images are too small.
    """
    wanted = {name: find_tap(model.variant, name) for name in names}
    changed: dict[str, Callable[[Array], Array]] = {}
    for name, edit in edits.items():
        tap = find_tap(model.variant, name)
        if tap == PROB or tap in changed:
            fault = "follows the last layer" if tap == PROB else "is named twice"
            raise UserError(f"the edit of {name} cannot be made: {tap} {fault}; edit another layer")
        changed[tap] = edit
    features = tuple(dict.fromkeys(tap for tap in wanted.values() if tap != PROB))
    found: Any = model.apply(dict(variables), x, features=features, edits=changed)
    logits, outputs = found if features else (found, {})
    if PROB in wanted.values():
        outputs = {**outputs, PROB: jax.nn.softmax(logits)}
    return {name: outputs[tap] for name, tap in wanted.items()}


def set_units(units: Sequence[int], value: float) -> Callable[[Array], Array]:
    """Returns an edit that sets maps (or units, from fc6 on) to a value; 0 ablates them."""
    return lambda x: x.at[..., jnp.asarray(units)].set(value)


def gradients(
    model: AlexNet,
    variables: Mapping[str, Any],
    x: Float[Array, "B S S C"],
    of: tuple[str, Callable[[Array], Array]],
    to: Sequence[str],
    edits: Edits = NO_EDITS,
) -> dict[str, Float[Array, "B ..."]]:
    """Returns the gradient of a function of one tap with respect to the values at others.

    Args:
      of: a tap, and a function from its values to a number. To have the gradient of each image, the
        number is a sum over the batch.
      to: taps before it, or the same; "input" for the images.
      edits: as in `responses`. Gradients are with respect to the changed values.

    Raises:
      UserError: the network has no such tap, or one of `to` comes after `of`.
    """
    source, objective = of
    order = taps(model.variant)
    before = order[: order.index(find_tap(model.variant, source)) + 1]
    sources = {name: find_tap(model.variant, name) for name in to}
    for name, tap in sources.items():
        if tap not in before or tap == PROB:
            raise UserError(
                f"there is no gradient of {source} to {name}, which comes after it; name a layer "
                f"from input to {source}"
            )
    changes = {find_tap(model.variant, name): edit for name, edit in edits.items()}

    # The gradient to a number that is added to a value is the gradient to the value.
    def added(deltas: dict[str, Array]) -> Edits:
        def with_delta(tap: str) -> Callable[[Array], Array]:
            edit = changes.get(tap)
            return lambda x: (edit(x) if edit else x) + deltas[tap]

        return {**changes, **{tap: with_delta(tap) for tap in deltas}}

    def value(deltas: dict[str, Array]) -> Array:
        return objective(responses(model, variables, x, [source], added(deltas))[source])

    needed = tuple(dict.fromkeys(sources.values()))
    shapes = jax.eval_shape(lambda x: responses(model, variables, x, needed, edits), x)
    zeros = {tap: jnp.zeros(shape.shape, shape.dtype) for tap, shape in shapes.items()}
    found = jax.grad(value)(zeros)
    return {name: found[tap] for name, tap in sources.items()}
