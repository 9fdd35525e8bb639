"""Whether plain data, as JSON gives it, has the shape that a dataclass says: the check of every file that is read.

    @dataclass(frozen=True)
    class Shard:
        samples: int
        hashes: dict[str, str] = field(default_factory=dict)

    misfit({"samples": "7"}, Shard)        # "samples: a whole number is expected, not '7'"

A field without a default must be there. Keys that are no fields are passed over: a newer version may have added them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from typing import Any, Optional, Union, get_args, get_origin, get_type_hints

QUOTED = 60  # characters of a file that a message repeats
LARGEST = 2**63  # what no count, size or step comes to
_WORDS = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a table", list: "a list",
}  # fmt: skip


def misfit(value: Any, shape: Any) -> Optional[str]:
    """What in `value` does not have the shape, in a few words; None if all does.

    shape: a dataclass, int, float, str, bool, None, Any, or a list, dict by texts, Optional or Union of such.
    """
    kind, inner = _anatomy(shape)
    if kind is Any:
        return None
    if kind is dataclasses:
        return _misfit_of_fields(value, shape)
    if kind is Union:
        faults = []
        for one in inner:
            if (fault := misfit(value, one)) is None:
                return None
            faults.append(fault)
        return faults[0]
    if not _is_a(value, kind):
        return f"{_WORDS.get(kind, 'null')} is expected, not {quoted(value)}"
    if kind is list and inner:
        return _first((str(index), item, inner[0]) for index, item in enumerate(value))
    if kind is dict and inner:
        return _first((quoted(key), item, inner[1]) for key, item in value.items())
    return None


def quoted(value: Any) -> str:
    """As it is to be read in a message: never long, never more than one line."""
    text = repr(value[:QUOTED] if isinstance(value, (str, bytes)) else value if _is_short(value) else type(value))
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def _is_short(value: Any) -> bool:
    return isinstance(value, (bool, float, type(None))) or (isinstance(value, int) and abs(value) < LARGEST)


def _misfit_of_fields(value: Any, shape: Any) -> Optional[str]:
    if not isinstance(value, dict):
        return f"a table is expected, not {quoted(value)}"
    hints, needed = _fields(shape)
    for name in needed:
        if name not in value:
            return f"{name} is missing"
    for name, hint in hints.items():
        if name in value and (fault := misfit(value[name], hint)):
            return f"{name}: {fault}"
    return None


@functools.cache  # as a ledger may have a million lines
def _anatomy(shape: Any) -> tuple[Any, tuple[Any, ...]]:
    """What a shape is, `dataclasses` standing for any dataclass, and the shapes inside it."""
    if dataclasses.is_dataclass(shape):
        return dataclasses, ()
    origin = get_origin(shape) or shape
    return Union if origin is types.UnionType else origin, get_args(shape)


@functools.cache
def _fields(shape: Any) -> tuple[dict[str, Any], list[str]]:
    """The shapes of a dataclass's fields, and the names of those that must be there."""
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [field.name for field in dataclasses.fields(shape) if (field.default, field.default_factory) == missing]
    return get_type_hints(shape), needed


def _first(parts: Any) -> Optional[str]:
    """The first misfit among (name, value, shape)."""
    for name, value, shape in parts:
        fault = misfit(value, shape)
        if fault:
            return f"{name}: {fault}"
    return None


def _is_a(value: Any, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
    if kind is float:
        return _is_a(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind)
