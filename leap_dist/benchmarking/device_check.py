"""The first hour on a GPU as a list of parts: each in a process of its own, with a limit and a log, one page for all.

What the parts do is in device_parts.py. A part hands back a `Finding`; here it is run, cut short where it must be, and
written down. The page is written anew after every part, so that what is there survives whatever comes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from leap_dist.runtime.files import write_json, write_text

GRACE_S = 3  # for a part that is told to end, before it is killed
DRY_PATIENCE = 10  # a dry run's limits are so many times as long: it is to end, not to be quick
FINDING = "finding.json"  # in a part's folder
OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class Finding:
    """What a part has found. failures: bars it missed, in words; none: it is well.

    tables: title -> rows; a row maps the names of columns to what is shown.
    """

    summary: str
    failures: list[str] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One part. limit: seconds it may take; on_cpu: whether a dry run without a GPU can go through it.

    run: (dry, folder to work in) to its finding; raises what goes wrong.
    """

    name: str
    title: str
    limit: float
    run: Callable[[bool, Path], Finding]
    on_cpu: bool = True


@dataclass
class Result:
    """What became of a part. state: `OK`, `FAILED`, `SKIPPED` or 'cut after N s'."""

    name: str
    title: str
    state: str
    seconds: float = 0.0
    finding: Optional[dict[str, Any]] = None
    reason: str = ""


class Check:
    """Runs parts in order and keeps JSON and page up to date.

    command: of a process that runs one part: its name, the file for its finding and the folder follow. total: seconds.
    out: the page, NAME.md; NAME.json and the folder NAME.logs lie beside it. about: of the machine, in words.
    """

    def __init__(self, parts: Sequence[Part], command: Sequence[str], out: Path, *, dry: bool, total: float) -> None:
        self.parts = parts
        self.results: list[Result] = []
        self.about = ""
        self._command = list(command)
        self._out = out
        self._dry = dry
        self._patience = DRY_PATIENCE if dry else 1
        self._ends = time.monotonic() + total * self._patience
        self._logs = out.with_suffix(".logs")

    def run(self, gpu: bool, say: Callable[[str], object] = print) -> list[Result]:
        """Every part once; Ctrl-C ends the one that runs and all that follow. Writes after each."""
        self._logs.mkdir(parents=True, exist_ok=True)
        interrupted = False
        for part in self.parts:
            result = self._skipped(part, gpu, interrupted)
            if result is None:
                say(f"{part.title} ...")
                try:
                    result = self._run(part)
                except KeyboardInterrupt:
                    interrupted = True
                    result = Result(part.name, part.title, FAILED, reason="interrupted")
            self.results.append(result)
            say(line(result))
            self.write()
        return self.results

    def _skipped(self, part: Part, gpu: bool, interrupted: bool) -> Optional[Result]:
        why = ""
        if interrupted:
            why = "interrupted before it"
        elif not gpu and not part.on_cpu:
            why = "needs a CUDA device"
        elif time.monotonic() >= self._ends:
            why = "no time was left"
        return Result(part.name, part.title, SKIPPED, reason=why) if why else None

    def _run(self, part: Part) -> Result:
        folder = (self._logs / part.name).resolve()
        folder.mkdir(exist_ok=True)
        found, log = folder / FINDING, folder / "log.txt"
        found.unlink(missing_ok=True)
        limit = min(part.limit * self._patience, self._ends - time.monotonic())
        begin = time.monotonic()
        with log.open("w") as file:
            child = subprocess.Popen(
                [*self._command, part.name, str(found), str(folder)],
                stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                status: Optional[int] = child.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end_group(child)
        result = Result(part.name, part.title, OK, seconds=time.monotonic() - begin)
        if found.is_file():
            result.finding = json.loads(found.read_text())
        if status is None:
            result.state = f"cut after {limit:.0f} s"
        elif status or result.finding is None:
            result.state, result.reason = FAILED, last_line(log)
        elif result.finding["failures"]:
            result.state, result.reason = FAILED, "; ".join(result.finding["failures"])
        return result

    def write(self) -> None:
        """JSON and page of what there is."""
        rows = [asdict(result) for result in self.results]
        content = {"about": self.about, "dry": self._dry, "parts": rows}
        write_json(self._out.with_suffix(".json"), content)
        write_text(self._out, page(self.about, self.results, dry=self._dry))


def hand_over(finding: Finding, path: Path) -> None:
    """Write a part's finding, whole or not at all; a part may do so again as it gets on."""
    write_json(path, asdict(finding))


def end_group(child: subprocess.Popen[Any]) -> None:
    """End a child that leads a group, with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S if number == signal.SIGTERM else None)


def last_line(log: Path) -> str:
    """The end of a log, where an error's own words are."""
    lines = [text.strip() for text in log.read_text(errors="replace").splitlines() if text.strip()]
    return lines[-1][:300] if lines else "nothing was printed"


def line(result: Result) -> str:
    """One line for the terminal."""
    words = result.reason or (result.finding or {}).get("summary", "")
    return f"  {result.state}, {result.seconds:.0f} s: {words}" if result.seconds else f"  {result.state}: {words}"


def page(about: str, results: Sequence[Result], *, dry: bool) -> str:
    """The findings as Markdown."""
    lines = [
        "# A check of the GPU",
        "",
        f"`python tools/gpu_check.py`{': a dry run, no figure means anything' * dry}.",
        "",
        about,
    ]
    lines += ["", "| part | state | s | |", "|---|---|---|---|"]
    for result in results:
        words = result.reason or (result.finding or {}).get("summary", "")
        lines.append(f"| {result.title} | {result.state} | {result.seconds:.0f} | {_cell(words)} |")
    for result in results:
        for title, rows in (result.finding or {}).get("tables", {}).items():
            lines += ["", f"## {title}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["nothing"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    body = [f"| {' | '.join(_cell(row.get(name, '')) for name in names)} |" for row in rows]
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names), *body]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "/")


def failed(results: Sequence[Result]) -> bool:
    """Whether a part has missed a bar, broken down or been cut."""
    return any(result.state not in (OK, SKIPPED) for result in results)


def command_of(script: Path, *arguments: str) -> list[str]:
    """A command of this Python."""
    return [sys.executable, str(script), *arguments]
