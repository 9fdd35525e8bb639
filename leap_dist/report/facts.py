"""What the files of a run folder say, as far as they are there and whole."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Optional, TypeVar

import numpy as np

from leap_dist.config import read_yaml
from leap_dist.errors import UserError
from leap_dist.monitoring.board import read_points
from leap_dist.monitoring.climb import Climb, climb_of
from leap_dist.monitoring.comparison import (
    BOARD,
    LEDGER,
    SUMMARY,
    VALIDATION,
    Series,
    read_ledger,
    read_summary,
    read_validations,
)
from leap_dist.monitoring.history import read_history
from leap_dist.runtime.files import read_regular
from leap_dist.runtime.integrity import read_lines
from leap_dist.runtime.schema import misfit

_T = TypeVar("_T")

CONFIG, BAD_SAMPLES, PICTURES = "config.yaml", "bad_samples.jsonl", "pictures"
TAGS = ("loss/", "lr", "images_per_s", "flops/teacher_saved_fraction", "savings/", "total_seconds/", "total_pflops/",
        "update/grad_norm")  # fmt: skip
MOST_PICTURE_BYTES = 400_000  # of one that is shown; a page of several stays below some MB
ON_THE_WAY = 4  # pictures of tokens before the last


class Picture(NamedTuple):
    """An image of the run folder, as a page has it within itself. step: None for the last."""

    step: Optional[int]
    uri: str


@dataclass(kw_only=True)
class Session:
    """One start of the run, and what its history says until the next. last: the line with which it ended, if any."""

    TOLD: ClassVar = ("step", "ranks", "nodes", "device", "command", "commit", "versions")

    at: str
    step: int = 0
    ranks: Optional[int] = None
    nodes: Optional[int] = None
    device: str = ""
    command: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    last: Optional[dict[str, Any]] = None


@dataclass(frozen=True)
class Facts:
    """Of one run or one student of a run.

    home: the run's folder, which is not a student's. config: by dotted key, as config.yaml has it, `text` its text.
    points: TensorBoard's, by tag. faults: what could not be read, a line each. family: names of the students whose
    folders lie in this one.
    """

    folder: Path
    home: Path
    name: str
    config: Mapping[str, Any]
    text: str
    summary: Mapping[str, Any]
    climb: Optional[Climb]
    ledger: list[dict[str, Any]]
    points: Mapping[str, Series]
    validations: list[dict[str, Any]]
    history: list[dict[str, Any]]
    bad: list[dict[str, Any]]
    pictures: list[Picture]
    family: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Made so far, as far as anything tells."""
        known = [self.summary.get("steps", 0), self.climb.end if self.climb else 0]
        return max(known + [int(found.steps[-1]) + 1 for found in self.points.values() if len(found.steps)])

    @property
    def total_steps(self) -> Optional[int]:
        """That the run is to make."""
        starts = [line["total_steps"] for line in self.history if line.get("total_steps")]
        return starts[-1] if starts else None

    @property
    def sessions(self) -> list[Session]:
        """In the order in which they began."""
        found: list[Session] = []
        for line in self.history:
            if line["event"] == "start":
                told = {key: line[key] for key in Session.TOLD if line.get(key) is not None}
                found.append(Session(at=line["at"], **told))
            elif found and line["event"] == "warning":
                found[-1].warnings.append(line.get("text") or "")
            elif found:
                found[-1].last = line
        return found


def gather(folder: Path, name: Optional[str] = None) -> Facts:
    """The facts of a run folder, or of a student's within one.

    Raises:
        UserError: it is none.
    """
    if not is_run(folder):
        raise UserError(f"{folder}: no run folder; it holds none of {CONFIG}, {LEDGER} and {SUMMARY}")
    faults: list[str] = []
    text, config = _attempt(lambda: _config(folder / CONFIG), ("", {}), faults)
    family = config.get("students") or {}
    ledger: list[dict[str, Any]] = _attempt(lambda: read_ledger(folder), [], faults)
    summary: dict[str, Any] = _attempt(lambda: _summary(folder / SUMMARY), {}, faults)
    home = _home(folder)
    return Facts(
        folder=folder,
        name=name or folder.resolve().name,
        config=flattened({key: value for key, value in config.items() if key != "students"}),
        text=text,
        summary=summary,
        climb=climb_of(ledger, summary) if ledger else None,
        ledger=ledger,
        points=_attempt(lambda: _points(folder / BOARD), {}, faults),
        validations=_attempt(lambda: _validations(folder), [], faults),
        home=home,
        history=read_history(home),
        bad=_attempt(lambda: _bad_samples(home / BAD_SAMPLES), [], faults),
        pictures=_attempt(lambda: _pictures(folder / PICTURES), [], faults),
        family=tuple(str(student) for student in family if is_run(folder / str(student))),
        faults=tuple(faults),
    )


def is_run(folder: Path) -> bool:
    """Whether a run, or a student of one, has written there."""
    return any((folder / name).is_file() for name in (CONFIG, LEDGER, SUMMARY))


def flattened(nested: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested mappings; an empty one is a value."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        inner = isinstance(value, Mapping) and value
        found |= flattened(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def _attempt(read: Callable[[], _T], otherwise: _T, faults: list[str]) -> _T:
    """What `read` gives; `otherwise`, and a line in `faults`, where the file is damaged or cannot be read."""
    try:
        return read()
    except (UserError, OSError, ValueError) as error:
        faults.append(str(error))
        return otherwise


def _config(path: Path) -> tuple[str, dict[Any, Any]]:
    if not path.is_file():
        return "", {}
    content = read_yaml(path, str(path))
    return path.read_text(encoding="utf-8-sig"), content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class _Retired:
    why: str
    weights_of: Optional[int] = None


@dataclass(frozen=True)
class _Summary:
    """What a page takes from summary.json besides accuracies. One that was written by hand may say anything."""

    steps: int = 0
    epochs: float = 0.0
    train_seconds: Optional[float] = None
    images_per_s: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    teacher_flops_saved: Optional[float] = None
    flops_saved: Optional[float] = None
    time_saved: Optional[float] = None
    time_saved_at_least: Optional[float] = None
    skip_efficiency: Optional[float] = None
    final_block: int = 0
    known_images: int = 0
    judged_images: int = 0
    retired: Optional[_Retired] = None


def _summary(path: Path) -> dict[str, Any]:
    summary = read_summary(path)
    accuracies = {key: value for key, value in summary.items() if key.startswith(("student_", "teacher_"))}
    if fault := misfit(summary, _Summary) or misfit(accuracies, dict[str, Optional[float]]):
        raise UserError(f"{path} is no run's summary ({fault})")
    return summary


def _validations(folder: Path) -> list[dict[str, Any]]:
    lines = read_validations(folder)
    if fault := misfit(lines, list[dict[str, Optional[float]]]):
        raise UserError(f"{folder / VALIDATION}: no evaluations ({fault})")
    return lines


def _points(folder: Path) -> dict[str, Series]:
    found = read_points(folder, lambda tag: tag.startswith(TAGS))
    series = {}
    for tag, points in found.items():
        steps, values = np.array(points.steps), np.array(points.values)
        series[tag] = Series(steps[np.isfinite(values)], values[np.isfinite(values)])
    return series


@dataclass(frozen=True)
class _Bad:
    id: int
    shard: str
    reason: str


def _bad_samples(path: Path) -> list[dict[str, Any]]:
    return read_lines(path, _Bad) if path.is_file() else []


def _home(folder: Path) -> Path:
    """The folder of the whole run, which for a student of several is the one around its own."""
    around = folder.resolve().parent
    try:
        students = _config(around / CONFIG)[1].get("students")
    except (UserError, OSError, ValueError):
        return folder
    return around if isinstance(students, dict) and folder.resolve().name in map(str, students) else folder


def _pictures(folder: Path) -> list[Picture]:
    """tokens.png, the latest, and before it at most four of tokens_step_N.png, evenly chosen, in order."""
    steps = {}
    for path in folder.glob("tokens_step_*.png"):
        number = path.stem.removeprefix("tokens_step_")
        if number.isdecimal():
            steps[int(number)] = path
    order = sorted(steps)
    chosen = {order[round(at)] for at in np.linspace(0, len(order) - 1, min(ON_THE_WAY, len(order)))} if order else ()
    found = [Picture(step, _embedded(steps[step])) for step in sorted(chosen)]
    last = folder / "tokens.png"
    return [*found, Picture(None, _embedded(last))] if last.is_file() else found


def _embedded(path: Path) -> str:
    """A PNG as a data URI; a large one is made smaller."""
    data = read_regular(path, 64 << 20)
    if len(data) > MOST_PICTURE_BYTES:
        try:
            data = _smaller(data)
        except Exception as error:  # PIL has no common base for what a broken file raises
            raise UserError(f"{path}: cannot be read as a picture ({type(error).__name__})") from None
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _smaller(data: bytes) -> bytes:
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    while True:
        image = image.resize((max(1, image.width * 2 // 3), max(1, image.height * 2 // 3)))
        out = io.BytesIO()
        image.save(out, "PNG", optimize=True)
        if out.tell() <= MOST_PICTURE_BYTES:
            return out.getvalue()
