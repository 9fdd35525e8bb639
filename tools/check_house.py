"""House rules that a linter does not know: short rooms, arrows that run one way, one door for collectives.

python tools/check_house.py        prints what breaks a rule and exits with 1, or exits with 0
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FUNCTION = 60  # the model codebases keep 90 % of theirs under 63 lines
LONGEST_FILE = 600
# Each layer may import from those after it, never from those before; within a layer there are no cycles.
LAYERS = [
    {"train"},
    {"assembly", "wrapup"},
    {"trainer", "pretraining"},
    {
        "analysis",
        "checkpoint",
        "coordinator",
        "data",
        "engine",
        "evaluation",
        "export",
        "lookahead",
        "objective",
        "optim",
        "heartbeat",
        "journal",
        "reset",
        "spectroscope",
        "telemetry",
        "validation",
    },
    {
        "accounting",
        "claim",
        "curriculum",
        "dashboard",
        "evidence",
        "heads",
        "ledger",
        "profiling",
        "teacher",
        "universal",
    },
    {"flops"},
    {"student"},
    {"alignment", "backbone", "losses", "planning"},
    {"distributed", "features", "files", "host_copy", "progress", "timing"},
    {"allocator", "config"},
    {"errors"},
]
# Files that may import from torch.distributed, and what. The pipeline's sends are torch's, inside its schedule.
DOORS = {
    ("leap_dist/distributed.py", "torch.distributed"),
    ("leap_dist/teacher/pipelined.py", "torch.distributed.pipelining"),
}


def main() -> int:
    """Check every module; return the exit status."""
    broken = [line for path in sources() for line in problems(path)]
    print("\n".join(broken) if broken else "house rules hold")
    return 1 if broken else 0


def sources() -> list[Path]:
    """Python files of the packages and tools."""
    return sorted(path for folder in ("leap_dist", "kernels", "tools") for path in (ROOT / folder).rglob("*.py"))


def problems(path: Path) -> Iterator[str]:
    """What in one file breaks a rule, a line each."""
    name = path.relative_to(ROOT)
    text = path.read_text()
    tree = ast.parse(text)
    if text.count("\n") > LONGEST_FILE:
        yield f"{name}: {text.count(chr(10))} lines, at most {LONGEST_FILE}"
    if name.parts[0] != "kernels":  # a Triton kernel is one function however long it is
        yield from (f"{name}:{line} {what}" for line, what in long_functions(tree))
    yield from (f"{name}:{line} {what}" for line, what in wrong_imports(name, tree))


def long_functions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Functions over the limit."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield node.lineno, f"{node.name}: {length} lines, at most {LONGEST_FUNCTION}"


def wrong_imports(name: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Imports against the arrows, and collectives outside `leap_dist.distributed`."""
    for node in ast.walk(tree):
        for target in imported(node):
            if name.parts[0] == "kernels" and target.split(".")[0] == "leap_dist":
                yield node.lineno, f"kernels must not import {target}"
            if target.startswith("torch.distributed") and (name.as_posix(), target) not in DOORS:
                yield node.lineno, f"{target}: collectives go through leap_dist.distributed"
            if name.parts[0] == "leap_dist" and target.startswith("leap_dist."):
                here, there = layer(name.parts[1].removesuffix(".py")), layer(target.split(".")[1])
                if there < here:
                    yield node.lineno, f"imports {target} from a layer above"


def imported(node: ast.AST) -> list[str]:
    """Modules an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" if node.module == "leap_dist" else node.module for alias in node.names]
    return []


def layer(module: str) -> int:
    """Position of a module in LAYERS, 0 at the top."""
    if module == "__init__":
        return len(LAYERS)
    for index, modules in enumerate(LAYERS):
        if module in modules:
            return index
    raise SystemExit(f"leap_dist.{module}: not in LAYERS of {Path(__file__).name}; say where it belongs")


if __name__ == "__main__":
    sys.exit(main())
