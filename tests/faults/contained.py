"""Work on files that may be hostile, in a child process that may neither hang nor take much memory."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from leap_dist.errors import UserError

HANG_S = 60
GROWTH_MIB = 700  # what a normal run's process has; so less than twice of it


class Outcome(NamedTuple):
    """How the child ended: refusal: the line a user would read, empty if all was taken; grown: MiB at its peak."""

    refusal: str
    grown: float


def contained(work: Callable[[], Any]) -> Outcome:
    """Run `work` in a forked child. AssertionError if it dies, hangs or raises what is no UserError."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(_attempt(work), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if not select.select([pipe], [], [], HANG_S)[0]:
            os.kill(child, signal.SIGKILL)
        told = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0 and told, f"the child hung or died (status {status})"
    raised, refusal, grown = pickle.loads(told)
    assert not raised, raised
    assert "\n" not in refusal and len(refusal) < 1500, refusal
    return Outcome(refusal, grown)


def _attempt(work: Callable[[], Any]) -> tuple[str, str, float]:
    before, raised, refusal = _resident_mib(), "", ""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_virtual_bytes() + (8 << 30), most))  # a bomb must not take the machine
    try:
        with contextlib.redirect_stderr(_text()), contextlib.redirect_stdout(_text()):
            work()
    except UserError as error:
        refusal = str(error)
    except BaseException as error:
        raised = f"{type(error).__name__}: {error}"[:1000]
    return raised, refusal, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _text() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO())
