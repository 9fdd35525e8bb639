"""Which checkpoints of a `checkpoints` folder are whole, and which of them a run goes on from.

`latest` names it. Where that file is missing or names nothing whole, the newest whole checkpoint is taken, and a line
says what was passed over and why: a folder that holds checkpoints is never begun anew.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any, Optional

from leap_dist.errors import UserError

log = logging.getLogger(__name__)

LATEST, CONFIG, RUN = "latest", "config.yaml", "run.json"
AVERAGE = "weight_average.pt"  # see `leap_dist.runtime.average`


def newest(folder: Path) -> Optional[Path]:
    """The checkpoint to go on from, or None where the folder holds none.

    Raises:
        UserError: there are some, and none is whole.
    """
    every, latest = checkpoints(folder), folder / LATEST
    if not every and not latest.is_file():
        return None
    named = _named(latest)
    passed_over = [f"{LATEST} is {'garbled' if latest.is_file() else 'missing'}"] if named is None else []
    for path in _in_order(every, named):
        fault = fault_of(path)
        if fault is None:
            if passed_over:
                log.warning("%s: goes on from %s (%s)", folder, path.name, "; ".join(passed_over))
            return path
        passed_over.append(f"{path.name} {fault}")
    raise UserError(
        f"{folder}: holds no whole checkpoint ({'; '.join(passed_over)[:400]}); put one back, or move the folder away "
        "to begin anew"
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
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in files:
        if not file.stat().st_size:
            return f"has an empty {file.name}"
        if file.suffix == ".pt" and not zipfile.is_zipfile(file):  # its end, where the index is, is missing
            return f"has a {file.name} that is cut off or garbled"
    parts = [file for file in files if file.name.endswith("_optim_states.pt")]
    if parts and len(parts) != saved["world_size"]:
        return f"has the optimizer's parts of {len(parts)} ranks, not of {saved['world_size']}"
    if not any(file.name not in (RUN, CONFIG, AVERAGE) and file not in parts for file in files):
        return "has no model states"
    return None


def read_run(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        UserError: it says nothing, or nothing that can be read; in a few words.
    """
    file = path / RUN
    if not file.is_file():
        raise UserError(f"has no {RUN}")
    try:
        saved = json.loads(file.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"has {'a garbled' if file.stat().st_size else 'an empty'} {RUN}") from None
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), int) for key in ("step", "world_size")):
        raise UserError(f"has a {RUN} without step and world_size")
    return saved


def others(path: Path) -> str:
    """A hint at the whole checkpoints beside one that cannot be used, to end an error's line with."""
    whole = [other.name for other in checkpoints(path.parent) if other != path and fault_of(other) is None]
    if not whole:
        return "no other checkpoint beside it is whole"
    return f"whole beside it: {', '.join(whole)}; go on from one by writing its name into {path.parent / LATEST}"
