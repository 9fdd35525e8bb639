"""Precisions, metrics, modes and optimizers that a user may choose, each as a real run of two ranks that learns."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
from safetensors.torch import load_file

from leap_dist.curriculum.ledger import LEDGER
from leap_dist.evaluation.periodic import VALIDATION
from runs import run_ok, scalars, write_config

MODES = {
    "a wide last block in bf16 at stage 3, cosine score": (
        "student.remedy=wide_last", "engine.precision=bf16", "engine.zero_stage=3", "curriculum.metric=cosine",
    ),
    "lars in fp16, mean score": (
        "optim.name=lars", "optim.lr=2", "engine.precision=fp16", "curriculum.reduction=mean",
    ),
}  # fmt: skip
SLOW_MODES = {
    "bf16 at stage 3, cosine score": ("engine.precision=bf16", "engine.zero_stage=3", "curriculum.metric=cosine"),
    "a wide last block at stage 3": ("student.remedy=wide_last", "engine.zero_stage=3"),
    "fp16, accumulation, bf16 teacher": ("engine.precision=fp16", "engine.accumulation=2", "teacher.dtype=bf16"),
    "every layer at stage 3": (
        "curriculum.mode=all_layers", "curriculum.start=null", "student.kwargs.depth=6", "engine.zero_stage=3",
    ),
    "lift": ("student.remedy=lift", "student.kwargs.drop_path_rate=0.1"),
    "lift and a projector, bf16 at stage 2": (
        "student.remedy=lift", "objective.head=linear", "engine.precision=bf16", "engine.zero_stage=2",
    ),
    "lift, every layer at stage 3": (
        "student.remedy=lift", "curriculum.mode=all_layers", "curriculum.start=null", "student.kwargs.depth=6",
        "engine.zero_stage=3",
    ),
    "pooled target in fp16": ("objective.head=pooled", "engine.precision=fp16"),
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


def test_a_curriculum_may_end_before_the_last_block(tmp_path: Path) -> None:
    """Calibration, climb and end on two ranks with the teacher's blocks split over them."""
    until = ("curriculum.block=3", "curriculum.threshold=0", "curriculum.start=null", "teacher.placement=sharded")
    run_ok(write_config(tmp_path), *until)
    run = tmp_path / "run"
    trajectory = json.loads((run / "summary.json").read_text())["trajectory"]
    first = trajectory[0][1]
    assert trajectory == [[block - first, block] for block in range(first, 4)]  # every score passes 0
    assert list(scalars(run, "curriculum/block").values())[4 - first :] == [3] * (23 - 4 + first)
    ledger = [json.loads(line) for line in (run / LEDGER).read_text().splitlines()]
    assert ledger[0]["reason"] == "calibrated" and ledger[-1]["block"] == 3
    assert {line["reason"] for line in ledger[1:]} <= {"threshold", "last_block"}


def test_a_calibrated_run_ends_with_evaluation_and_export(tmp_path: Path) -> None:
    """From the scan of all blocks on the first batch to the table, on two ranks."""
    config = write_config(tmp_path)
    overrides = ("data.val=digits", "evaluation.probe_epochs=5", "evaluation.every_epochs=1")
    printed = run_ok(config, "curriculum.start=null", *overrides)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads((tmp_path / "run" / VALIDATION).read_text())["cls_knn"] == summary["student_cls_knn"]
    depth, steps = summary["teacher_depth"], summary["steps"]
    assert (depth, steps) == (6, 23) and summary["trajectory"][0][1] in range(1, depth + 1)
    for row in ("student, class token", "student, patches", "teacher, both"):
        who, words = row.split(", ")
        kind = {"class token": "cls", "patches": "patch", "both": "cls_patch"}[words]
        knn, probe = (summary[f"{who}_{kind}_{measure}"] for measure in ("knn", "probe"))
        assert re.search(rf"{row} +kNN {knn:.1%}, linear probe {probe:.1%}\n", printed)
    assert summary["teacher_patch_knn"] > 0.3  # ten classes: even random features tell digits apart
    about = json.loads((tmp_path / "run" / "student.json").read_text())
    model = timm.create_model(about["model"], **about["kwargs"])
    model.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"))
