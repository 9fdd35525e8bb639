"""curriculum.reset_head under a live engine: seen by the next forward, not undone by the next step, equal on ranks."""

from __future__ import annotations

import pytest

from runs import on_ranks

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "ranks"), [(0, 2), pytest.param(1, 2, marks=SLOW), pytest.param(2, 2, marks=SLOW), (3, 3)]
)
def test_reset_head_holds_at_every_zero_stage(stage: int, ranks: int) -> None:
    """Three ranks do not divide the head's bias of 20: ZeRO-3 pads their parts of it."""
    assert on_ranks(ranks, "reset_worker.py", str(stage)).count(f"reset at stage {stage}") == ranks
