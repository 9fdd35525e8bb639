"""A run survives its cluster: killed, told to stop, or continued, it gives the same numbers as an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import command, environment, launch, run_ok, scalars, write_config

STEPS_PER_EPOCH = 23
LONG = {"epochs": 2, "data": {"workers": 1}, "checkpoint": {"every_steps": 5, "every_epochs": 1}}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with augmentation, mixup and a loader worker, in one go."""
    folder = tmp_path_factory.mktemp("uncut")
    run_ok(write_config(folder, **LONG))
    return folder / "run"


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(config, *overrides),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / f"step{step:08d}" / "run.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes under the launcher, by rank; loader workers are their children, not they."""
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank" in " ".join(p.cmdline())]
    ranks = [p for p in found if p.parent() not in found]
    return sorted(ranks, key=lambda p: int(p.environ()["RANK"]))


def assert_same_numbers(run: Path, uncut: Path) -> None:
    for tag in ("loss/total", "curriculum/block", "curriculum/cka"):
        assert scalars(run, tag) == scalars(uncut, tag), tag
    assert decisions(run) == decisions(uncut)


def decisions(run: Path) -> list[dict[str, Any]]:
    """Every line of the ledger, without the seconds, which differ."""
    lines = [json.loads(text) for text in (run / "curriculum.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_killed_at_any_moment_it_continues_bitwise(uncut: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, **LONG)
    process = start(config)
    wait_for_checkpoint(tmp_path / "run", process, 10)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run_ok(config, "resume=auto")
    assert_same_numbers(tmp_path / "run", uncut)


def test_sigterm_to_one_rank_saves_on_all_and_exits_0(uncut: Path, tmp_path: Path) -> None:
    """As a preempted node would; the rest is continued at the same world size."""
    config = write_config(tmp_path, **LONG)
    process = start(config)
    wait_for_checkpoint(tmp_path / "run", process, 5)
    ranks_of(process)[1].send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output[-3000:]
    assert "continue with resume=auto" in output
    assert not (tmp_path / "run" / "summary.json").exists()
    run_ok(config, "resume=auto")
    assert_same_numbers(tmp_path / "run", uncut)


def test_sigterm_to_the_launcher_saves_with_loader_workers_running(uncut: Path, tmp_path: Path) -> None:
    """The deepspeed launcher signals loader workers too, before their rank."""
    config = write_config(tmp_path, **LONG)
    process = start(config)
    wait_for_checkpoint(tmp_path / "run", process, 5)
    launcher = next(
        p for p in psutil.Process(process.pid).children() if "deepspeed.launcher.launch" in " ".join(p.cmdline())
    )
    launcher.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert "continue with resume=auto" in output, output[-3000:]
    assert "Traceback" not in output
    run_ok(config, "resume=auto")
    assert_same_numbers(tmp_path / "run", uncut)


def test_a_finished_run_resumed_only_reports_again(uncut: Path) -> None:
    output = run_ok(uncut.parent / "config.yaml", "resume=auto")
    assert f"{2 * STEPS_PER_EPOCH} in" in output


def test_another_world_size_is_refused_for_now(uncut: Path) -> None:
    done = launch(uncut.parent / "config.yaml", "resume=auto", processes=1)
    assert done.returncode == 2
    assert "saved with world_size=2, this run has world_size=1" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_continues_bitwise(stage: int, tmp_path: Path) -> None:
    overrides = (f"engine.zero_stage={stage}", "curriculum.reset_head=true")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        write_config(folder, **LONG)
    run_ok(whole / "config.yaml", *overrides)
    process = start(cut / "config.yaml", *overrides)
    wait_for_checkpoint(cut / "run", process, 10)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run_ok(cut / "config.yaml", *overrides, "resume=auto")
    assert_same_numbers(cut / "run", whole / "run")
