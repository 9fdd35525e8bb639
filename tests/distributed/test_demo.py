"""The embedded demo: what `make demo` shows, and that every ZeRO stage trains it to the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runs import ROOT, run_ok, scalars

DEMO = ROOT / "launch_configs" / "demo.yaml"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What `make demo` runs, teacher training included, at ZeRO stage 0: its folder and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "run"
    return output, run_ok(DEMO, f"output={output}", "telemetry.every=1", launcher="deepspeed", timeout=600)


@pytest.mark.slow
def test_the_curriculum_is_visible_and_saves(demo: tuple[Path, str]) -> None:
    summary = json.loads((demo[0] / "summary.json").read_text())
    advances = [step for step, _ in summary["trajectory"][1:]]
    assert len(advances) >= 6
    assert advances[len(advances) // 2] > summary["steps"] / 4, "raced through"
    assert summary["teacher_flops_saved"] >= 0.2
    assert summary["student_patch_knn"] > 0.5 and summary["teacher_patch_probe"] > 0.85
    for row in ("student kNN", "student linear probe", "teacher kNN", "teacher FLOPs saved", "time saved"):
        assert row in demo[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_the_demo_to_the_same_losses(stage: int, demo: tuple[Path, str], tmp_path: Path) -> None:
    weights = demo[0].parent / "demo-teacher" / "teacher.safetensors"
    run_ok(
        DEMO, f"output={tmp_path / 'run'}", f"engine.zero_stage={stage}", f"teacher.weights={weights}",
        "data.val=null", "telemetry.every=1", timeout=600,
    )  # fmt: skip
    losses, others = scalars(demo[0], "loss/total"), scalars(tmp_path / "run", "loss/total")
    assert losses.keys() == others.keys()
    assert max(abs(losses[step] - others[step]) for step in losses) < 1e-4
    assert scalars(demo[0], "curriculum/block") == scalars(tmp_path / "run", "curriculum/block")
