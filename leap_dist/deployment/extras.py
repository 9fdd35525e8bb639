"""Libraries that only an export needs."""

from __future__ import annotations

import importlib
from typing import Any

from leap_dist.errors import UserError


def needed(*names: str) -> Any:
    """The first of the named modules, all imported. UserError that says what to install where one is missing."""
    missing = []
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return modules[0]
