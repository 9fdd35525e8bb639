"""Whether a file is what was written: no bit of it is believed before that is known.

    whole file     its size and XXH128, kept by whoever names it: `Mark`, `fault_in`
    JSON           a seal over its own content: `write_sealed`, `read_sealed`
    JSON lines     as whole files, by a sealed JSON beside them: `named_files`, `check_named`, `read_lines`
    file + record  a JSON beside it that knows its mark: `write_recorded`, `check_recorded`

Against disks, networks and hands that slip, not against forgers: whoever can write the file can seal it too. What an
older version of this package wrote has no marks. It is taken as it is, and a line says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import xxhash

from leap_dist.errors import UserError
from leap_dist.runtime.files import write_json, write_whole
from leap_dist.runtime.schema import misfit

log = logging.getLogger(__name__)

SEAL, FILE, FILES = "seal", "file", "files"  # keys of a sealed JSON: of itself, its own file, the files that it names
LARGEST_JSON = 2**26  # bytes; ours have some thousands


@dataclass(frozen=True)
class Mark:
    """A file's size and hash; the hash as `xxh128sum` prints it."""

    bytes: int
    xxh128: str


def mark_of(path: Path) -> Mark:
    """Of a file as it lies there; reads all of it, at about 10 GB/s where it is in memory. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128)
        return Mark(file.tell(), digest.hexdigest())


def fault_in(path: Path, *marks: Mark) -> Optional[str]:
    """What is wrong with a file that had one of the marks when it was written, in a few words; None if nothing is."""
    try:
        size = path.stat().st_size
        if size not in {mark.bytes for mark in marks}:
            return f"has {size} bytes where {marks[0].bytes} were written"
        return None if mark_of(path) in marks else "is damaged: its hash is not that of what was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


# -- JSON -------------------------------------------------------------------------------------------------------------


class Damaged(UserError):
    """A file that is not what was written. The message names it."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its seal, at the end."""
    bare = {key: value for key, value in content.items() if key != SEAL}
    return {**bare, SEAL: _seal(bare)}


def _seal(content: Mapping[str, Any]) -> str:
    told = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(told.encode(errors="surrogatepass"))


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object whole, with its seal."""
    write_json(path, sealed(content))


def read_sealed(path: Path, *, marked: str = SEAL, shape: Any = dict) -> tuple[dict[str, Any], str]:
    """The object in a JSON file without its seal, and what is wrong with it, as after the file's name: "is damaged".

    Where something is wrong nothing is given of it. Else that is empty.
    marked: a key that only sealed ones have. An object with neither is an older version's, and nothing is wrong.
    shape: that the object has, see `schema.misfit`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
    except OSError as error:
        return {}, f"cannot be read ({error.strerror})"
    if not data:
        return {}, "is empty"
    if len(data) > LARGEST_JSON:
        return {}, "is too long"
    try:
        content = json.loads(data, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return {}, "is garbled"
    if not isinstance(content, dict):
        return {}, "is garbled"
    seal = content.pop(SEAL, None)
    if seal != _seal(content) and (seal is not None or marked in content):
        return {}, "is damaged"
    if fault := misfit(content, shape):
        return {}, f"does not say what it should ({fault})"
    return content, ""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


# -- JSON lines --------------------------------------------------------------------------------------------------------


def read_lines(path: Path, shape: Any = dict) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. shape: that each has, see `schema.misfit`.

    Raises:
        Damaged: one is not; which, and why.
        OSError: it cannot be read.
    """
    lines, decoder = [], json.JSONDecoder(object_pairs_hook=_without_repeats)
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = decoder.decode(text.decode())
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{path}: cannot be read as JSON lines (line {number}: {str(error)[:100]})") from None
        if fault := misfit(line, shape):
            raise Damaged(f"{path}: line {number} does not belong there ({fault})")
        lines.append(line)
    return lines


def named_files(folder: Path, *names: str) -> dict[str, Any]:
    """For a JSON of this folder that is to be sealed: the marks of those of the files beside it that are there."""
    there = [folder / name for name in names if (folder / name).is_file()]
    return {FILES: {path.name: asdict(mark_of(path)) for path in there}}


@dataclass(frozen=True)
class _Naming:
    files: dict[str, Mark] = field(default_factory=dict)


def check_named(path: Path, by: Path) -> None:
    """Compare a file with what the sealed JSON `by` beside it says of it, if that is there and says anything.

    Raises:
        Damaged: it is not what it was when that was written.
    """
    if not by.is_file():
        return
    content, fault = read_sealed(by, shape=_Naming)
    if fault:
        raise Damaged(f"{by} {fault}; it tells what {path.name} was")
    mark = content.get(FILES, {}).get(path.name)
    if mark is not None and (fault := fault_in(path, Mark(**mark))):
        raise Damaged(f"{path} {fault} (says {by.name}); put it back, or let the run that has gone on since end")


# -- a file and its record --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """What a record says of its file. file: marks of which it has one; the newest first."""

    file: list[Mark]


def write_recorded(path: Path, write: Callable[[Path], Any], record: Mapping[str, Any]) -> None:
    """Let `write` fill a file; its record, the JSON of the same stem, says `record` and the file's mark.

    A kill at any moment leaves a file and a record that go together, and so does a reader find them: while the one is
    replaced the other knows both, the new and the old.
    """
    noted = record_of(path)
    before = _known(noted)

    def fill(partial: Path) -> None:
        write(partial)
        write_sealed(noted, {**record, FILE: [asdict(mark_of(partial)), *before]})

    write_whole(path, fill)
    write_sealed(noted, {**record, FILE: [asdict(mark_of(path))]})


def record_of(path: Path) -> Path:
    """Where the record of a file lies."""
    return path.with_suffix(".json")


def _known(noted: Path) -> list[dict[str, Any]]:
    """Marks that a record knows already; none where there is no sound one."""
    content, fault = read_sealed(noted, marked=FILE, shape=Recorded)
    return [] if fault else content[FILE][:2]


def check_recorded(path: Path, shape: Any = dict) -> dict[str, Any]:
    """What the record of a file says, once it is known that both are what was written. Reads all of the file.

    shape: that the record has.

    Raises:
        Damaged: file or record are not, or one of them is not there.
    """
    noted = record_of(path)
    for needed in (path, noted):
        if not needed.is_file():
            raise Damaged(f"{path}: {needed.name} is missing")
    content, fault = read_sealed(noted, marked=FILE, shape=shape)
    if fault:
        raise Damaged(f"{noted} {fault}; put a whole copy back")
    if FILE not in content:
        log.warning("%s was written by an older version and has no hash: it is taken unchecked", path)
    else:
        fault = misfit(content, Recorded)
        if fault or not content[FILE]:
            raise Damaged(f"{noted} does not say what {path.name} is ({fault})")
        if fault := fault_in(path, *(Mark(**mark) for mark in content[FILE])):
            raise Damaged(f"{path} {fault}; put a whole copy back")
    return content
