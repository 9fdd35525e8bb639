"""Every placement gives the features of the replicated teacher, whatever the number of ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment


def on_ranks(ranks: int, worker: str, *arguments: str, timeout: float = 200) -> str:
    """Run a worker script of this folder under torchrun; returns what it printed."""
    script = Path(__file__).with_name(worker)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script),
         *arguments],
        env=environment(), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_features_are_the_replicated_ones_at_every_block(ranks: int) -> None:
    assert on_ranks(ranks, "placement_worker.py").count("placements equal") == ranks
