"""Where the time goes: every second once, on the clock it was spent on."""

from __future__ import annotations

import time

import pytest
import torch

from leap_dist.runtime import timing
from leap_dist.runtime.timing import PhaseTimer


def test_phases_add_up_over_their_bodies() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.phase("teacher"):
            time.sleep(0.02)
    with timer.phase("data", host=True):
        time.sleep(0.01)
    totals = timer.totals()
    assert 0.04 <= totals["teacher"] < 0.2 and 0.01 <= totals["data"] < 0.1


class Sleeper(torch.nn.Module):
    def forward(self, seconds: float) -> None:
        time.sleep(seconds)


def test_a_watched_module_is_timed_wherever_it_is_called_and_taken_off_what_is_around_it() -> None:
    timer, module = PhaseTimer(torch.device("cpu")), Sleeper()
    timer.watch(module, "match")
    began = time.perf_counter()
    with timer.phase("student.forward"):
        for _ in range(2):
            module(0.02)
        time.sleep(0.02)
    elapsed, totals = time.perf_counter() - began, timer.totals()
    assert totals["match"] >= 0.04 and totals["student.forward"] >= 0.02
    assert sum(totals.values()) == pytest.approx(elapsed, abs=0.002)


def test_inside_the_only_phase_no_other_counts() -> None:
    timer, module = PhaseTimer(torch.device("cpu")), Sleeper()
    timer.watch(module, "match")
    with timer.only("calibration"):
        module(0.02)
        with timer.phase("communication"):
            time.sleep(0.01)
    totals = timer.totals()
    assert set(totals) == {"calibration"} and 0.03 <= totals["calibration"] < 0.2
    module(0.01)
    assert timer.totals()["match"] >= 0.01


def test_a_second_session_counts_on() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    timer.carry_on({"teacher": 100.0})
    with timer.phase("teacher"):
        pass
    assert 100.0 < timer.totals()["teacher"] < 100.5


class FakeEvent:
    """A CUDA event on a device whose clock and progress the test sets."""

    clock = 0.0
    done_until = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock

    def query(self) -> bool:
        return self.at <= FakeEvent.done_until

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)

    def synchronize(self) -> None:
        raise AssertionError("waited for the device")


def test_on_cuda_only_finished_work_is_read_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda *_: pytest.fail("waited for the device"))
    timer = PhaseTimer(torch.device("cuda"))
    with timer.phase("teacher"):
        FakeEvent.clock += 5
    with timer.phase("student.forward"):
        FakeEvent.clock += 2
        with timer.phase("match"):
            FakeEvent.clock += 1
        with timer.phase("decide", host=True):  # another clock: takes nothing off the device's phase
            time.sleep(0.01)
    FakeEvent.done_until = 5.5
    assert timer.totals() == {"teacher": 5, "decide": pytest.approx(0.01, abs=0.05)}
    FakeEvent.done_until = 8
    totals = timer.totals()
    assert (totals["teacher"], totals["match"], totals["student.forward"]) == (5, 1, 2)
