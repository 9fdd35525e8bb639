"""Forked ranks behave as launched ones: environment, status, and an end for all when one has failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from forked import Forked

TALE = """
import json, os, random, signal, sys, time

def told(number, frame):
    print("told to leave", flush=True)
    sys.exit(0)

print(json.dumps([sys.argv[1:], os.environ["RANK"], os.environ.get("HOME"), random.random()]), flush=True)
fault = os.environ.get("FAULT")
if fault == "exit":
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    sys.exit(3)
if fault == "error":
    raise MemoryError("no room")
if fault == "others":
    signal.signal(signal.SIGTERM, told)
    open(sys.argv[1], "w").close()
    time.sleep(60)
"""


def begin(folder: Path, *faults: str) -> Forked:
    """A rank for each of `faults`."""
    script = folder / "tale.py"
    script.write_text(TALE)
    ranks = [{"RANK": str(rank), "FAULT": fault} for rank, fault in enumerate(faults)]
    return Forked(script, [str(folder / "ready")], ranks, {"PATH": os.environ["PATH"]})


def test_a_rank_has_its_arguments_and_no_other_environment_than_its_own(tmp_path: Path) -> None:
    printed, _ = (run := begin(tmp_path, "", "")).communicate(timeout=120)
    assert run.returncode == 0
    told = sorted((json.loads(line) for line in printed.splitlines()), key=lambda line: line[1])
    assert [line[:3] for line in told] == [[[str(tmp_path / "ready")], rank, None] for rank in ("0", "1")]
    assert told[0][3] != told[1][3], "a draw that nobody seeded is the same on both ranks"


def test_a_rank_that_fails_ends_the_others_and_gives_its_status(tmp_path: Path) -> None:
    printed, _ = (run := begin(tmp_path, "others", "exit")).communicate(timeout=50)
    assert run.returncode == 3 and "told to leave" in printed


def test_an_error_is_told_with_its_trace(tmp_path: Path) -> None:
    printed, _ = (run := begin(tmp_path, "error")).communicate(timeout=50)
    assert run.returncode == 1 and "MemoryError: no room" in printed


def test_a_killed_rank_gives_its_signal(tmp_path: Path) -> None:
    with begin(tmp_path, "others") as run:
        os.kill(run.ranks[0], signal.SIGKILL)
        assert run.wait(timeout=50) == -signal.SIGKILL


def test_a_run_that_takes_too_long_can_be_ended_as_a_whole(tmp_path: Path) -> None:
    with begin(tmp_path, "others", "others") as run:
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(timeout=0.1)
        assert run.poll() is None
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in (run.pid, *run.ranks)):
        assert time.monotonic() < deadline, "a rank lives on"
        time.sleep(0.01)
