"""curriculum.reset_head under a live engine: seen by the next forward, not undone by the next step, equal on ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runs import HANG_S, environment

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "ranks"), [(0, 2), pytest.param(1, 2, marks=SLOW), pytest.param(2, 2, marks=SLOW), (3, 3)]
)
def test_reset_head_holds_at_every_zero_stage(stage: int, ranks: int) -> None:
    """Three ranks do not divide the head's bias of 20: ZeRO-3 pads their parts of it."""
    worker = Path(__file__).with_name("reset_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launcher, str(worker), str(stage)],
        env=environment(), capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"reset at stage {stage}") == ranks
