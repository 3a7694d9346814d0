"""Memory is used again when nobody sees it any more, and never before."""

import jax
import numpy as np

from alexnet_jax.data.buffers import Buffers


def address(array):
    return array.__array_interface__["data"][0]


def test_a_batchs_memory_is_used_again_when_its_last_view_is_gone():
    buffers = Buffers()
    batch = buffers.take((4, 8, 8, 3))
    place, view = address(batch), batch[1:].reshape(3, -1)
    assert place % 64 == 0
    del batch
    assert address(buffers.take((4, 8, 8, 3))) != place
    del view
    assert address(buffers.take((4, 8, 8, 3))) == place


def test_arrays_that_jax_made_of_a_batch_keep_their_values():
    """JAX does not copy an aligned array on CPU: it must hold the memory back itself."""
    buffers = Buffers()
    for _ in range(3):
        batch = buffers.take((4, 8, 8, 3))
        batch[:] = 7
        placed = jax.device_put(batch)
        del batch
        buffers.take((4, 8, 8, 3))[:] = 9
        assert (np.asarray(placed) == 7).all()
        del placed
