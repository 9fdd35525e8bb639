"""Labels, soft distillation and spectral matching on two ranks: what a run leaves, and that it continues bitwise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config import DataConfig
from leap_dist.data.crops import decode
from leap_dist.data.digits import digit_samples
from leap_dist.data.transforms import eval_transform
from leap_dist.models.export import load_student
from runs import TINY, run_ok, scalars, write_config

SLOW = pytest.mark.slow
LABELLED: dict[str, Any] = {
    "objective": {"kd_alpha": 0.5, "label_smoothing": 0.1, "feature": "spectral", "cls_weight": 0.0},
    "curriculum": {"start": None, "threshold": 0.1},
    "data": {
        "augment": "deit", "crop_scale": [0.6, 1.0], "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "workers": 1,
        "val": "digits",
    },
    "evaluation": {"probe_epochs": 1, "teacher": False},
    "checkpoint": {"every_steps": 10, "keep": 9},
}  # fmt: skip


def top1_of_export(run: Path) -> float:
    """Of the exported student on the held-out digits, by timm's own forward."""
    data = TINY["data"]
    config = DataConfig(train="unused", image_size=data["image_size"], mean=tuple(data["mean"]), std=tuple(data["std"]))
    images, labels = zip(*((decode(png), label) for png, label in digit_samples("val")), strict=True)
    student = load_student(run / "student.safetensors", torch.device("cpu"))
    with torch.no_grad():
        logits = student.backbone(torch.stack([eval_transform(config)(image) for image in images]))
    return (logits.argmax(1) == torch.tensor(labels)).double().mean().item()


def labelled(folder: Path, stage: int, remedy: str, placement: str = "replicated") -> Path:
    return write_config(
        folder, **LABELLED, teacher={"placement": placement}, student={"num_classes": 10, "remedy": remedy},
        engine={"zero_stage": stage},
    )  # fmt: skip


def assert_whole(run: Path, printed: str) -> None:
    """Distillation at the last block and nowhere else; the accuracy shown is the export's."""
    losses, blocks, kd = (scalars(run, tag) for tag in ("loss/total", "curriculum/block", "loss/kd"))
    assert kd.keys() == {step for step in blocks if blocks[step] == 6} and 0 < len(kd) < len(losses) == 23
    summary = json.loads((run / "summary.json").read_text())
    # One batch here, several on two ranks there, which may round otherwise: one image may lie between two classes.
    assert summary["student_top1"] == pytest.approx(top1_of_export(run), abs=1.01 / 297)
    assert re.search(rf"^student top-1 +{summary['student_top1']:.1%}$", printed, re.MULTILINE)


def test_a_supervised_run_is_whole(tmp_path: Path) -> None:
    assert_whole(tmp_path / "run", run_ok(labelled(tmp_path, 2, "lift")))


@SLOW
@pytest.mark.parametrize(
    ("stage", "remedy", "placement"),
    [(0, "none", "pipelined"), (1, "lift", "sharded"), (2, "wide_last", "replicated"), (3, "wide_last", "sharded"),
     (3, "none", "replicated")],
)  # fmt: skip
def test_a_supervised_run_continues_bitwise(stage: int, remedy: str, placement: str, tmp_path: Path) -> None:
    config, run, rest = labelled(tmp_path, stage, remedy, placement), tmp_path / "run", tmp_path / "rest"
    assert_whole(run, run_ok(config))
    run_ok(config, f"output={rest}", f"resume={run / 'checkpoints' / 'step00000010'}", "data.val=null")
    losses, continued = scalars(run, "loss/total"), scalars(rest, "loss/total")
    assert continued and continued == {step: losses[step] for step in range(10, 23)}
