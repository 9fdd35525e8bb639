"""What became of a run: `history.jsonl` of its folder, with a line for every session and for each of its warnings.

    {"event":"start","at":"2026-06-01T08:00:00+00:00","step":0,"total_steps":500400,"command":"...","ranks":8,...}
    {"event":"warning","at":"...","text":"..."}
    {"event":"end","at":"...","step":500400}            or "stop", by a signal; or "failure", with its text

A session without one of these was killed, or still goes on. It is a log: where it cannot be written, the run goes on.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import torch

from leap_dist.errors import UserError, one_line
from leap_dist.runtime.distributed import World, device_name
from leap_dist.runtime.files import refusal, write_whole
from leap_dist.runtime.schema import misfit

HISTORY = "history.jsonl"
LIBRARIES = ("torch", "deepspeed", "timm", "mosaicml-streaming", "triton", "torchvision", "leap-dist")
ROOT = Path(__file__).resolve().parents[2]
MOST_WARNINGS = 100  # of a session
PATIENCE_S = 10  # for git

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Line:
    """What is read back of a line."""

    event: str
    at: str
    step: Optional[int] = None
    total_steps: Optional[int] = None
    text: Optional[str] = None
    command: Optional[str] = None
    ranks: Optional[int] = None
    nodes: Optional[int] = None
    device: Optional[str] = None
    versions: Optional[dict[str, str]] = None
    commit: Optional[str] = None


class History(logging.Handler):
    """Writes the lines of one session, and hears the project's warnings meanwhile; built on rank 0 only."""

    def __init__(self, output: Path) -> None:
        super().__init__(logging.WARNING)
        self._path = output / HISTORY
        self._known: Optional[bytes] = b"".join(_whole_lines(self._path))
        self._process, self._warnings = os.getpid(), 0
        logging.getLogger("leap_dist").addHandler(self)

    def start(self, world: World, step: int, total_steps: int) -> None:
        """The session begins. step: that it goes on from, 0 for a fresh run."""
        self.note("start", step=step, total_steps=total_steps, **_circumstances(world))

    def note(self, event: str, **more: Any) -> None:
        """Add a line. The file is written anew: a kill leaves no half line, and what comes is a handful."""
        if self._known is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        known = self._known + json.dumps({"event": event, "at": now, **more}).encode() + b"\n"
        try:
            write_whole(self._path, lambda partial: partial.write_bytes(known))
            self._known = known
        except (UserError, OSError) as error:
            self.close()
            reason = refusal(error, self._path.parent, probe=False) or error
            log.warning("%s is not written any more (%s); the run goes on without it", HISTORY, reason)

    def emit(self, record: logging.LogRecord) -> None:
        """A warning of this process; a loader's worker has inherited this handler and is another one."""
        if os.getpid() == self._process and self._warnings < MOST_WARNINGS:
            self._warnings += 1
            self.note("warning", text=one_line(record.getMessage()))

    def close(self) -> None:
        """Nothing is written any more; safe at any time."""
        self._known = None
        logging.getLogger("leap_dist").removeHandler(self)
        super().close()


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's history, without those that are none; empty where there is none."""
    return [json.loads(line) for line in _whole_lines(folder / HISTORY)]


def _whole_lines(path: Path) -> list[bytes]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    return [line for line in lines if line.endswith(b"\n") and _is_whole(line)]


def _is_whole(line: bytes) -> bool:
    try:
        return misfit(json.loads(line), _Line) is None
    except (ValueError, RecursionError):
        return False


def _circumstances(world: World) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "CUDA": torch.version.cuda or "none"}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:  # run from a checkout, or none for this platform
            continue
    return {
        "command": shlex.join(sys.argv),
        "ranks": world.size,
        "nodes": world.size // world.local_size,
        "device": device_name(world.device),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> Optional[str]:
    """The commit of the checkout that this package lies in, with -dirty where files differ from it; None outside one.

    An installed package may lie in the checkout of something else: that one's commit says nothing.
    """
    if not (ROOT / ".git").exists():
        return None
    words = ["git", "-C", str(ROOT), "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*words, "--exclude=*"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
