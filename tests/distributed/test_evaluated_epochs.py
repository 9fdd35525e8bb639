"""Accuracy between epochs in real runs of two ranks: that of the end's evaluation, at no cost to the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leap_dist.evaluation.periodic import VALIDATION
from runs import run_ok, scalars, write_config

OPTIONS = {"epochs": 2, "data": {"val": "digits"}, "evaluation": {"probe_epochs": 1, "teacher": False}}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accuracy_is_told_after_every_epoch_and_changes_no_loss(stage: int, tmp_path: Path) -> None:
    """At stage 3 no rank has all weights. The last epoch's accuracy and the end's are both of all digits."""
    config = write_config(tmp_path, **OPTIONS, engine={"zero_stage": stage})
    told, untold = tmp_path / "told", tmp_path / "untold"
    run_ok(config, f"output={told}", "evaluation.every_epochs=1")
    run_ok(config, f"output={untold}")
    summary = json.loads((told / "summary.json").read_text())
    first, last = (json.loads(text) for text in (told / VALIDATION).read_text().splitlines())
    assert (first["step"], last["step"]) == (23, 46)
    assert last["patch_knn"] == summary["student_patch_knn"]
    assert last["flops"] == sum(summary["flops"].values())
    assert last["seconds"] <= summary["train_seconds"]
    assert not (untold / VALIDATION).exists()
    assert scalars(told, "loss/total") == scalars(untold, "loss/total")
