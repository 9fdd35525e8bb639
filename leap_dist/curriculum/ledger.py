"""The curriculum's decisions, one JSON line each, in `curriculum.jsonl` of the run folder; and runs that follow one.

Keys of a line: step, epoch, block (that the step had), score (null where there is none), ema (that was judged),
threshold, decision (start, stay, advance), reason, next_block (of the steps after this one), teacher_flops and seconds
(of the run so far). Reasons of start: start, calibrated, snap, replay; of stay: below_threshold, held, last_block,
unscored; of advance: threshold, max_epochs, snap, replay. The first line, of the start, also has the teacher's depth. A
step has a line if it was scored or changed the block, or ends an epoch or the run; a change by the end of an epoch has
one of its own.
"""

from __future__ import annotations

import itertools
import json
import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import xxhash

from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, gather_objects
from leap_dist.runtime.files import write_whole, writing
from leap_dist.runtime.integrity import Damaged, check_named, read_lines

LEDGER = "curriculum.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """What is read back of a line."""

    step: int
    block: int
    next_block: int
    depth: Optional[int] = None


def known_lines(path: Path, lines: int, mark: str) -> list[bytes]:
    """The first `lines` lines of a ledger: those that a checkpoint knew of. None are left of one that is not there.

    mark: their hash, as `Ledger.mark`; empty in an older version's checkpoint.

    Raises:
        UserError: they are not what was written.
    """
    if not lines:
        return []
    if not path.is_file():
        log.warning("%s is missing: the run goes on without its first %d lines", path, lines)
        return []
    try:
        with path.open("rb") as file:
            found = list(itertools.islice(file, lines))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if mark and xxhash.xxh3_128_hexdigest(b"".join(found)) != mark:
        raise UserError(
            f"{path}: its first {lines} lines are not those that the checkpoint was saved with; put them back, or "
            "remove the file to go on without them"
        )
    return found


class Ledger:
    """Appends to the ledger of one run; on rank 0 only. A line that the disk refuses waits in memory for the next try.

    Args:
        kept: lines of the run that this one continues, `known_lines`.

    lines: so far.
    """

    def __init__(self, output: Path, kept: Sequence[bytes] = ()) -> None:
        self._path, text = output / LEDGER, b"".join(kept)
        write_whole(self._path, lambda partial: partial.write_bytes(text))
        self._file = self._path.open("ab", buffering=0)
        self._waiting = bytearray()
        self._hash = xxhash.xxh3_128(text)
        self.lines = len(kept)

    @property
    def mark(self) -> str:
        """The hash of all lines so far."""
        return self._hash.hexdigest()

    def write(self, **line: Any) -> None:
        """Add a line; it reaches the disk with the next `flush`."""
        text = json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self._waiting += text
        self._hash.update(text)
        self.lines += 1

    def flush(self) -> None:
        """Write what waits. UserError if the disk refuses; what it did not take waits on."""
        with writing(self._path.parent):
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]

    def close(self) -> None:
        """Safe at any time. UserError as `flush`."""
        try:
            self.flush()
        finally:
            self._waiting.clear()
            self._file.close()


@dataclass(frozen=True)
class Schedule:
    """Target blocks by step: block `blocks[i]` from step `firsts[i]` on; `firsts` rise from 0."""

    firsts: Sequence[int]
    blocks: Sequence[int]

    def at(self, step: int) -> int:
        """The target block of a 0-based step."""
        return self.blocks[bisect_right(self.firsts, step) - 1]


def replayed_schedule(path: Optional[str], depth: int, total_steps: int, world: World) -> Optional[Schedule]:
    """The schedule of `curriculum.replay`, read by rank 0 for all; None without one. Collective.

    Raises:
        UserError: what is wrong with the ledger, the same on every rank.
    """
    found: tuple[str, Optional[Schedule]] = ("", None)
    if path is not None and world.is_main:
        try:
            found = ("", read_schedule(Path(path), depth, total_steps))
        except UserError as error:
            found = (str(error), None)
    fault, schedule = gather_objects(found, world)[0]
    if fault:
        raise UserError(fault)
    return schedule


def read_schedule(path: Path, depth: int, total_steps: int) -> Schedule:
    """The blocks that the run of ledger `path` took, for a teacher of `depth` blocks and a run of `total_steps`.

    Raises:
        UserError: no ledger, one of another depth, one whose steps do not rise, or one that ends before the run does.
    """
    firsts, blocks, last = [0], [], -1
    for number, line in enumerate(_lines(path), 1):
        where = f"curriculum.replay={path}: line {number}"
        if line.get("depth", depth) != depth:
            raise UserError(f"curriculum.replay={path}: of a teacher of {line['depth']} blocks, this run's has {depth}")
        step, block, following = line["step"], line["block"], line["next_block"]
        if not all(1 <= value <= depth for value in (block, following)):
            raise UserError(f"{where} has block {block}, then {following}; this run's teacher has blocks 1 to {depth}")
        if step < last or (last < 0 and step > 0):
            raise UserError(f"{where} is of step {step}, after step {last}; steps must rise from 0")
        blocks = blocks or [block]
        if following != blocks[-1]:
            firsts, blocks = [*firsts, step + 1], [*blocks, following]
        last = step
    if last + 1 < total_steps:
        raise UserError(f"curriculum.replay={path}: ends after step {last}, this run's last step is {total_steps - 1}")
    return Schedule(tuple(firsts), tuple(blocks))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        check_named(path, path.with_name("summary.json"))
        return read_lines(path, Line)
    except OSError as error:
        raise UserError(f"curriculum.replay={path}: cannot be read ({error.strerror})") from None
    except Damaged as error:
        raise UserError(f"curriculum.replay={error}") from None
