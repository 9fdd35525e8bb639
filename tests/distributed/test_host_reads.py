"""Nothing in a step waits for the device but the decision: on a GPU a single read would drain it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import on_ranks


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.name=adamw", "student.ema_decay=0.9"],
        ["optim.name=lars", "curriculum.metric=cosine", "engine.precision=bf16"],
    ],
    ids=["adamw", "lars"],
)
def test_a_step_reads_nothing(overrides: list[str], tmp_path: Path) -> None:
    """From the teacher's pass to the optimizer's update, with a score on every step and at two target blocks."""
    assert on_ranks(2, "host_reads_worker.py", str(tmp_path / "run"), *overrides).count("no reads") == 2
