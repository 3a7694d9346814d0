"""Python 2's pickles as data: NumPy arrays and plain containers; nothing in one is ever called."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.utils.errors import UserError, one_line


class Inert:
    """An object of a class that is not admitted, or what a function would have returned.

    It takes all that a pickle does to an object, and does nothing.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class PlainOrderedDict(dict[Any, Any]):
    """OrderedDict, of Python's or of the module that came before it."""

    def __setstate__(self, state: Any) -> None:
        pass


class PickledDtype:
    """What a pickle tells of a dtype."""

    def __init__(self, code: Any = None, *others: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class PickledArray:
    """What a pickle tells of an array. It is not NumPy that reads it, whose own can be deceived."""

    def __init__(self, *args: Any):
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def array(self) -> np.ndarray:
        """Returns the array. Raises ValueError if it is not one of numbers, or is damaged."""
        try:
            _, shape, dtype, is_fortran, content = self._state
            if not re.fullmatch("[fiu][1248]", dtype.code) or not re.fullmatch(
                "[<>=|]", dtype.order
            ):
                raise ValueError("it holds no numbers")
            if isinstance(content, str):  # Python 2's bytes
                content = content.encode("latin-1")
            array = np.ndarray(
                shape, np.dtype(dtype.order + dtype.code), content, order="F" if is_fortran else "C"
            )
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(one_line(error)) from error
        if array.nbytes != len(content):
            raise ValueError(f"{len(content)} bytes are no array of shape {array.shape}")
        return array


ADMITTED = {
    ("collections", "OrderedDict"): PlainOrderedDict,
    ("ordereddict", "OrderedDict"): PlainOrderedDict,
    ("numpy", "dtype"): PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
}


class _Unpickler(pickle._Unpickler):
    """Python's own in Python: that in C fills as much memory as a pickle says it will use."""

    def find_class(self, module: str, name: str) -> type:
        return ADMITTED.get((module, name), Inert)


def load(path: Path) -> Any:
    """Returns a pickle's content, with a `PickledArray` for each array and Python 2's str as str.

    Objects of other classes become `Inert`. Raises UserError if it is no whole pickle.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="latin-1").load()
    except Exception as error:  # damaged or hostile, anything can be
        raise UserError(
            f"{path} cannot be read as a Python 2 pickle ({one_line(error)[:100]}): it is damaged, "
            "or of another kind"
        ) from error
