"""Pickles of plain data, read without running what they ask for: a pickle is a program, and others wrote it.

Plain are numbers, text, bytes, lists, tuples, dicts, sets, and NumPy's arrays and scalars of those. Everything else is
refused by name. NumPy's own functions are not called either: they believe any shape, and a forged dtype makes them take
bytes for pointers.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any, Optional

import numpy as np

from leap_dist.errors import UserError
from leap_dist.runtime.files import read_regular

MOST_BYTES = 4 << 30
_BUILTINS = {
    (package, name): kind
    for package in ("builtins", "__builtin__")
    for name, kind in (("set", set), ("frozenset", frozenset), ("complex", complex))
} | {("collections", "OrderedDict"): collections.OrderedDict}
_KINDS = "biufcSU"  # of a dtype: no objects, no records
_NDARRAY = "ndarray"  # what stands for NumPy's class where a pickle names it


def read_plain_pickle(path: Path, expected: str, encoding: str = "ASCII") -> Any:
    """What the pickle at `path` holds; its arrays are of a class derived from `np.ndarray`.

    expected: what the file should be, for the message. encoding: of texts that Python 2 pickled.

    Raises:
        UserError: it cannot be read, is damaged, or asks for more than plain data.
    """
    try:
        data = read_regular(path, MOST_BYTES)
        _check_memo(data)
        return _PlainUnpickler(io.BytesIO(data), encoding=encoding).load()
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # a hostile or damaged one makes the unpickler raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: {expected} is expected ({reason})") from None


def _check_memo(data: bytes) -> None:
    """Refuse a memo with gaps: Python's unpickler makes room up to the number that an entry gives itself."""
    entries = 0
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name:
            entries += 1
            if argument > entries:
                raise pickle.UnpicklingError(f"its memo has a gap before entry {argument}")


class _Dtype:
    """Stands for a dtype while a pickle describes it."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: Any) -> None:
        self._code, self._order = str(code), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("it holds an array of records")
        self._order = str(state[1])

    def real(self) -> np.dtype:
        """NumPy's own; UnpicklingError unless its elements are numbers or text."""
        dtype = np.dtype(self._code)
        if dtype.kind not in _KINDS:
            raise pickle.UnpicklingError(f"it holds an array of {dtype}")
        return dtype if self._order == "|" else dtype.newbyteorder(self._order)


class _Array(np.ndarray):
    """An array that a pickle fills, with as many elements as it has bytes for."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # as Python 2 pickled it
        real = dtype.real()
        if not isinstance(data, bytes) or math.prod(shape) * real.itemsize != len(data) or min(shape, default=0) < 0:
            raise pickle.UnpicklingError("an array's shape does not fit its bytes")
        super().__setstate__((1, tuple(shape), real, bool(fortran), data))


class _PlainUnpickler(pickle.Unpickler):
    """Finds its own methods where a pickle names functions: these have no attributes that a pickle could set."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BUILTINS:
            return _BUILTINS[module, name]
        mine = {
            ("_codecs", "encode"): self._encode,
            **{(package, "bytes"): self._bytes for package in ("builtins", "__builtin__")},
            **{(package, "bytearray"): self._bytearray for package in ("builtins", "__builtin__")},
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): self._dtype,
            **{
                (f"{package}.{part}", function): method
                for package in ("numpy.core", "numpy._core")
                for part, function, method in (
                    ("multiarray", "_reconstruct", self._reconstruct),
                    ("multiarray", "scalar", self._scalar),
                    ("numeric", "_frombuffer", self._frombuffer),
                )
            },
        }
        if (module, name) not in mine:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no plain data")
        return mine[module, name]

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it asks for the codec {encoding}")
        return text.encode("latin1")

    def _bytes(self) -> bytes:
        return b""  # of a size there would be no end

    def _bytearray(self, content: bytes | str = b"", encoding: str = "latin-1") -> bytearray:
        return bytearray(content if isinstance(content, (bytes, bytearray)) else self._encode(content, encoding))

    def _dtype(self, code: Any, *_: Any) -> _Dtype:
        return _Dtype(code)

    def _reconstruct(self, kind: Any, *_: Any) -> _Array:
        if kind is not _NDARRAY:
            raise pickle.UnpicklingError("it asks for a class of arrays")
        return np.empty(0, np.uint8).view(_Array)

    def _scalar(self, dtype: _Dtype, data: bytes | str) -> Any:
        raw = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(raw, dtype.real(), 1)[0]

    def _frombuffer(self, data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Optional[str] = "C") -> np.ndarray:
        return np.frombuffer(bytes(data), dtype.real()).reshape(shape, order=order)
