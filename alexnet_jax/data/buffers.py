"""Memory that large arrays of the same size use one after the other."""

import weakref

import numpy as np

ALIGNMENT = 64  # bytes; JAX takes arrays so aligned as they are on CPU, without a copy


class Buffers:
    """Memory for arrays, used again when nobody holds an array in it any more.

    Fresh memory costs a page fault for each 4 KiB, which takes longer than reading into it.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns an aligned uint8 array of any content, free again with its last view."""
        count = int(np.prod(shape))
        free = self._free.setdefault(count, [])
        try:
            buffer = free.pop()
        except IndexError:
            whole = np.empty(count + ALIGNMENT, np.uint8)
            buffer = whole[-whole.ctypes.data % ALIGNMENT :][:count]
        lease = _Lease(buffer)
        weakref.finalize(lease, free.append, buffer).atexit = False
        return np.asarray(lease).reshape(shape)


class _Lease:
    """What NumPy takes for the owner of an array's memory: it lives as long as any view of it."""

    def __init__(self, buffer: np.ndarray):
        self.__array_interface__ = buffer.__array_interface__
