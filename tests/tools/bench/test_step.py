"""The peer benchmark: its ratios, the two peers, the run that a script conducts, and a real one."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import step
from leap_dist.benchmarking import company, steps
from leap_dist.benchmarking.steps import (
    Conducted,
    Exchangeable,
    HeldTeacher,
    aim,
    batch_of,
    conduct,
    load_for_steps,
)
from leap_dist.config import Config
from leap_dist.errors import UserError
from leap_dist.matching.cka import linear_cka_of_features
from leap_dist.teacher.lazy_backbone import LazyBackbone
from runs import finish, fork
from stubs import StubTeacher, stub_config, stub_trainer

ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "teacher.model=vit_tiny_patch16_224", "teacher.kwargs={patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3}",
    "student.model=vit_tiny_patch16_224", "student.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}",
    "data.image_size=16",
]  # fmt: skip


def small(tmp_path: Path) -> Config:
    return load_for_steps(None, SMALL, batch=2, output=tmp_path)


def test_ratios_are_medians_of_the_same_round() -> None:
    times = {"ours": [11.0, 24.0, 30.0], "ideal": [10.0, 20.0, 30.0], "optimizer": [1.0, 8.0, 10.0]}
    row = step.row(1, 4, "fp32", times | {"plain": [22.0, 36.0, 30.0]})
    assert (row.ours, row.ideal, row.plain) == (24.0, 20.0, 30.0)
    assert row.over_ideal == pytest.approx(0.1)
    assert row.over_bare == pytest.approx(0.5)
    assert row.speedup == pytest.approx(1.5)


def test_a_cohort_is_held_against_one_pass_and_its_students() -> None:
    """Rounds of teacher 10, 20, 30: the students take 5 and 7 beside it, so 22, 32 and 42 are even."""
    times = {"teacher": [10.0, 20.0, 30.0], "a": [15.0, 25.0, 35.0], "b": [17.0, 27.0, 37.0]}
    found = company._summed_up(times | {"together": [22.0, 33.6, 50.4]}, ["a", "b"], 12)
    assert found.over == pytest.approx(0.05) and found.alone == (25.0, 27.0) and found.together == 33.6


def test_the_plain_score_is_linear_cka() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8) + 1, torch.randn(64, 8)
    assert step.three_product_cka(x, y) == pytest.approx(linear_cka_of_features(x, y).item(), rel=1e-5)
    assert step.three_product_cka(torch.ones(64, 8), y) == 0.0  # the mean of 64 ones is exact in any order


def test_the_cut_teacher_gives_our_features_at_every_block(tmp_path: Path) -> None:
    config = small(tmp_path)
    lazy = LazyBackbone(config.teacher, 16, torch.device("cpu"))
    ours = HeldTeacher(lazy)
    cut = step.CutTeacher(config, lazy)
    images = torch.randn(2, 3, 16, 16)
    for block in range(1, 5):
        ours.retarget(block)
        cut.cut(block)
        assert all(lazy.is_loaded(index) for index in range(4))
        assert torch.equal(cut(images)[:, 1:], ours.features(images).patch)


def test_every_item_of_a_script_is_one_step_at_the_block_it_aims_at(tmp_path: Path) -> None:
    trainer = stub_trainer(stub_config(tmp_path, "curriculum.threshold=1000"), Exchangeable(StubTeacher()))
    trainer.loader = Conducted(batch_of(torch.randn(4, 3, 8, 8)))
    trainer.steps_per_epoch, weight = 10, trainer.learner.engine.module.heads[0].weight
    teachers, seen = (StubTeacher(), StubTeacher()), []

    def script() -> Iterator[None]:
        for teacher, block in ((teachers[0], 1), (teachers[0], 3), (teachers[1], 4)):
            aim(trainer, teacher, block)
            before = weight.clone()
            yield
            seen.append((trainer.progress.step, not torch.equal(weight, before)))

    conduct(trainer, script())
    assert seen == [(1, True), (2, True), (3, True)]
    assert (teachers[0].asked, teachers[1].asked) == ([1, 3], [4])


def test_what_the_tool_decides_cannot_be_overridden(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"curriculum.start=2: decided by this tool"):
        load_for_steps(None, [*SMALL, "curriculum.start=2"], batch=2, output=tmp_path)


def test_a_missing_deepspeed_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    assert step.main([]) == 2
    assert capsys.readouterr().err.startswith("bench_step: error: deepspeed is not installed")


@pytest.mark.seconds
def test_one_run_compares_the_step_at_four_depths(tmp_path: Path) -> None:
    command = ["--batch", "2", "--rounds", "2", "--students", "2", "--csv", str(tmp_path / "rows.csv"), *SMALL]
    done = finish(fork(ROOT / "tools/bench/step.py", *command, processes=1))
    assert done.returncode == 0, done.stdout[-2000:]
    assert "cohort of 2 at block 4: " in done.stdout
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    fp32 = [row for row in rows if row["teacher"] == "fp32"]
    assert [int(row["block"]) for row in fp32] == [1, 2, 4]
    for row in rows:
        assert float(row["optimizer"]) < float(row["ideal"]) and float(row["over_bare"]) > float(row["over_ideal"])
        assert float(row["speedup"]) > 0
    if step.has_amx(torch.device("cpu")):
        assert [int(row["block"]) for row in rows if row["teacher"] == "bf16"] == [4]
        assert "features off by" in done.stdout
