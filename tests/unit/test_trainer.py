"""The order of things within a step and between steps, as the published code has it (measured there by running it)."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from leap_dist.errors import UserError
from leap_dist.runtime.checkpoint_folder import newest
from leap_dist.runtime.signals import STOPPING
from leap_dist.trainer import Trainer
from stubs import DEPTH, StubLoader, StubTeacher, dies_at, scalars, stub_config, stub_trainer


def run(trainer: Trainer) -> Trainer:
    assert trainer.run()
    trainer.close()
    return trainer


def test_the_new_block_is_the_target_from_the_next_step_on(tmp_path: Path) -> None:
    teacher = StubTeacher()
    trainer = run(stub_trainer(stub_config(tmp_path, "curriculum.threshold=-1"), teacher))
    assert teacher.asked == [1, 2, 3, 4, 4, 4]
    assert trainer.progress.trajectory == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert scalars(tmp_path, "curriculum/block") == [1, 2, 3, 4, 4, 4]


def test_loss_is_patch_mse_plus_weighted_cls_mse_of_the_steps_own_block(tmp_path: Path) -> None:
    """Start at block 2 with a threshold that always advances: loss and score of step 0 are still block 2's."""
    config = stub_config(
        tmp_path, "curriculum.threshold=-1", "curriculum.start=2", "objective.cls_weight=0.05", "epochs=1"
    )
    teacher, images = StubTeacher(), next(StubLoader().epoch(0)).images
    trainer = stub_trainer(config, teacher)
    with torch.no_grad():
        student, head, target = (
            trainer.learner.engine.module.student(images),
            trainer.learner.engine.module.heads[0],
            teacher.at(2, images),
        )
        patch = mse_loss(torch.nn.functional.linear(student.patch, head.weight, head.bias), target.patch)
        cls = mse_loss(torch.nn.functional.linear(student.cls, head.weight, head.bias), target.cls)
    run(trainer)
    assert scalars(tmp_path, "loss/patch")[0] == pytest.approx(patch.item(), rel=1e-5)
    assert scalars(tmp_path, "loss/cls")[0] == pytest.approx(cls.item(), rel=1e-5)
    assert scalars(tmp_path, "loss/total")[0] == pytest.approx((patch + 0.05 * cls).item(), rel=1e-5)
    assert scalars(tmp_path, "curriculum/ema")[0] == 0.0  # reset by the advance, as the published log shows it


def test_epochs_alone_advance_a_block_that_is_never_learned(tmp_path: Path) -> None:
    """max_epochs_per_block=2 at three steps an epoch: six steps on a block, the switch exactly at the epoch's end."""
    overrides = ["curriculum.threshold=2", "curriculum.max_epochs_per_block=2", "epochs=5"]
    teacher = StubTeacher()
    run(stub_trainer(stub_config(tmp_path, *overrides), teacher))
    assert teacher.asked == [1] * 6 + [2] * 6 + [3] * 3


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_run_may_end_within_an_epoch(prefetch: int, tmp_path: Path) -> None:
    """1.7 epochs of three steps: five steps, the learning rate at its end there, and no epoch's end after them."""
    overrides = ["curriculum.threshold=2", "curriculum.max_epochs_per_block=1", "epochs=1.7", "optim.warmup_epochs=0"]
    teacher = StubTeacher()
    trainer = run(stub_trainer(stub_config(tmp_path, *overrides, f"teacher.prefetch={prefetch}"), teacher))
    assert teacher.asked == [1, 1, 1, 2, 2]
    assert trainer.learner.curriculum.block == 2 and (trainer.progress.epoch, trainer.progress.step_in_epoch) == (1, 2)
    cosine = [0.001 + 0.999 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert scalars(tmp_path, "lr") == pytest.approx([1e-3 * factor for factor in cosine], rel=1e-5)
    resumed = stub_trainer(stub_config(tmp_path, *overrides, f"teacher.prefetch={prefetch}", "resume=auto"))
    resumed.restore(newest(tmp_path / "checkpoints"))
    assert run(resumed).progress.step == 5


def test_a_run_that_was_saved_before_its_last_epoch_was_closed_closes_it(tmp_path: Path) -> None:
    """A step's checkpoint at the very end: the curriculum still counts that epoch, as it would have without a stop."""
    overrides = ["curriculum.threshold=2", "curriculum.max_epochs_per_block=2", "checkpoint.every_steps=1", "epochs=2"]
    trainer = stub_trainer(stub_config(tmp_path, *overrides))
    trainer.learner.curriculum.end_epoch = dies_at_call(trainer.learner.curriculum.end_epoch, 2)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    trainer.close()
    resumed = stub_trainer(stub_config(tmp_path, *overrides, "resume=auto"))
    resumed.restore(tmp_path / "checkpoints" / "step00000006")
    assert (resumed.progress.epoch, resumed.progress.step_in_epoch) == (1, 3)
    run(resumed)
    assert (resumed.progress.epoch, resumed.progress.step, resumed.learner.curriculum.block) == (2, 6, 2)


def dies_at_call(function: Any, number: int) -> Any:
    calls = itertools.count(1)

    def call(*args: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return function(*args)

    return call


def test_calibration_starts_at_the_highest_score_and_costs_one_full_pass(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = stub_trainer(stub_config(tmp_path, "curriculum.start=null", "curriculum.threshold=2", "epochs=1"))
    scores = iter([0.2, 0.7, math.nan, 0.7, *[0.1] * 3])  # four blocks, then three steps; ties go to the shallowest
    monkeypatch.setattr(trainer.learner, "_over_ranks", lambda losses, _: (losses, torch.tensor(next(scores))))
    run(trainer)
    assert trainer.progress.trajectory == [(0, 2)]
    images, per_block = 4, 10
    assert trainer.learner.costs.flops["teacher"] == images * per_block * (DEPTH + 3 * 2)
    assert trainer.learner.costs.teacher_saved == pytest.approx(1 - (DEPTH + 3 * 2) / (3 * DEPTH))


def test_calibration_starts_no_deeper_than_the_curriculum_ends(tmp_path: Path, monkeypatch: Any) -> None:
    overrides = ["curriculum.start=null", "curriculum.block=3", "curriculum.threshold=0.5", "epochs=1"]
    trainer = stub_trainer(stub_config(tmp_path, *overrides))
    scores = iter([0.2, 0.4, 0.1, *[0.6] * 3])  # three of the four blocks, then three steps
    monkeypatch.setattr(trainer.learner, "_over_ranks", lambda losses, _: (losses, torch.tensor(next(scores))))
    run(trainer)
    assert trainer.progress.trajectory == [(0, 2), (1, 3)]
    assert trainer.learner.costs.flops["teacher"] == 4 * 10 * (3 + 2 + 3 + 3)  # images, FLOPs a block, blocks


@pytest.mark.seconds
@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_run_waits_for_the_last_block_also_across_a_resume(prefetch: int, tmp_path: Path) -> None:
    """Block 2 of 4 from the first score on, the last from the third epoch on; cut in the second."""
    overrides = ["curriculum.start=1", "curriculum.threshold=-2", "curriculum.block=2", "curriculum.last_block_after=2"]
    overrides += ["epochs=3", "checkpoint.every_steps=1", f"teacher.prefetch={prefetch}"]
    uncut = run(stub_trainer(stub_config(tmp_path / "whole", *overrides)))
    assert uncut.progress.trajectory == [(0, 1), (1 + prefetch, 2), (6, 4)]
    cut = stub_trainer(stub_config(tmp_path / "cut", *overrides))
    cut.loader.epoch = dies_at(cut.loader, epoch=1, index=2)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    cut.close()
    resumed = stub_trainer(stub_config(tmp_path / "cut", *overrides, "resume=auto"))
    resumed.restore(newest(tmp_path / "cut" / "checkpoints"))
    run(resumed)
    assert resumed.progress.trajectory == uncut.progress.trajectory
    assert scalars(tmp_path / "cut", "loss/total") == scalars(tmp_path / "whole", "loss/total")
    ledgers = [(tmp_path / name / "curriculum.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    reasons = [[json.loads(line)["reason"] for line in ledger] for ledger in ledgers]
    assert reasons[0] == reasons[1] and {"threshold", "held", "snap"} <= set(reasons[0])


@pytest.mark.seconds
@pytest.mark.parametrize("remedy", ["none", "lift", "wide_last"])
def test_a_resumed_run_does_not_calibrate_and_continues_to_the_same_end(remedy: str, tmp_path: Path) -> None:
    """Defect B2 of the published code: curriculum state and weights came from different moments."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    overrides = ["curriculum.threshold=0.3", "curriculum.start=null", "checkpoint.every_steps=1", "epochs=3"]
    overrides.append(f"student.remedy={remedy}")
    uncut = run(stub_trainer(stub_config(whole, *overrides)))
    cut = stub_trainer(stub_config(halves, *overrides))
    cut.loader.epoch = dies_at(cut.loader, epoch=1, index=2)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    cut.close()
    resumed = stub_trainer(stub_config(halves, *overrides, "resume=auto"))
    resumed.restore(halves / "checkpoints" / "step00000005")
    resumed.learner.calibration = lambda: pytest.fail("calibrated again")
    run(resumed)
    assert resumed.progress.trajectory == uncut.progress.trajectory
    for name, tensor in uncut.learner.engine.module.state_dict().items():
        assert torch.equal(tensor, resumed.learner.engine.module.state_dict()[name]), name
    assert scalars(halves, "loss/total") == scalars(whole, "loss/total")


def test_a_run_begun_at_anothers_checkpoint_never_starts_afresh(tmp_path: Path) -> None:
    run(stub_trainer(stub_config(tmp_path / "old", "epochs=1")))
    new = stub_trainer(stub_config(tmp_path / "new", "epochs=2"))
    new.restore(tmp_path / "old" / "checkpoints" / "step00000003")
    new.loader.epoch = dies_at(new.loader, epoch=1, index=0)
    with pytest.raises(KeyboardInterrupt):
        new.run()
    new.close()
    assert newest(tmp_path / "new" / "checkpoints").name == "step00000003"


def test_a_non_finite_loss_ends_the_run_before_anything_is_saved(tmp_path: Path) -> None:
    trainer = stub_trainer(stub_config(tmp_path, "checkpoint.every_steps=1"))
    trainer.teacher.at = lambda block, images: StubTeacher().at(block, images * math.nan)
    with pytest.raises(UserError, match=r"block 1 of teacher.weights=.* non-finite .*loss on rank 0 at step 0"):
        trainer.run()
    trainer.close()
    assert not (tmp_path / "checkpoints" / "latest").exists()


def test_a_students_own_fault_is_not_the_teachers(tmp_path: Path) -> None:
    trainer = stub_trainer(stub_config(tmp_path))
    with torch.no_grad():
        next(trainer.learner.engine.module.parameters()).fill_(math.nan)
    with pytest.raises(UserError) as caught:
        trainer.run()
    trainer.close()
    assert str(caught.value) == "non-finite loss on rank 0 at step 0"


def test_the_score_at_the_last_block_is_only_computed_when_shown(tmp_path: Path) -> None:
    config = stub_config(tmp_path, "curriculum.mode=fixed", "curriculum.start=null", "telemetry.every=3")
    trainer = stub_trainer(config)
    asked = []
    forward = trainer.learner.engine.module.forward
    trainer.learner.engine.module.forward = lambda images, targets, scored, labels: (
        asked.append(scored),
        forward(images, targets, scored),
    )[1]
    run(trainer)
    assert asked == [True, False, False, True, False, False]


@pytest.mark.parametrize("sent", STOPPING)
def test_a_second_signal_does_not_kill_the_save_that_the_first_asked_for(
    sent: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = stub_trainer(stub_config(tmp_path))
    step, save = trainer.cohort.step, trainer._save
    signalled = lambda: os.kill(os.getpid(), sent)  # noqa: E731
    monkeypatch.setattr(trainer.cohort, "step", lambda work: (step(work), signalled())[0])
    monkeypatch.setattr(trainer, "_save", lambda: (signalled(), save())[1])
    assert not trainer.run()
    trainer.close()
    assert newest(tmp_path / "checkpoints").name == "step00000001"
