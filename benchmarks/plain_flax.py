"""AlexNet and its training step as one writes them with Flax's and Optax's own parts.

The baseline of train_step.py and compiled.py: `nn.Conv`, `nn.max_pool`, `nn.Dense`, `optax.sgd`.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import Array

# (filters, kernel size, groups) of conv1 to conv5
CONVOLUTIONS = {
    "owt": ((64, 11, 1), (192, 5, 1), (384, 3, 1), (256, 3, 1), (256, 3, 1)),
    "paper": ((96, 11, 1), (256, 5, 2), (384, 3, 1), (384, 3, 2), (256, 3, 2)),
}


class PlainAlexNet(nn.Module):
    """Variant `owt` or `paper` on float[B, 224, 224, 3]; returns float32[B, num_classes]."""

    variant: str = "owt"
    num_classes: int = 1000
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for number, (filters, size, groups) in enumerate(CONVOLUTIONS[self.variant], start=1):
            x = nn.Conv(
                filters,
                (size, size),
                strides=4 if number == 1 else 1,
                padding=2 if number == 1 else size // 2,
                feature_group_count=groups,
                dtype=self.dtype,
            )(x)
            x = nn.relu(x)
            if self.variant == "paper" and number in (1, 2):
                x = local_response_norm(x)
            if number in (1, 2, 5):
                x = nn.max_pool(x, (3, 3), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            if self.variant == "owt":
                x = nn.Dropout(0.5, deterministic=not train)(x)
            x = nn.relu(nn.Dense(4096, dtype=self.dtype)(x))
            if self.variant == "paper":
                x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


def local_response_norm(x: Array) -> Array:
    """The paper's section 3.3: over 5 channels, k = 2, alpha = 1e-4, beta = 0.75."""
    squares = jnp.square(x.astype(jnp.float32))
    sums = jax.lax.reduce_window(squares, 0.0, jax.lax.add, (1, 1, 1, 5), (1,) * 4, "SAME")
    return (x * (2.0 + 1e-4 * sums) ** -0.75).astype(x.dtype)


def init_state(model: PlainAlexNet) -> TrainState:
    """Returns new parameters with SGD, momentum 0.9 and weight decay 0.0005."""
    params = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def train_step(
    state: TrainState, images: Array, labels: Array, key: Array
) -> tuple[TrainState, Array]:
    """Returns the state after one update, and the mean loss in nats; a pure function.

    Args:
      images: float[B, 224, 224, 3].
      labels: int32[B].
      key: folded with the step number to draw the dropout masks.
    """

    def loss_fn(params):
        dropout_key = jax.random.fold_in(key, state.step)
        logits = state.apply_fn(
            {"params": params}, images, train=True, rngs={"dropout": dropout_key}
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss
