"""Precisions, metrics, modes and optimizers that a user may choose, each as a real run of two ranks that learns."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import run_ok, scalars, write_config

MODES = {
    "bf16 at stage 3, cosine score": ("engine.precision=bf16", "engine.zero_stage=3", "curriculum.metric=cosine"),
    "lars in fp16, mean score": (
        "optim.name=lars", "optim.lr=2", "engine.precision=fp16", "curriculum.reduction=mean",
    ),
}  # fmt: skip
SLOW_MODES = {
    "fp16 at stage 2, accumulation, bf16 teacher": (
        "engine.precision=fp16", "engine.zero_stage=2", "engine.accumulation=2", "teacher.dtype=bf16",
    ),
    "every layer at stage 3": (
        "curriculum.mode=all_layers", "curriculum.start=null", "student.kwargs.depth=6", "engine.zero_stage=3",
    ),
    "one fixed block": ("curriculum.mode=fixed", "curriculum.start=null", "curriculum.block=3"),
    "calibrated start, head reset, restarted rate": (
        "curriculum.start=null", "curriculum.reset_head=true", "optim.on_advance=restart",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        *(pytest.param(overrides, id=name) for name, overrides in MODES.items()),
        *(pytest.param(overrides, id=name, marks=pytest.mark.slow) for name, overrides in SLOW_MODES.items()),
    ],
)
def test_a_run_learns(overrides: tuple[str, ...], tmp_path: Path) -> None:
    run_ok(write_config(tmp_path), *overrides)
    losses = scalars(tmp_path / "run", "loss/total")
    assert len(losses) == 23
    assert losses[22] < 0.85 * losses[0]
