"""Where the time of a step goes, without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

# In the order of a step. match: heads, loss, their gradients and the score. communication: of losses and score over
# ranks. decide, broadcast: host time; the others are the device's on CUDA, but for data.
PHASES = (
    "data", "teacher", "student.forward", "match", "communication", "student.backward", "optimizer", "decide",
    "broadcast",
)  # fmt: skip

# Before the first step: the teacher is read from the disk, and what is compiled at its first use is compiled, so its
# seconds say nothing about a step's.
CALIBRATION = "calibration"

# What a run does once for all of its students; the other phases are each student's own.
SHARED = ("data", "teacher", CALIBRATION)


class _Span(NamedTuple):
    """A phase on the device's clock; `outer` is the phase around it, if any."""

    name: str
    outer: Optional[str]
    begin: torch.cuda.Event
    end: torch.cuda.Event


def around_forward(module: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> list[RemovableHandle]:
    """Run every forward pass of `module` inside a new `context()`, until the handles are removed."""
    running: list[AbstractContextManager[Any]] = []

    def begin(*_: Any) -> None:
        running.append(context())
        running[-1].__enter__()

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


class PhaseTimer:
    """Seconds spent in named phases; device time on CUDA, wall time on CPU. A phase inside another is
    taken off it, where both are on one clock; on CUDA, phases of two streams (a teacher that works ahead) both count.

    tracing: phases are also ranges of torch's profiler.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.tracing = False
        self._muted = False
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: dict[bool, list[str]] = {True: [], False: []}  # by clock: the device's, the host's
        self._unread: deque[_Span] = deque()

    @contextmanager
    def phase(self, name: str, host: bool = False) -> Iterator[None]:
        """Time the body. `host`: wall time also on CUDA, for work the device has no part in."""
        if self._muted:
            yield
            return
        on_device = self.on_cuda and not host
        running = self._running[on_device]
        outer = running[-1] if running else None
        running.append(name)
        begin = _now(on_device)
        with record_function(name) if self.tracing else nullcontext():
            yield
        end = _now(on_device)
        running.pop()
        if on_device:
            self._unread.append(_Span(name, outer, begin, end))
        else:
            self._add(name, outer, end - begin)

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Time the body, which ends with nothing left for the device to do, by the wall clock, as this one phase: those
        inside it do not count.
        """
        begin = time.perf_counter()
        with self.muted():
            yield
        self._add(name, None, time.perf_counter() - begin)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Time no phase of the body."""
        self._muted = True
        yield
        self._muted = False

    def watch(self, module: nn.Module, name: str) -> None:
        """Time every forward pass of `module` as phase `name`, wherever it is called from."""
        around_forward(module, lambda: self.phase(name))

    def totals(self) -> dict[str, float]:
        """Seconds so far by phase, of everything the device has finished; does not wait for the rest."""
        while self._unread and self._unread[0].end.query():
            span = self._unread.popleft()
            self._add(span.name, span.outer, span.begin.elapsed_time(span.end) / 1e3)
        return dict(self._seconds)

    def carry_on(self, seconds: Mapping[str, float]) -> None:
        """Count on from the `totals` of an earlier session of the run."""
        self._seconds.update(seconds)

    def _add(self, name: str, outer: Optional[str], seconds: float) -> None:
        self._seconds[name] += seconds
        if outer is not None:
            self._seconds[outer] -= seconds


def _now(on_device: bool) -> Any:
    if not on_device:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class RunClock:
    """Seconds a run has trained, over all its sessions."""

    def __init__(self) -> None:
        self.start(0.0)

    def start(self, seconds: float) -> None:
        """Count on from `seconds`, of earlier sessions."""
        self._zero = time.perf_counter() - seconds

    def seconds(self) -> float:
        """Up to now."""
        return time.perf_counter() - self._zero

    def pause(self) -> None:
        """What follows is no training."""
        self._paused = time.perf_counter()

    def go_on(self) -> float:
        """Training goes on; the seconds for which the clock stood."""
        stood = time.perf_counter() - self._paused
        self._zero += stood
        return stood
