"""curriculum.reset_head under a live engine: seen by the next forward, not undone by the next step, equal on ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runs import environment

SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])
def test_reset_head_holds_at_every_zero_stage(stage: int) -> None:
    worker = Path(__file__).with_name("reset_worker.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker), str(stage)],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"reset at stage {stage}") == 2
