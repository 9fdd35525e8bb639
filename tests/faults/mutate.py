"""What slips, disks and hands do to a file, drawn from a seed; and what became of whoever read it then."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("bit", "zeroed", "truncated", "appended", "swapped", "emptied", "removed")
JSON_KINDS = ("value", "key", "doubled")  # of a JSON object besides
SECTOR = 512
STRANGE = (None, True, -1, 10**30, 1.5, "", "x" * 10_000, [], [1], {}, {"a": 1}, float("nan"))


class Mutation(NamedTuple):
    """Of one file. draw: for the random numbers of this one. other: a file of the same use, of another run."""

    file: str
    kind: str
    draw: int
    other: str


@contextmanager
def mutated(mutation: Mutation) -> Iterator[bool]:
    """The file mutated while the block lasts; gives whether a byte of it differs."""
    path = Path(mutation.file)
    whole = path.read_bytes()
    content = changed(whole, mutation)
    try:
        path.unlink()  # a new file, as a disk's fault is: a mapped one would change under its reader
        if content is not None:
            path.write_bytes(content)
        yield content != whole
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(whole)


def changed(whole: bytes, mutation: Mutation) -> bytes | None:
    """The content afterwards; None: the file is gone."""
    draw = random.Random(mutation.draw)
    at = draw.randrange(max(1, len(whole)))
    match mutation.kind:
        case "bit":
            return whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]
        case "zeroed":
            start = at // SECTOR * SECTOR
            return whole[:start] + bytes(len(whole[start : start + SECTOR])) + whole[start + SECTOR :]
        case "truncated":
            return whole[:at]
        case "appended":
            return whole + draw.randbytes(draw.randrange(1, 2 * SECTOR))
        case "swapped":
            return Path(mutation.other).read_bytes()
        case "emptied":
            return b""
        case "removed":
            return None
    return changed_json(json.loads(whole), mutation.kind, draw)


def changed_json(content: dict[str, Any], kind: str, draw: random.Random) -> bytes:
    """A JSON object in which one key has a strange value, another name, or is there twice."""
    key = draw.choice(sorted(content))
    if kind == "value":
        content[key] = draw.choice([value for value in STRANGE if value != content[key]])
    if kind == "key":
        content[f"{key}_"] = content.pop(key)
    text = json.dumps(content)
    if kind == "doubled":
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(draw.choice(STRANGE))}}}"
    return text.encode()


def drawn(files: dict[str, str], count: int, seed: int) -> list[Mutation]:
    """So many mutations: every kind and every file come up in turn. files: each with its counterpart of another run."""
    draw = random.Random(seed)
    pairs = [
        (file, kind)
        for file in sorted(files)
        for kind in (*KINDS, *(JSON_KINDS if file.endswith(".json") else ()))
        if kind != "swapped" or Path(file).read_bytes() != Path(files[file]).read_bytes()
    ]
    picked: list[tuple[str, str]] = []
    while len(picked) < count:
        picked += draw.sample(pairs, len(pairs))
    return [Mutation(file, kind, draw.randrange(2**32), files[file]) for file, kind in picked[:count]]


def tell(title: str, outcomes: list[str]) -> str:
    """One line of counts, for the documentation."""
    counts = Counter(outcomes)
    names = ("refused", "passed over", "mended", "harmless", "silent")
    known = [f"{name} {counts.pop(name, 0)}" for name in names]
    return ", ".join(
        [f"{title}: tried {len(outcomes)}", *known, *(f"{name} {count}" for name, count in counts.items())]
    )
