"""What the trials of this folder have in common: their count, a limit for each, and disks that take no more."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forked import Forked
from runs import HANG_S, finish, start

LIMIT_S = HANG_S  # of a trial; a machine may be busy, so what takes seconds may take minutes


class Tally:
    """Counts trials and prints the count: `pytest -s` shows it. A lost one fails the test at the end."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.tried = 0
        self.lost: list[str] = []

    def note(self, survived: bool, trial: str) -> None:
        self.tried += 1
        self.lost += [] if survived else [trial]

    def close(self) -> None:
        survived = self.tried - len(self.lost)
        print(f"{self.what}: tried {self.tried}, survived {survived}, lost {len(self.lost)}")
        assert self.tried and not self.lost, self.lost[:5]


def signalled(
    config: Path, sent: signal.Signals, to: list[int], when: Callable[[], bool], *overrides: str, processes: int = 1
) -> tuple[subprocess.CompletedProcess[str], float]:
    """A run whose ranks `to` are sent a signal as soon as they listen and `when` holds; and the seconds to its end."""
    run = start(config, *overrides, processes=processes)
    wait(run, lambda: all(map(listens, run.ranks)) and when())
    for rank in to:
        os.kill(run.ranks[rank], sent)
    began = time.monotonic()
    return finish(run, LIMIT_S), time.monotonic() - began


def listens(pid: int) -> bool:
    """Whether a process is past the first lines of its script, before which a signal is the system's."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return False
    caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt")).split()[1]
    return bool(int(caught, 16) >> (signal.SIGUSR2 - 1) & 1)


def wait(run: Forked, when: Callable[[], bool]) -> bool:
    """Until `when` holds (True), or the run is over."""
    deadline = time.monotonic() + LIMIT_S
    while not when():
        if run.poll() is not None:
            return False
        assert time.monotonic() < deadline, "nothing for a minute"
        time.sleep(0.002)
    return True


def results(run: Path) -> dict[str, Any]:
    """What a run is made for, without its seconds: the student to the bit, every decision, every evaluation."""
    kept = {"student": (run / "student.safetensors").read_bytes()}
    for name in ("curriculum.jsonl", "evaluation.jsonl"):
        lines = (run / name).read_text().splitlines() if (run / name).exists() else []
        kept[name] = [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]
    summary = json.loads((run / "summary.json").read_text())
    return kept | {key: value for key, value in summary.items() if key.startswith("student_")}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """In this block no file of this process grows beyond `size` bytes: a full disk without mounting one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `folder` with these mount options; skips the test where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def complaints(printed: str) -> list[str]:
    """The lines in which ranks say why they end."""
    return [line.split("error: ", 1)[1] for line in printed.splitlines() if line.startswith("leap_dist [rank ")]
