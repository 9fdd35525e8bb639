"""The same run, however it is spread: over ZeRO stages, ranks, accumulation steps and launchers."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import run_ok, scalars, write_config

TOLERANCE = 1e-4


def assert_same_run(one: Path, other: Path) -> None:
    losses, others = scalars(one, "loss/total"), scalars(other, "loss/total")
    assert losses.keys() == others.keys() and len(losses) == 23
    assert max(abs(losses[step] - others[step]) for step in losses) < TOLERANCE
    norms, others = scalars(one, "update/grad_norm"), scalars(other, "update/grad_norm")
    assert len(norms) == 22 and norms == pytest.approx(others, rel=1e-2)
    blocks = scalars(one, "curriculum/block")
    assert blocks == scalars(other, "curriculum/block")
    assert len(set(blocks.values())) >= 3, "too few advances to show anything"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks at stage 0 under torchrun, with augmentation and mixup."""
    folder = tmp_path_factory.mktemp("reference")
    run_ok(write_config(folder), launcher="torchrun")
    return folder / "run"


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_zero_stages_train_to_the_same_losses(stage: int, reference: Path, tmp_path: Path) -> None:
    # Threshold 0: everything of this small student is partitioned and gathered, nothing stays whole.
    sharding = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    run_ok(write_config(tmp_path, engine={"zero_stage": stage, "deepspeed": sharding}))
    assert_same_run(reference, tmp_path / "run")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plain python process with the whole batch, augmented and mixed up."""
    folder = tmp_path_factory.mktemp("one-rank")
    run_ok(write_config(folder), launcher="python", processes=1)
    return folder / "run"


def test_two_ranks_of_half_the_batch_follow_one_rank(one_rank: Path, reference: Path) -> None:
    assert_same_run(one_rank, reference)


def test_accumulation_follows_one_batch(one_rank: Path, tmp_path: Path) -> None:
    run_ok(write_config(tmp_path, engine={"accumulation": 2}), processes=1)
    assert_same_run(one_rank, tmp_path / "run")
