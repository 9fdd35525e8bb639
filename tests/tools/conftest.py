"""Lets the tests of this folder import the tools, the unit tests' `stubs` and the distributed tests' `runs`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tools", "tests/unit", "tests/distributed")]
