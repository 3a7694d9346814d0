"""Reads pickles, of Python 2 too, without calling anything in them: arrays and containers."""

import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alexnet_jax.utils.errors import UserError, one_line


class Inert:
    """Stands for an object of a class that is not allowed, or for the result of a function call.

    It accepts everything that a pickle can do to an object, and ignores it.
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
    """OrderedDict, from `collections` or from the backport module `ordereddict`."""

    def __setstate__(self, state: Any) -> None:
        pass


class PickledDtype:
    """The type code and byte order of a pickled dtype."""

    def __init__(self, code: Any = None, *others: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class PickledArray:
    """The pickled state of an array. NumPy's own `__setstate__` does not check untrusted input."""

    def __init__(self, *args: Any):
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def to_numpy(self) -> np.ndarray:
        """Returns the array.

        Raises:
          ValueError: it does not contain numbers, or its shape and content disagree.
        """
        try:
            _, shape, dtype, is_fortran, content = self._state
            if not (
                re.fullmatch("[fiu][1248]", dtype.code) and re.fullmatch("[<>=|]", dtype.order)
            ):
                raise ValueError("the array does not contain numbers")
            if isinstance(content, str):  # a Python 2 str: bytes
                content = content.encode("latin-1")
            array = np.ndarray(
                shape, np.dtype(dtype.order + dtype.code), content, order="F" if is_fortran else "C"
            )
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(one_line(error)) from error
        if array.nbytes != len(content):
            raise ValueError(f"an array of shape {array.shape} has {len(content)} bytes")
        return array


ALLOWED = {
    ("collections", "OrderedDict"): PlainOrderedDict,
    ("ordereddict", "OrderedDict"): PlainOrderedDict,
    ("numpy", "dtype"): PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
}


class _Unpickler(pickle._Unpickler):
    """The standard library's Python implementation.

    The C implementation allocates as much memory as a pickle claims to need.
    """

    def find_class(self, module: str, name: str) -> type:
        return ALLOWED.get((module, name), Inert)


def load(path: Path, file: BinaryIO | None = None) -> Any:
    """Returns the content of a pickle, with a `PickledArray` for each array.

    Python 2's str becomes str, decoded as Latin-1. Objects of classes that are not in `ALLOWED`
    become `Inert`.

    Args:
      path: of the file, or of the archive that contains it.
      file: the open file, if it is in an archive.

    Raises:
      UserError: the file cannot be read, or is not a complete pickle.
    """
    try:
        with file or path.open("rb") as pickled:
            return _Unpickler(pickled, encoding="latin-1").load()
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise UserError(
            f"{path} cannot be read as a pickle of arrays ({one_line(error)[:100]}); "
            "it is damaged or has another format: copy it again, or see the formats in --help"
        ) from error
