"""Pictures of tokens in real runs: under every placement, and at no cost to what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import TINY, run_ok, scalars, write_config

SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def assert_unnoticed(
    folder: Path, *overrides: str, processes: int, names: tuple[str, ...] = ("",), **sections: Any
) -> None:
    """With pictures and without: the same student, byte by byte, the same losses and decisions."""
    config = write_config(folder, **{"epochs": 0.25, **sections})
    with_them, without = folder / "with", folder / "without"
    run_ok(config, f"output={with_them}", "telemetry.pictures_every=5", *overrides, processes=processes)
    run_ok(config, f"output={without}", *overrides, processes=processes)
    for name in names:
        found = sorted(path.name for path in (with_them / name / "pictures").iterdir())
        assert found == ["tokens.png", "tokens_step_0000005.png"]  # of six steps
        ours, theirs = ((run / name / "student.safetensors").read_bytes() for run in (with_them, without))
        assert ours == theirs
        for tag in ("loss/total", "curriculum/block", "curriculum/cka"):
            assert scalars(with_them / name, tag) == scalars(without / name, tag)
        assert not (without / name / "pictures").exists()


def test_a_run_does_not_notice(tmp_path: Path) -> None:
    """Two ranks that share every weight of student and teacher, random depth, and a teacher that works ahead."""
    assert_unnoticed(
        tmp_path, "teacher.placement=sharded", "teacher.prefetch=1", "student.kwargs.drop_path_rate=0.3",
        processes=2, engine={"zero_stage": 3, "deepspeed": SHARD_ALL, "accumulation": 2},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["replicated", "pipelined"])
def test_a_cohort_does_not_notice(placement: str, tmp_path: Path) -> None:
    """Nor does a student with batch norms, a map at another grid, and images of its own size."""
    students = {
        "vit": {"student.kwargs": TINY["student"]["kwargs"], "curriculum.threshold": 0.75},
        "convolutional": {
            "student.model": "mobilenetv3_small_050", "student.image_size": 64, "student.reduction": 16,
            "objective.cls_weight": 0.0,
        },
    }  # fmt: skip
    assert_unnoticed(
        tmp_path, f"teacher.placement={placement}", processes=2, names=tuple(students), students=students,
        student={"kwargs": {}}, engine={"zero_stage": 1},
    )  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_draws_what_was_still_to_come(tmp_path: Path) -> None:
    config = write_config(tmp_path, epochs=0.5, checkpoint={"every_steps": 5, "keep": 9})
    run_ok(config, "telemetry.pictures_every=4")
    rest = tmp_path / "rest"
    checkpoint = tmp_path / "run" / "checkpoints" / "step00000005"
    run_ok(config, f"output={rest}", f"resume={checkpoint}", "telemetry.pictures_every=4")
    for name in ("tokens.png", "tokens_step_0000008.png"):
        assert (rest / "pictures" / name).read_bytes() == (tmp_path / "run" / "pictures" / name).read_bytes()
    assert not (rest / "pictures" / "tokens_step_0000004.png").exists()
    (rest / "pictures" / "tokens.png").unlink()  # a kill between the last checkpoint and the picture
    run_ok(config, f"output={rest}", "resume=auto", "telemetry.pictures_every=4")
    assert (rest / "pictures" / "tokens.png").exists()
