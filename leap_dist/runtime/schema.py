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
    if shape is Any:
        return None
    if dataclasses.is_dataclass(shape):
        return _misfit_of_fields(value, shape)
    origin, inner = get_origin(shape), get_args(shape)
    if origin in (Union, types.UnionType):
        faults = [misfit(value, one) for one in inner]
        return None if None in faults else faults[0]
    kind = origin or shape
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
    hints = get_type_hints(shape)
    for field in dataclasses.fields(shape):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if field.name not in value and not optional:
            return f"{field.name} is missing"
    return _first((key, value[key], hint) for key, hint in hints.items() if key in value)


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
