"""Which checkpoints of a `checkpoints` folder are whole, and which of them a run goes on from.

`latest` names it. Where that file is missing or names nothing whole, the newest whole checkpoint is taken, and a line
says what was passed over and why: a folder that holds checkpoints is never begun anew.

A checkpoint's run.json is sealed, and has the size and hash of every other file. Names and sizes are looked at here, on
one rank; `damage` reads every byte, on the rank that is going to use it.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, gather_objects
from leap_dist.runtime.integrity import FILES, Mark, fault_in, mark_of, read_sealed, write_sealed

log = logging.getLogger(__name__)

LATEST, CONFIG, RUN = "latest", "config.yaml", "run.json"
AVERAGE = "weight_average.pt"  # see `leap_dist.runtime.average`
FROZEN = "frozen.pt"  # see `leap_dist.runtime.frozen`
NOTHING: Mapping[Path, str] = {}
_RANKS_PART = re.compile(r"zero_pp_rank_(\d+)_")  # in the names of files that one rank writes, and reads, alone


@dataclass(frozen=True)
class SavedRun:
    """run.json. files: by their paths in the checkpoint; an older version's has none.

    The other keys are what a run that goes on from it must have alike, see `Checkpoints._identity`.
    """

    step: int
    world_size: int
    saved_at: float = 0.0
    zero_stage: int = 0
    order: int = 1
    teacher_marks: dict[str, str] = field(default_factory=dict)
    students: list[str] = field(default_factory=list)
    files: dict[str, Mark] = field(default_factory=dict)


class Choice(NamedTuple):
    """A checkpoint to go on from, and what is to be said of that; empty: nothing."""

    path: Path
    remark: str = ""


def newest(folder: Path) -> Optional[Path]:
    """The path of `choose`, whose remark is logged."""
    choice = choose(folder)
    if choice is not None and choice.remark:
        log.warning(choice.remark)
    return None if choice is None else choice.path


def choose(folder: Path, damaged: Mapping[Path, str] = NOTHING) -> Optional[Choice]:
    """The checkpoint to go on from, or None where the folder holds none.

    damaged: what is wrong with those of which it is known that names and sizes do not tell.

    Raises:
        UserError: there are some, and none is whole, or none has its name; or the folder cannot be read.
    """
    every, latest = checkpoints(folder), folder / LATEST
    if not every and not latest.is_file():
        check_has_none(folder)
        return None
    named = _named(latest)
    passed_over = [f"{LATEST} is {'garbled' if latest.is_file() else 'missing'}"] if named is None else []
    for path in _in_order(every, named):
        fault = damaged.get(path) or fault_of(path)
        if fault is None:
            if path == named and every[0] != named:
                passed_over.append(f"{LATEST} names it, though {every[0].name} is newer")
            remark = f"{folder}: goes on from {path.name} ({'; '.join(passed_over)[:600]})" if passed_over else ""
            return Choice(path, remark)
        passed_over.append(f"{path.name} {fault}")
    raise UserError(
        f"{folder}: holds no whole checkpoint ({'; '.join(passed_over)[:400]}); put one back, or move the folder away "
        "to begin anew"
    )


def check_has_none(folder: Path) -> None:
    """UserError where a folder without a checkpoint of the usual name may hold some: a run would begin anew over them.

    It is a link to a disk that is not there, say, or somebody has renamed what is in it.
    """
    there = folder.is_symlink() or folder.exists()
    if there and not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        raise UserError(f"{folder}: cannot be read as a folder, and may hold checkpoints; put it right, or remove it")
    if renamed := sorted(path.parent.name for path in folder.glob(f"[!.]*/{RUN}")):
        raise UserError(
            f"{folder}: holds checkpoints under other names ({', '.join(renamed)[:200]}); call them stepNUMBER again, "
            "or move the folder away to begin anew"
        )


def _in_order(every: list[Path], named: Optional[Path]) -> list[Path]:
    """The one that `latest` names, then older ones. Newer ones last: no loss has yet shown that they are sound."""
    if named is None:
        return every
    rest, age = [path for path in every if path != named], _age(named)
    newer = [path for path in rest if (_age(path) > age if age[0] else path.name > named.name)]
    return [named, *(path for path in rest if path not in newer), *newer]


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that lie in the folder, whole or not, newest first."""
    return sorted((path for path in folder.glob("step*") if path.is_dir()), key=_age, reverse=True)


def _age(path: Path) -> tuple[float, str]:
    """By the time of the save: a run that went back to an earlier step leaves later ones behind. It stands in the file,
    as copies lose file times; where it does not, the step counts.
    """
    try:
        return float(read_run(path).get("saved_at", 0)), path.name
    except (UserError, TypeError, ValueError):
        return 0.0, path.name


def _named(latest: Path) -> Optional[Path]:
    """What `latest` names, whether it is there or not; None where it is missing or holds no such name."""
    name = latest.read_text(encoding="utf-8-sig", errors="replace").strip() if latest.is_file() else ""
    return latest.parent / name if re.fullmatch(r"step[\w.-]{1,99}", name) else None


def fault_of(path: Path) -> Optional[str]:
    """What a checkpoint lacks, or None if it is whole as far as sizes and names tell."""
    if not path.is_dir():
        return "is not there"
    try:
        saved = read_run(path)
    except UserError as error:
        return str(error)
    for name in saved.get("students") or [""]:
        fault = _fault_of_engine(path / name, saved["world_size"])
        if fault is not None:
            return f"{fault} for student {name}" if name else fault
    for name, mark in saved.get(FILES, {}).items():
        if not (path / name).is_file():
            return f"has no {name}"
        if (path / name).stat().st_size != mark["bytes"]:
            return f"has a {name} of {(path / name).stat().st_size} bytes where {mark['bytes']} were written"
    return None


def _fault_of_engine(path: Path, ranks: int) -> Optional[str]:
    """What one engine's files lack."""
    files = _files(path)
    for file in files:
        if not file.stat().st_size:
            return f"has an empty {file.name}"
        if file.suffix == ".pt" and not zipfile.is_zipfile(file):  # its end, where the index is, is missing
            return f"has a {file.name} that is cut off or garbled"
    parts = [file for file in files if file.name.endswith("_optim_states.pt")]
    if parts and len(parts) != ranks:
        return f"has the optimizer's parts of {len(parts)} ranks, not of {ranks}"
    if not any(file.name not in (RUN, CONFIG, AVERAGE, FROZEN) and file not in parts for file in files):
        return "has no model states"
    return None


def _files(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


def seal(path: Path, about: Mapping[str, Any], world: World) -> None:
    """Write run.json into a checkpoint that all ranks have written: `about`, and the marks of all files. Collective.

    Each rank marks what it wrote itself, which is in memory still.
    """
    mine = [file for file in _files(path) if _owner(file.name) == world.rank and file.name != RUN]
    marks = {file.relative_to(path).as_posix(): asdict(mark_of(file)) for file in mine}
    files = {name: mark for found in gather_objects(marks, world) for name, mark in sorted(found.items())}
    if world.is_main:
        write_sealed(path / RUN, {**about, FILES: files})


def damage(path: Path, world: World) -> Optional[str]:
    """What in a checkpoint is not what was written, the first of it that a rank finds; None if nothing is. Collective.

    Each rank reads what it is going to load; where the number of ranks has changed, rank 0 converts and reads all.
    """
    saved, fault = gather_objects(_saved(path) if world.is_main else None, world)[0]
    if fault:  # it was whole a moment ago
        return fault
    if not saved.get(FILES) and world.is_main:
        log.warning("%s was saved by an older version and has no hashes: it is taken unchecked", path)
    faults = gather_objects(next(_faults(path, saved, world), None), world)
    return next(filter(None, faults), None)


def _saved(path: Path) -> tuple[dict[str, Any], str]:
    try:
        return read_run(path), ""
    except UserError as error:
        return {}, str(error)


def _faults(path: Path, saved: Mapping[str, Any], world: World) -> Iterator[str]:
    converted = saved.get("zero_stage", 0) > 0 and saved["world_size"] != world.size
    for name, mark in saved.get(FILES, {}).items():
        shared = _RANKS_PART.match(Path(name).name) is None
        mine = world.is_main if converted else shared or _owner(Path(name).name) == world.rank
        fault = fault_in(path / name, Mark(**mark)) if mine else None
        if fault:
            yield f"has a {name} that {fault}"


def _owner(name: str) -> int:
    """The rank that writes a checkpoint's file of that name."""
    part = _RANKS_PART.match(name)
    return 0 if part is None else int(part[1])


def read_run(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        UserError: it says nothing, or nothing that can be read; in a few words.
    """
    file = path / RUN
    if not file.is_file():
        raise UserError(f"has no {RUN}")
    saved, fault = read_sealed(file, marked=FILES, shape=SavedRun)
    if fault:
        raise UserError(f"has a {RUN} that {fault}")
    return saved


def others(path: Path) -> str:
    """A hint at the whole checkpoints beside one that cannot be used, to end an error's line with."""
    whole = [other.name for other in checkpoints(path.parent) if other != path and fault_of(other) is None]
    if not whole:
        return "no other checkpoint beside it is whole"
    return f"whole beside it: {', '.join(whole)}; go on from one by writing its name into {path.parent / LATEST}"
