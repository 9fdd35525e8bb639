"""Runs that are killed again and again, and runs that are told to leave at any moment.

A killed run is started again until it is through; then it has the results of one that nobody touched, to the bit.
"""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from runs import run_ok, start, write_config
from trials import LIMIT_S, Tally, complaints, results, signalled, wait

LONG = {"checkpoint": {"every_steps": 3}, "data": {"workers": 0, "global_batch": 128}}
JUDGED = {
    "data": LONG["data"] | {"val": "digits"},
    "evaluation": {"every_epochs": 1, "quick_images": 100, "max_train_images": 100, "probe_epochs": 2},
}
# Where kills are wanted: what lies in the run folder at that moment.
MOMENTS = (
    "config.yaml",
    "checkpoints/.step*",
    "checkpoints/step*",
    "evaluation.jsonl",
    "student.safetensors",
    ".*.partial",
)


def there(run: Path, pattern: str, already: set[Path]) -> Callable[[], bool]:
    """Whether something new of this name lies in the folder."""
    return lambda: any(path not in already for path in run.glob(pattern))


def killed_until_done(config: Path, kills: int, seed: int, processes: int, tally: Tally) -> None:
    """Start the run again and again, and kill it at moments drawn by `seed`; the last start is left in peace."""
    draw, run = random.Random(seed), config.parent / "run"
    for number in range(kills):
        pattern = MOMENTS[number % len(MOMENTS)]
        process = start(config, "resume=auto", processes=processes)
        if wait(process, there(run, pattern, set(run.glob(pattern)))):
            try:
                process.wait(draw.choice((0, 0, 0.01, 0.05, 0.3)))
            except Exception:  # it is still at it
                os.killpg(process.pid, signal.SIGKILL)
        process.wait(LIMIT_S)
        done = process.communicate()[0]
        tally.note(not complaints(done), f"kill {number} of seed {seed} at {pattern}: {complaints(done)}")
    run_ok(config, "resume=auto", processes=processes, timeout=LIMIT_S)


def chain(tmp_path: Path, kills: int, seed: int, processes: int, stage: int) -> None:
    tally, zero = Tally(f"kills, {processes} ranks, ZeRO {stage}"), {"engine": {"zero_stage": stage}}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, **(LONG | JUDGED | zero))
    run_ok(tmp_path / "whole/config.yaml", processes=processes, timeout=LIMIT_S)
    killed_until_done(tmp_path / "killed/config.yaml", kills, seed, processes, tally)
    assert results(tmp_path / "killed/run") == results(tmp_path / "whole/run")
    tally.close()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "stage"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_a_run_that_is_killed_25_times_has_the_results_of_one_that_is_not(
    processes: int, stage: int, tmp_path: Path
) -> None:
    chain(tmp_path, kills=25, seed=processes + stage, processes=processes, stage=stage)


STOPPED = re.compile(r"^leap_dist: stopped (by SIG\w+|at step \d+)", re.M)


def told(tmp_path: Path, sent: signal.Signals, to: list[int], moment: str, processes: int) -> tuple[int, str]:
    """Status and words of a run that is told at a moment; it must be over within a minute, and is in seconds."""
    config = write_config(tmp_path, **(LONG | JUDGED))
    run = tmp_path / "run"
    when = (lambda: True) if moment == "start" else there(run, moment, set())
    done, took = signalled(config, sent, to, when, processes=processes)
    assert took < 60 and "Traceback" not in done.stdout, done.stdout[-2000:]
    return done.returncode, done.stdout


def test_told_at_its_very_start_it_leaves_with_the_signals_status(tmp_path: Path) -> None:
    for sent in (signal.SIGINT, signal.SIGUSR1):
        status, said = told(tmp_path, sent, [0], "start", processes=1)
        assert status == 128 + sent
        assert f"stopped by {sent.name} before its first step" in said


CASES = [
    (signal.SIGTERM, [1], "run/.lock", 2),
    (signal.SIGTERM, [0, 1], "config.yaml", 2),
    (signal.SIGHUP, [0], "curriculum.jsonl", 1),
    (signal.SIGUSR2, [1], "checkpoints/.step00000011.partial", 2),
    (signal.SIGINT, [0], "evaluation.jsonl", 1),
    (signal.SIGTERM, [1], "student.safetensors", 2),
    (signal.SIGUSR1, [0], "student.safetensors", 1),
    (signal.SIGTERM, [0], "summary.json", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "to", "moment", "processes"), CASES)
def test_told_at_any_moment_all_ranks_leave_and_the_same_command_goes_on(
    sent: signal.Signals, to: list[int], moment: str, processes: int, tmp_path: Path
) -> None:
    status, said = told(tmp_path, sent, to, moment.removeprefix("run/"), processes)
    done = status == 0 and not STOPPED.search(said)  # it was faster
    assert done or (status in (0, 128 + sent) and len(STOPPED.findall(said)) == 1), (status, said[-2000:])
    assert not complaints(said)
    run_ok(write_config(tmp_path, **(LONG | JUDGED)), "resume=auto", processes=processes, timeout=LIMIT_S)
    assert (tmp_path / "run/summary.json").exists()
