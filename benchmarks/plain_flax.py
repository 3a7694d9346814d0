"""AlexNet and its training step as one writes them with Flax's and Optax's own parts.

What benchmarks compare ours with: `nn.Conv`, `nn.max_pool`, `nn.Dense`, `optax.sgd`.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import Array
from shapes import FILTERS, GROUPS, NORMED, POOLED, SIZES


class PlainAlexNet(nn.Module):
    """Variant `owt` or `paper` on float[B, 224, 224, 3]; returns float32[B, num_classes]."""

    variant: str = "owt"
    num_classes: int = 1000
    dtype: str = "float32"
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        convs = zip(FILTERS[self.variant], SIZES, GROUPS[self.variant], strict=True)
        for number, (filters, size, groups) in enumerate(convs, start=1):
            x = nn.Conv(
                filters,
                (size, size),
                strides=4 if number == 1 else 1,
                padding=size // 2 if number > 1 else 2,
                feature_group_count=groups,
                dtype=self.dtype,
            )(x)
            x = nn.relu(x)
            if self.variant == "paper" and number in NORMED:
                x = response_norm(x)
            if number in POOLED:
                x = nn.max_pool(x, (3, 3), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            if self.variant == "owt":
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.relu(nn.Dense(4096, dtype=self.dtype)(x))
            if self.variant == "paper":
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


def response_norm(x: Array) -> Array:
    """The paper's local response norm: over 5 channels, k = 2, alpha = 1e-4, beta = 0.75."""
    squares = jnp.square(x.astype(jnp.float32))
    window = (1,) * (x.ndim - 1) + (5,)
    energy = jax.lax.reduce_window(squares, 0.0, jax.lax.add, window, (1,) * x.ndim, "SAME")
    return (x * (2.0 + 1e-4 * energy) ** -0.75).astype(x.dtype)


def init_state(model: PlainAlexNet) -> TrainState:
    """Returns new parameters with SGD of momentum 0.9 and weight decay 0.0005."""
    params = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))
    return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)


def train_step(
    state: TrainState, images: Array, labels: Array, key: Array
) -> tuple[TrainState, Array]:
    """Returns the state after one update, and the mean loss in nats; a pure function.

    Args:
      images: float[B, 224, 224, 3].
      labels: int32[B].
      key: what dropout draws from, together with the step's number.
    """

    def loss_of(params):
        key_now = jax.random.fold_in(key, state.step)
        logits = state.apply_fn({"params": params}, images, train=True, rngs={"dropout": key_now})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss
