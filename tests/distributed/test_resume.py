"""A run survives its cluster: killed, told to stop, or continued, it gives the same numbers as an uninterrupted one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from forked import Forked
from runs import HANG_S, finish, run_ok, scalars, start, write_config

STEPS_PER_EPOCH = 23
LONG = {"epochs": 2, "data": {"workers": 1}, "checkpoint": {"every_steps": 5, "every_epochs": 1}}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with augmentation, mixup and a loader worker, in one go."""
    folder = tmp_path_factory.mktemp("uncut")
    run_ok(write_config(folder, **LONG))
    return folder / "run"


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str] | Forked, step: int) -> None:
    deadline = time.monotonic() + HANG_S
    while not (run / "checkpoints" / f"step{step:08d}" / "run.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)


def killed(config: Path, *overrides: str) -> None:
    """Start a run, and kill ranks and workers some time after the checkpoint of step 10."""
    process = start(config, *overrides)
    wait_for_checkpoint(config.parent / "run", process, 10)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def told_to_stop(config: Path, tell: Callable[[Any], None], launcher: str = "forked") -> tuple[int, str]:
    """Start a run, and `tell` it to stop after the checkpoint of step 5: status, output."""
    process = start(config, launcher=launcher)
    wait_for_checkpoint(config.parent / "run", process, 5)
    tell(process)
    done = finish(process)
    assert "continue with resume=auto" in done.stdout, done.stdout[-3000:]
    assert not (config.parent / "run" / "summary.json").exists()
    return done.returncode, done.stdout


def launcher_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The deepspeed launcher of this node, under the runner."""
    children = psutil.Process(process.pid).children()
    return next(child for child in children if "deepspeed.launcher.launch" in " ".join(child.cmdline()))


def assert_continues(config: Path, uncut: Path, *overrides: str) -> None:
    output = run_ok(config, *overrides, "resume=auto")
    assert re.search(rf"continues at step \d+ of {2 * STEPS_PER_EPOCH} \(.*/checkpoints/step\d+\)$", output, re.M)
    for tag in ("loss/total", "curriculum/block", "curriculum/cka"):
        assert scalars(config.parent / "run", tag) == scalars(uncut, tag), tag
    assert decisions(config.parent / "run") == decisions(uncut)


def decisions(run: Path) -> list[dict[str, Any]]:
    """Every line of the ledger, without the seconds, which differ."""
    lines = [json.loads(text) for text in (run / "curriculum.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_killed_at_any_moment_it_continues_bitwise(uncut: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, **LONG)
    killed(config)
    assert_continues(config, uncut)


def test_sigterm_to_one_rank_saves_on_all_and_exits_0(uncut: Path, tmp_path: Path) -> None:
    """As a preempted node would."""
    config = write_config(tmp_path, **LONG)
    status, output = told_to_stop(config, lambda process: os.kill(process.ranks[1], signal.SIGTERM))
    assert status == 0, output[-3000:]
    assert_continues(config, uncut)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_with_loader_workers_running(uncut: Path, tmp_path: Path) -> None:
    """The deepspeed launcher signals loader workers too, before their rank."""
    config = write_config(tmp_path, **LONG)
    _, output = told_to_stop(config, lambda process: launcher_of(process).terminate(), "deepspeed")
    assert "Traceback" not in output
    assert_continues(config, uncut)


@pytest.mark.slow
def test_ctrl_c_saves_with_loader_workers_running(uncut: Path, tmp_path: Path) -> None:
    """A terminal signals launchers, ranks and loader workers all at once."""
    config = write_config(tmp_path, **LONG)
    told_to_stop(config, lambda process: os.killpg(process.pid, signal.SIGINT), "deepspeed")
    assert_continues(config, uncut)


def test_a_finished_run_resumed_only_reports_again(uncut: Path) -> None:
    output = run_ok(uncut.parent / "config.yaml", "resume=auto")
    assert f"{2 * STEPS_PER_EPOCH} in" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        *((stage, "curriculum.reset_head=true") for stage in (1, 2, 3)),
        *((stage, f"student.remedy={remedy}") for stage in (0, 3) for remedy in ("lift", "wide_last")),
    ],
)
def test_every_zero_stage_continues_bitwise(stage: int, more: str, tmp_path: Path) -> None:
    overrides = (f"engine.zero_stage={stage}", more)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        write_config(folder, **LONG)
    run_ok(whole / "config.yaml", *overrides)
    killed(cut / "config.yaml", *overrides)
    assert_continues(cut / "config.yaml", whole / "run", *overrides)
