"""House rules that a linter does not know: rooms and floors, short functions, one door for collectives.

python tools/check_house.py        prints what breaks a rule and exits with 1, or exits with 0

The rooms are explained in docs/design.md.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FUNCTION = 60  # the model codebases keep 90 % of theirs under 63 lines
LONGEST_CLASS = 250
LONGEST_FILE = 500
# Rooms of leap_dist by floor, from the top. A room imports from the floors below it, never from above, nor from another
# room of its own floor.
FLOORS = [
    {"__init__"},  # what `import leap_dist` gives
    {"train"},
    {"benchmarking", "deployment", "judging", "sweeps"},
    {"assembly"},
    {"pretraining", "wrapup"},
    {"trainer"},
    {"cohort"},
    {"learner"},
    {"analysis", "report"},
    {"evaluation", "matching", "monitoring", "teacher"},
    {"curriculum", "data", "models"},
    {"runtime"},
    {"config"},
    {"errors"},
]
# Files that may import from torch.distributed, and what. The pipeline's sends are torch's, inside its schedule.
DOORS = {
    ("leap_dist/runtime/distributed.py", "torch.distributed"),
    ("leap_dist/teacher/pipelined.py", "torch.distributed.pipelining"),
}


def main() -> int:
    """Check every module; return the exit status."""
    paths = sources()
    broken = [line for path in paths for line in problems(path)] + circles(paths)
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
        yield from (f"{name}:{line} {what}" for line, what in long_parts(tree))
    yield from (f"{name}:{line} {what}" for line, what in wrong_imports(name, tree))


def long_parts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Functions and classes over their limits."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            longest = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
            length = node.end_lineno - node.lineno + 1
            if length > longest:
                yield node.lineno, f"{node.name}: {length} lines, at most {longest}"


def wrong_imports(name: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Imports against the plan, and collectives outside `leap_dist.runtime.distributed`."""
    for node in ast.walk(tree):
        for target in imported(node):
            package, _, rest = target.partition(".")
            if name.parts[0] == "kernels" and package == "leap_dist":
                yield node.lineno, f"kernels must not import {target}"
            if name.parts[0] != "tools" and package in ("tools", "bench"):
                yield node.lineno, f"{target}: a tool is a command, not a module"
            if target.startswith("torch.distributed") and (name.as_posix(), target) not in DOORS:
                yield node.lineno, f"{target}: collectives go through leap_dist.runtime.distributed"
            inside = name.parts[0] == package == "leap_dist"
            if inside and (what := against_the_plan(room(name), rest.partition(".")[0])):
                yield node.lineno, f"imports {target}, {what}"


def against_the_plan(here: str, there: str) -> str:
    """What is wrong with an import of room `there` in room `here`; empty if nothing is."""
    if here == there:
        return ""
    up = floor(there) - floor(here)
    return "which is on a floor above" if up < 0 else "another room of the same floor" if up == 0 else ""


def room(name: Path) -> str:
    """The room that a file of leap_dist belongs to."""
    return name.parts[1].removesuffix(".py")


def floor(of: str) -> int:
    """The floor of a room, 0 at the top."""
    for index, rooms in enumerate(FLOORS):
        if of in rooms:
            return index
    raise SystemExit(f"leap_dist.{of}: not in FLOORS of {Path(__file__).name}; say where it belongs")


def imported(node: ast.AST) -> list[str]:
    """Modules an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" if node.module == "leap_dist" else node.module for alias in node.names]
    return []


def circles(paths: list[Path]) -> list[str]:
    """Modules that import each other in a circle as they are loaded; between rooms the floors see to that."""
    names = {module_name(path): path for path in paths if path.name != "__init__.py"}
    arrows = {name: sorted(set(loaded(path)) & set(names)) for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> list[str]:
        if name in trail:
            return [f"circle: {' -> '.join((*trail[trail.index(name) :], name))}"]
        if name in done:
            return []
        found = [line for target in arrows[name] for line in visit(target, (*trail, name))]
        done.add(name)
        return found

    return [line for name in names for line in visit(name, ())]


def module_name(path: Path) -> str:
    """Of a file of this repository; kernels/ is installed as leap_kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("leap_kernels", *parts[1:]) if parts[0] == "kernels" else parts)


def loaded(path: Path) -> Iterator[str]:
    """Modules that a file imports at its top level: `from a.b import c` may mean a/b.py or a/b/c.py."""
    for node in ast.parse(path.read_text()).body:
        yield from imported(node)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


if __name__ == "__main__":
    sys.exit(main())
