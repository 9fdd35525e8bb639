"""What signals do to a run: where there is nothing to save they end it; while it trains they are a note to save."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, Optional

from leap_dist.runtime.reporting import forget_lost_output

# SIGHUP: the terminal was closed. SIGUSR1, SIGUSR2: a queue's warning before its time limit, SLURM's --signal.
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
TOGETHER_S = 0.3  # until all ranks know that they leave, and miss none of those that have left
BY_SIGNAL = 128  # and the signal's number: the status that a shell gives to what a signal has ended


class Ending(NamedTuple):
    """How a process leaves at a signal. words: its last line says; status: None for 128 and the signal's number."""

    words: str
    status: Optional[int]


# The start's status tells a launcher to end ranks that have not met this one yet, and would wait for it.
UNBEGUN = Ending("before its first step; what was saved before is as it was, and the same command starts again", None)
EVALUATING = Ending("while evaluating, all is saved; resume=auto evaluates again", 0)


class Interrupt:
    """Listens to signals that ask for an end.

    It notes them, and where there is nothing to save it ends the process: by a thread, for the main one may be waiting
    for other ranks in a library, where Python runs no handler. After `meets` it only notes, and the heartbeat ends all
    ranks together.

    ending: how the process leaves until `hold`; None: it holds from the first. number: of the first signal that came;
    0 = none. ready: whether there is nothing to save.
    """

    def __init__(self, ending: Optional[Ending] = None) -> None:
        self.number = 0
        self.ready = ending is not None
        self._ending = ending or UNBEGUN
        self._alone = self._speaks = True
        self._leaves = False
        self._previous: list[tuple[int, object]] = []

    def __enter__(self) -> Interrupt:
        self._told, written = os.pipe()
        os.set_blocking(written, False)
        _silence_children()
        self._wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        self._written = written
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        self._previous = [(number, signal.signal(number, self._note)) for number in _heard()]
        return self

    def __exit__(self, *_: object) -> None:
        self.ready = False
        for number, handler in self._previous:
            signal.signal(number, handler)
        self._previous = []
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._written)  # the thread's end

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number > 0

    def meets(self, speaks: bool) -> None:
        """The ranks have found each other: from now on they leave together. speaks: this one says so."""
        self._alone, self._speaks = False, speaks

    def hold(self) -> None:
        """From now on there is something to save, or to say. Does not return where the process is about to leave."""
        if self._leaves:
            threading.Event().wait()
        self.ready = False

    def let_go(self, ending: Ending) -> None:
        """From now on all is saved. A signal that came before counts."""
        self._ending, self.ready = ending, True
        self._heed()

    @contextmanager
    def saved(self, ending: Ending) -> Iterator[None]:
        """All is saved in this block, whatever holds around it."""
        before = self._ending, self.ready
        self.let_go(ending)
        yield
        self._ending, self.ready = before

    def over(self) -> None:
        """The process leaves by itself, and a signal must not turn that into a failure."""
        self.ready, self._previous = False, []
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    def leave_together(self, number: int) -> None:
        """`leave`, called on all ranks at about one time."""
        self._leaves = True
        time.sleep(TOGETHER_S)
        self.leave(number)

    def leave(self, number: int) -> None:
        """End this process at once, for signal `number`. From any thread."""
        forget_lost_output()
        if self._speaks and os.environ.get("RANK", "0") == "0":
            line = f"leap_dist: stopped by {signal.Signals(number).name} {self._ending.words}\n"
            os.write(2, line.encode())  # past Python's buffers: the main thread may be at them
        os._exit(BY_SIGNAL + number if self._ending.status is None else self._ending.status)

    def _note(self, number: int, _frame: Optional[FrameType] = None) -> None:
        forget_lost_output()
        self.number = self.number or number

    def _listen(self) -> None:
        heard = set(STOPPING)
        while numbers := os.read(self._told, 64):
            for number in heard.intersection(numbers):
                self._note(number)
            self._heed()
        os.close(self._told)

    def _heed(self) -> None:
        if self.requested and self.ready and self._alone:
            self.leave(self.number)


def _heard() -> list[int]:
    """Those that end a run; not SIGHUP where the caller has it ignored, as nohup does: that run is to go on."""
    return [
        number
        for number in STOPPING
        if signal.Signals(number).name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
    ]


@functools.cache
def _silence_children() -> None:
    """A forked child, a loader's worker perhaps, must not tell its own signals to its parent's thread."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
