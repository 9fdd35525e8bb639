"""A sign of life from every rank, beside the training: a rank that gives none for a while ends the run by name.

Without it a rank that hangs, or that died on another node, would be waited for until the process group's timeout of
half an hour, which must be long: a first compilation or a slow disk on one rank is no fault. A thread on each rank
keeps giving its sign whatever the rank is busy with, so here seconds are enough. The sign also says whether the rank
was told by a signal to leave: where none of them has anything to save, all leave at once, with one status.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Optional

from leap_dist.runtime.distributed import LostRank, World, build_roll, call_roll, is_lost_peer
from leap_dist.runtime.signals import Interrupt

INTERVAL_S = 2.0
GRACE_S = 3.0  # a rank that failed by its own fault tells so in better words


class Heartbeat:
    """Entered by all ranks together; leaving it without an error waits until all of them do.

    Args:
        silence_s: how long a rank may give no sign; 0 = no heartbeat. lost: called, with a line that names the rank,
            from a thread while the main one waits for ever; it should not return. interrupt: what listens to signals.

    step: gives the step this rank is at; what the others last heard of it is named with it.
    """

    def __init__(
        self, world: World, silence_s: int, lost: Callable[[str], None], interrupt: Optional[Interrupt] = None
    ) -> None:
        self.step: Callable[[], int] = lambda: 0
        self._world = world
        self._silence_s = silence_s
        self._lost = lost
        self._interrupt = interrupt or Interrupt()
        self._fault = ""
        self._leaving = False
        self._hurry, self._main_knows = threading.Event(), threading.Event()
        self._thread: Optional[threading.Thread] = None

    def __enter__(self) -> Heartbeat:
        if self._world.size > 1 and self._silence_s:
            self._roll = build_roll(self._silence_s)
            self._interrupt.meets(speaks=self._world.is_main)
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], _trace: Optional[TracebackType]
    ) -> None:
        if self._thread is None:
            return
        self._main_knows.set()
        if kind is None:
            self._leaving = True
            self._hurry.set()
            self._thread.join()
            if self._fault:
                raise RuntimeError(self._fault)

    def explain(self, error: BaseException) -> None:
        """Note the name of the missing rank on an error that only says that one is missing, if one is."""
        if self._thread is None or not is_lost_peer(error):
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher that has noticed as well must not cut this short
        self._main_knows.set()
        self._hurry.set()
        # All ranks may be alive: the communication itself can fail, on some of them or on all.
        self._thread.join(self._silence_s + GRACE_S)
        if self._fault:
            error.add_note(self._fault)

    def _beat(self) -> None:
        steps = (0,) * self._world.size
        try:
            while True:
                told, ready = self._interrupt.number, self._interrupt.ready
                signs = call_roll([self.step(), self._leaving, told, ready], self._roll, self._world)
                steps, leaving, told, ready = zip(*signs, strict=True)
                if all(leaving):
                    return
                if any(told) and all(ready):  # what every rank sees in this same roll
                    self._interrupt.leave_together(max(told))
                self._hurry.wait(INTERVAL_S)
        except LostRank as error:
            self._fault = f"rank {error.rank} gives no sign of life since step {steps[error.rank]}"
        if not self._main_knows.wait(GRACE_S):
            self._lost(self._fault)
