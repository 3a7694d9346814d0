"""Writes pickles as Python 2's cPickle did: byte strings, old-style instances, arrays."""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Global:
    """A class or a function by name; it need not exist."""

    module: str
    name: str


@dataclass(frozen=True)
class Called:
    """The result of a function, pickled as the call."""

    function: Global
    arguments: tuple


@dataclass(frozen=True)
class Built:
    """An object with a state that the pickle sets."""

    instance: Any
    state: Any


@dataclass(frozen=True)
class OldStyle:
    """An instance of a class without bases, as in the 2012 program."""

    kind: Global
    state: Any


@dataclass(frozen=True)
class Dtype:
    """A little-endian NumPy dtype: f4, i8, …"""

    kind: str


class Pickler(pickle._Pickler):
    """The standard library's Python implementation, with the opcodes that Python 2 used."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text: str | bytes) -> None:
        data = text.encode("latin-1") if isinstance(text, str) else text
        if not self.bin:
            self.write(b"S'" + b"".join(b"\\x%02x" % byte for byte in data) + b"'\n")
        elif len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        else:
            self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    def save_named(self, named: Global) -> None:
        self.write(f"c{named.module}\n{named.name}\n".encode())
        self.memoize(named)

    def save_called(self, called: Called) -> None:
        self.save_call(called.function, called.arguments, called)

    def save_call(self, function: Global, arguments: tuple, result: Any, state: Any = None) -> None:
        self.save(function)
        self.save(arguments)
        self.write(pickle.REDUCE)
        self.memoize(result)
        if state is not None:
            self.save(state)
            self.write(pickle.BUILD)

    def save_built(self, built: Built) -> None:
        self.save(built.instance)
        self.save(built.state)
        self.write(pickle.BUILD)

    def save_old_style(self, instance: OldStyle) -> None:
        if self.bin:
            self.write(pickle.MARK)
            self.save(instance.kind)
            self.write(pickle.OBJ)
        else:
            self.write(f"(i{instance.kind.module}\n{instance.kind.name}\n".encode())
        self.memoize(instance)
        self.save(instance.state)
        self.write(pickle.BUILD)

    def save_array(self, array: np.ndarray) -> None:
        is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        dtype = Dtype(array.dtype.str.lstrip("<>|"))
        self.save_call(
            Global("numpy.core.multiarray", "_reconstruct"),
            (Global("numpy", "ndarray"), (0,), "b"),
            array,
            (1, array.shape, dtype, is_fortran, array.tobytes("A")),
        )

    def save_dtype(self, dtype: Dtype) -> None:
        state = (3, "<", None, None, None, -1, -1, 0)
        self.save_call(Global("numpy", "dtype"), (dtype.kind, 0, 1), dtype, state)

    dispatch[str] = dispatch[bytes] = save_str
    dispatch[Global] = save_named
    dispatch[Called] = save_called
    dispatch[Built] = save_built
    dispatch[OldStyle] = save_old_style
    dispatch[np.ndarray] = save_array
    dispatch[Dtype] = save_dtype


def dumps(content: Any, protocol: int = 2) -> bytes:
    """Returns a pickle of plain containers, arrays and the classes above."""
    file = io.BytesIO()
    Pickler(file, protocol).dump(content)
    return file.getvalue()
