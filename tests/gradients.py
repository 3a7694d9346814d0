"""A function's output and its gradients, compiled, since op by op Winograd's sums are slow."""

import jax


def output_and_gradients(f, *inputs):
    """The output, and the gradients of all inputs that belong to random ones of the output."""

    @jax.jit
    def both(*inputs):
        y, vjp = jax.vjp(f, *inputs)
        return y, *vjp(jax.random.normal(jax.random.key(0), y.shape, y.dtype))

    return both(*inputs)
