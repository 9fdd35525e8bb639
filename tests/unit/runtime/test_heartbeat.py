"""What a rank says whose communication failed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.distributed import DistBackendError

from leap_dist import train
from leap_dist.runtime import heartbeat
from leap_dist.runtime.distributed import World
from leap_dist.runtime.heartbeat import Heartbeat


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second rank that answers every roll call, until both leave."""
    over = threading.Event()

    def both_alive(mine: list[int], *_: object) -> list[list[int]]:
        time.sleep(0.01)
        return [[mine[0], over.is_set(), 0, False], [7, over.is_set(), 0, False]]

    monkeypatch.setattr(heartbeat, "build_roll", lambda _: None)
    monkeypatch.setattr(heartbeat, "call_roll", both_alive)
    monkeypatch.setattr(heartbeat, "GRACE_S", 0.2)
    yield
    over.set()
    for thread in threading.enumerate():
        if thread.name == "heartbeat":
            thread.join()


def test_a_failure_while_all_are_alive_is_not_waited_for_without_end(living: None) -> None:
    previous = signal.getsignal(signal.SIGTERM)
    error = DistBackendError("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error")
    try:
        with (
            pytest.raises(DistBackendError),
            Heartbeat(World(0, 2, 0, 2, torch.device("cpu")), 1, lambda _: None) as beating,
        ):
            began = time.monotonic()
            beating.explain(error)
            raise error
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert time.monotonic() - began < 10
    assert not hasattr(error, "__notes__")


def test_what_the_library_says_of_failed_communication_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise DistBackendError(
            "NCCL error in: NCCLUtils.cpp:77, invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0\n"
            "Exception raised from create at NCCLUtils.cpp:77 (most recent call first):\nframe #0: c10::Error"
        )

    monkeypatch.setattr(train, "parse", lambda *_: None)
    monkeypatch.setattr(train, "train", fail)
    assert train.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("invalid usage Last error: Duplicate GPU detected : rank 1 and rank 0")
