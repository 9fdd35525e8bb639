"""YAML files, which may come from a stranger, as plain data of bounded size, never quoted in a message."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from leap_dist.errors import UserError

MOST_BYTES = 1 << 20
MOST_DEPTH = 20
MOST_NODES = 100_000


def read_yaml(path: Path, named: str) -> Any:
    """What a YAML holds. named: what a message calls it.

    Interpolations are refused: ``${oc.env:NAME}`` would put the reader's environment, secrets and all, into a URL that
    somebody else chose. Of anchors there may be as many as fit into memory when they are written out.

    Raises:
        UserError: no such file, it is no YAML, or it holds one of these. Nothing of its text is in the message: it may
            be another file than was meant, named by somebody else's `base`.
    """
    if not path.is_file():
        raise UserError(f"{named}: no such file" if not path.exists() else f"{named}: no regular file")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{named}: not readable as YAML: it has more than {MOST_BYTES >> 20} MiB")
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _nodes(root, named, {}) > MOST_NODES:
            raise UserError(f"{named}: its anchors stand for more than {MOST_NODES} values")
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except UserError:
        raise
    except Exception as error:  # yaml has no common base for what a broken file raises
        raise UserError(f"{named}: not readable as YAML ({_place(error)})") from None
    if _interpolates(content):
        raise UserError(f"{named}: ${{...}} is not taken from a file; write the value, or give it on the command line")
    return content


def _nodes(node: yaml.Node, named: str, known: dict[int, int], depth: int = 1) -> int:
    """How many nodes a parsed YAML has, those behind an anchor as often as it is referred to; `known`: by identity."""
    if depth > MOST_DEPTH:
        raise UserError(f"{named}: line {node.start_mark.line + 1} is nested deeper than {MOST_DEPTH}")
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = (inner for part in parts for inner in (part if isinstance(part, tuple) else (part,)))
        known[id(node)] = 1 + sum(_nodes(inside, named, known, depth + 1) for inside in inner)
    return known[id(node)]


def _place(error: Exception) -> str:
    """Where a YAML cannot be read; of the reason only what the parser says of its own."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return type(error).__name__
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _interpolates(content: Any) -> bool:
    if isinstance(content, dict):
        return any(_interpolates(part) for item in content.items() for part in item)
    if isinstance(content, list):
        return any(_interpolates(part) for part in content)
    return isinstance(content, str) and "${" in content
