"""What signals do to a run: while it trains a note to save and leave, afterwards an end."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Optional

from leap_dist.runtime.reporting import STDERR, forget_lost_output

# SIGHUP: the terminal was closed. SIGUSR1, SIGUSR2: a queue's warning before its time limit, SLURM's --signal.
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


class Interrupt:
    """Notes signals that ask for an end, so that the run can save at the end of the step and leave."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self._previous = [(number, signal.signal(number, self._note)) for number in _heard()]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous:
            signal.signal(number, handler)

    def _note(self, _signal: int, _frame: Optional[FrameType]) -> None:
        forget_lost_output()
        self.requested = True


def _heard() -> list[int]:
    """Those that end a run; not SIGHUP where the caller has it ignored, as nohup does: that run is to go on."""
    return [
        number
        for number in STOPPING
        if signal.Signals(number).name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
    ]


def ignore_from_now_on() -> None:
    """Everything is saved and the process leaves by itself: another signal must not turn that into a failure."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def leave_from_now_on() -> None:
    """After the last step: everything is saved, so a signal ends the process at once, with status 0."""
    for number in _heard():
        signal.signal(number, _leave)


def _leave(_signal: int, _frame: object) -> None:
    STDERR.write("leap_dist: stopped while evaluating; resume=auto evaluates again\n")
    STDERR.flush()
    os._exit(0)
