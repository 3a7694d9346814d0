"""Outputs and gradients of a function, compiled because Winograd's sums are slow op by op."""

import jax


def output_and_gradients(f, *inputs):
    """Returns the output and, for a random gradient of it, the gradients of all inputs."""

    @jax.jit
    def both(*inputs):
        y, vjp = jax.vjp(f, *inputs)
        return y, *vjp(jax.random.normal(jax.random.key(0), y.shape, y.dtype))

    return both(*inputs)
