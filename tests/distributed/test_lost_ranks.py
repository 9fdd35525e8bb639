"""A rank that dies, hangs or goes its own way ends the whole run within a minute, and the output names it."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from forked import Forked
from runs import finish, fork, on_ranks, start, write_config

PROMPTLY_S = 60
SLOW = pytest.mark.slow


@contextmanager
def training(
    config: Path, launcher: str, ranks: int
) -> Iterator[tuple[subprocess.Popen[str] | Forked, list[psutil.Process]]]:
    """A run in the middle of its training: what started it, and its ranks in order."""
    process = start(config, launcher=launcher, processes=ranks)
    try:
        for _ in range(1200):
            assert process.poll() is None, process.communicate()[0][-3000:]
            if any(file.stat().st_size > 4000 for file in (config.parent / "run").glob("tensorboard/*")):
                break
            time.sleep(0.1)
        yield process, ranks_of(process, ranks)
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()


def ranks_of(process: subprocess.Popen[str] | Forked, ranks: int) -> list[psutil.Process]:
    """In order; a launcher's are told by their environment, without the workers below them."""
    if isinstance(process, Forked):
        return [psutil.Process(pid) for pid in process.ranks]
    below = [child for child in psutil.Process(process.pid).children(recursive=True) if "RANK" in child.environ()]
    found = {int(child.environ()["RANK"]): child for child in reversed(below)}  # a rank comes before its workers
    assert sorted(found) == list(range(ranks))
    return [found[rank] for rank in range(ranks)]


@pytest.mark.parametrize(
    ("placement", "launcher", "victim", "sent"),
    [
        ("pipelined", "forked", 1, signal.SIGKILL),
        pytest.param("pipelined", "torchrun", 1, signal.SIGKILL, marks=SLOW),
        pytest.param("sharded", "deepspeed", 2, signal.SIGSTOP, marks=SLOW),
        pytest.param("sharded", "deepspeed", 1, signal.SIGKILL, marks=SLOW),
        pytest.param("pipelined", "deepspeed", 0, signal.SIGKILL, marks=SLOW),
        pytest.param("pipelined", "torchrun", 1, signal.SIGSTOP, marks=SLOW),
        pytest.param("replicated", "torchrun", 0, signal.SIGSTOP, marks=SLOW),
    ],
)
def test_a_lost_rank_ends_the_run(placement: str, launcher: str, victim: int, sent: int, tmp_path: Path) -> None:
    config = write_config(tmp_path, epochs=300, teacher={"placement": placement}, data={"global_batch": 48})
    with training(config, launcher, ranks=3) as (process, ranks):
        ranks[victim].send_signal(sent)
        began = time.monotonic()
        printed, _ = process.communicate(timeout=2 * PROMPTLY_S)
        took = time.monotonic() - began
    assert process.returncode != 0
    named = re.findall(r"\[rank \d\]: error: .*rank (\d) gives no sign of life since step \d+", printed)
    assert named and set(named) == {str(victim)}, printed[-4000:]  # a launcher may silence all but the first to say so
    assert took < PROMPTLY_S
    print(f"over after {took:.0f} s")


def unequal(placement: str, fault: str) -> list[str]:
    """What the ranks of a worker with this fault complained of."""
    began = time.monotonic()
    done = finish(fork(Path(__file__).with_name("lost_worker.py"), placement, fault, processes=3), 2 * PROMPTLY_S)
    assert done.returncode != 0
    assert time.monotonic() - began < PROMPTLY_S
    return [line for line in done.stdout.splitlines() if line.startswith("leap_dist [rank ")]


@pytest.mark.parametrize(
    ("placement", "fault", "where"),
    [
        ("pipelined", "once too often", r"rank 1 is at teacher call 7: .*, rank 0 at step 3 on block 1"),
        pytest.param("sharded", "not at all", r"rank 1 is at step 3 on block 1, rank 0 at teacher call 6", marks=SLOW),
        pytest.param(
            "sharded", "another block", "rank 1 is at teacher call 6: its move to block 2, rank 0", marks=SLOW
        ),
        pytest.param(
            "pipelined", "more images", "rank 1 is at teacher call 6: 8 images to block 6, rank 0", marks=SLOW
        ),
    ],
)
def test_ranks_that_call_the_teacher_unequally_are_told_so(placement: str, fault: str, where: str) -> None:
    lines = unequal(placement, fault)
    assert lines and all(re.search(where, line) for line in lines), lines


@SLOW
@pytest.mark.parametrize("placement", ["pipelined", "sharded"])
def test_an_error_inside_a_teacher_call_ends_all_ranks(placement: str) -> None:
    lines = unequal(placement, "error inside")
    own = [line for line in lines if line.startswith("leap_dist [rank 1]: error: ")]
    assert len(own) == 1 and re.search("MemoryError|Stage 1. failed", own[0]), lines  # a pipeline words it its own way
    others = [line for line in lines if "[rank 1]" not in line]
    assert all("another rank is gone, rank 1 gives no sign of life since step" in line for line in others), lines


def test_every_group_waits_half_an_hour() -> None:
    """NCCL's own default is ten minutes, also for the group that DeepSpeed makes for the gradients."""
    assert "5 groups wait" in on_ranks(2, "patience_worker.py")
