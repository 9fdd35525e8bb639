"""The planning tool: its teachers have the sizes they are known for, and every ready-made pair gives a table."""

from __future__ import annotations

from pathlib import Path

import plan_cluster
import pytest
import yaml

from leap_dist.models.flops import teacher_costs, teacher_flops

pytestmark = pytest.mark.seconds


@pytest.mark.parametrize(("name", "billions"), [("vit-g14", 1.14), ("vit-7b", 6.7), ("vit-22b", 21.8)])
def test_teachers_are_as_large_as_they_are_called(name: str, billions: float) -> None:
    costs = teacher_costs(plan_cluster.TEACHERS[name], 224, teacher_flops(plan_cluster.TEACHERS[name], 224))
    assert (costs.stem_bytes + sum(costs.block_bytes)) / 2e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("cluster", plan_cluster.CLUSTERS)
def test_every_cluster_gets_a_table_with_one_choice_per_block(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_cluster.main(["--cluster", cluster, "--teacher", "vit-7b", "--budget", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) % 3 == 0
    for start in range(0, len(lines), 3):
        assert sum("choice" in line for line in lines[start : start + 3]) == 1
    assert "replicated" in next(line for line in lines if "choice" in line)
    assert "replicated" not in [line for line in lines if "choice" in line][-1]


def test_a_budget_too_small_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_cluster.main(["--teacher", "vit-22b", "--budget", "0.5"]) == 2
    assert "teacher.memory_budget=0.5" in capsys.readouterr().err


def test_a_runs_config_from_another_machine_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "teacher": {
            "model": "vit_tiny_patch16_224",
            "kwargs": {"depth": 4},
            "weights": "/elsewhere/teacher.safetensors",
        },
        "student": {"model": "vit_tiny_patch16_224"},
        "data": {"train": "/elsewhere/train", "val": "/elsewhere/val"},
        "evaluation": {"every_epochs": 2},
        "curriculum": {"replay": "/elsewhere/curriculum.jsonl"},
        "resume": "/elsewhere/run",
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert plan_cluster.main(["--config", str(path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        b for b in "1234" for _ in range(3)
    ]
