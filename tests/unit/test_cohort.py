"""Students in step: one pass for all, one that fails, and what is continued."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config import Config
from leap_dist.config.loading import members
from leap_dist.errors import UserError
from leap_dist.runtime.checkpoint import find_resume
from leap_dist.runtime.checkpoint_folder import newest
from leap_dist.trainer import Trainer
from stubs import DEPTH, ONE, StubTeacher, scalars, stub_config, stub_trainer

STUDENTS: dict[str, dict[str, Any]] = {
    "eager": {"curriculum.threshold": -1.0},
    "stuck": {"curriculum.threshold": 2.0, "student.seed": 4},
    "fixed": {"curriculum.mode": "fixed", "curriculum.start": None, "curriculum.block": 2},
}


def cohort_config(output: Path, *overrides: str, students: dict[str, dict[str, Any]] = STUDENTS) -> Config:
    return replace(stub_config(output, *overrides), students=students)


def run(trainer: Trainer) -> Trainer:
    assert trainer.run()
    trainer.close()
    return trainer


class Counting(StubTeacher):
    """Notes the blocks that each pass hands out."""

    def features_of(self, images: torch.Tensor, blocks: Any) -> Any:
        self.handed = [*getattr(self, "handed", []), list(blocks)]
        return super().features_of(images, blocks)


@pytest.mark.parametrize(("prefetch", "eager"), [(0, [1, 2, 3, 4, 4, 4]), (1, [1, 1, 2, 3, 3, 4])])
def test_one_pass_a_step_to_the_deepest_target_gives_each_block_once(
    prefetch: int, eager: list[int], tmp_path: Path
) -> None:
    teacher = Counting()
    trainer = run(stub_trainer(cohort_config(tmp_path, f"teacher.prefetch={prefetch}"), teacher))
    blocks = {name: scalars(tmp_path / name, "curriculum/block") for name in STUDENTS}
    assert blocks["stuck"] == [1] * 6 and blocks["fixed"] == [2] * 6
    assert len(teacher.asked) == 6
    wanted = [sorted({blocks[name][step] for name in STUDENTS}) for step in range(6)]
    assert teacher.handed == wanted
    assert teacher.asked == [found[-1] for found in wanted]
    if not prefetch:
        assert blocks["eager"] == eager
    assert {one.progress.step for one in trainer.cohort.learners.values()} == {6}


@pytest.mark.seconds
@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_and_losses_are_those_of_each_alone(accumulation: int, tmp_path: Path) -> None:
    config = cohort_config(
        tmp_path / "company", f"engine.accumulation={accumulation}", "student.kwargs.drop_path_rate=0.5"
    )
    company = run(stub_trainer(config, length=4))
    for name, own in members(config).items():
        alone = run(stub_trainer(replace(own, output=str(tmp_path / "alone" / name)), length=4))
        mine = company.cohort.learners[name]
        assert mine.progress.trajectory == alone.progress.trajectory
        assert mine.costs.flops == alone.learner.costs.flops
        assert scalars(tmp_path / "company" / name, "loss/total") == scalars(tmp_path / "alone" / name, "loss/total")
        for key, weight in mine.engine.module.state_dict().items():
            assert weight.equal(alone.learner.engine.module.state_dict()[key]), (name, key)


def test_all_calibrate_in_one_pass(tmp_path: Path) -> None:
    """To block 3 for the one, to 4 for the other; the pass goes to 4, once."""
    students = {"short": {"curriculum.block": 3}, "whole": {}}
    teacher, swept = StubTeacher(), []
    sweep = teacher.sweep
    teacher.sweep = lambda images, until=None: (swept.append(until), sweep(images, until))[1]
    trainer = run(stub_trainer(cohort_config(tmp_path, "curriculum.start=null", students=students), teacher))
    assert swept == [DEPTH]
    charged = {name: one.costs.calibration_flops for name, one in trainer.cohort.learners.items()}
    assert charged == {"short": 4 * 30, "whole": 4 * 40}


def spoilt(trainer: Trainer, name: str, at: int) -> Trainer:
    """The student's weights are no numbers after the update of step `at`."""
    learner = trainer.cohort.learners[name]
    update = learner.engine.step

    def step() -> None:
        update()
        if learner.progress.step == at:
            for parameter in learner.engine.module.parameters():
                parameter.data.fill_(math.nan)

    learner.engine.step = step
    return trainer


def test_one_that_fails_keeps_its_last_good_weights_and_the_rest_go_on(tmp_path: Path) -> None:
    """Spoilt by step 2, found out by step 3, whose checkpoint (of 3 steps) is none to go on from."""
    config = cohort_config(tmp_path / "company", "checkpoint.every_steps=1", "checkpoint.keep=9")
    trainer = run(spoilt(stub_trainer(config), "stuck", at=2))
    lost = trainer.cohort.learners["stuck"]
    assert lost.retired is not None and (lost.retired.step, lost.retired.weights_of) == (3, 2)
    assert "non-finite loss on rank 0 at step 3" in lost.retired.why
    kept = sorted(path.name for path in (tmp_path / "company" / "checkpoints").glob("step*"))
    assert kept == [f"step{step:08d}" for step in (1, 2, 4, 5, 6)]
    good = torch.load(tmp_path / "company/checkpoints/step00000002/stuck/state.pt", weights_only=False)
    for key, weight in lost.engine.module.state_dict().items():
        assert weight.equal(good["module"][key])
    for name, own in members(config).items():
        if name != "stuck":
            alone = run(stub_trainer(replace(own, output=str(tmp_path / "alone" / name))))
            for key, weight in trainer.cohort.learners[name].engine.module.state_dict().items():
                assert weight.equal(alone.learner.engine.module.state_dict()[key]), (name, key)
    with pytest.raises(UserError, match=r"students failed: stuck \(non-finite loss .*\); done: eager, fixed"):
        trainer.cohort.require_sound()
    resumed = stub_trainer(replace(config, resume="auto"))
    resumed.restore(newest(tmp_path / "company" / "checkpoints"))
    assert resumed.cohort.learners["stuck"].retired == lost.retired and list(resumed.cohort.active) == [
        "eager",
        "fixed",
    ]


def test_one_whose_fp16_scale_is_lost_keeps_its_last_good_weights_and_the_rest_go_on(tmp_path: Path) -> None:
    """torch's scaler halves at every overflow and would do so for ever: 4, 2, 1, and the fourth step sees a half."""
    config = cohort_config(tmp_path / "company", "checkpoint.every_steps=1")
    trainer = stub_trainer(config)
    lost = trainer.cohort.learners["stuck"]
    scaler = lost.engine.torch_autocast_z0_gradscaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    lost.engine.step = lambda: scaler.update(scaler.get_scale() / 2)  # overflows skip the update of the weights
    begun_with = {key: weight.clone() for key, weight in lost.engine.module.state_dict().items()}
    run(trainer)
    assert lost.retired is not None and (lost.retired.step, lost.retired.weights_of) == (3, 2)
    assert "step 3: the gradients overflow in fp16 at a loss scale of 0.5" in lost.retired.why
    assert all(weight.equal(begun_with[key]) for key, weight in lost.engine.module.state_dict().items())
    for name, own in members(config).items():
        if name != "stuck":
            alone = run(stub_trainer(replace(own, output=str(tmp_path / "alone" / name))))
            assert trainer.cohort.learners[name].progress.step == 6
            for key, weight in trainer.cohort.learners[name].engine.module.state_dict().items():
                assert weight.equal(alone.learner.engine.module.state_dict()[key]), (name, key)
    with pytest.raises(
        UserError, match=r"students failed: stuck \(step 3: the gradients overflow .*; done: eager, fixed"
    ):
        trainer.cohort.require_sound()


def test_one_that_the_last_update_spoils_is_found_out_at_the_end(tmp_path: Path) -> None:
    config = cohort_config(tmp_path, "checkpoint.every_steps=1")
    trainer = run(spoilt(stub_trainer(config), "eager", at=5))
    lost = trainer.cohort.learners["eager"]
    assert lost.retired is not None and (lost.retired.step, lost.retired.weights_of) == (6, 5)
    assert all(bool(parameter.isfinite().all()) for parameter in lost.engine.module.parameters())
    assert newest(tmp_path / "checkpoints").name == "step00000006"


def test_when_all_have_failed_the_run_is_over(tmp_path: Path) -> None:
    students: dict[str, dict[str, Any]] = {"one": {}, "two": {}}
    trainer = spoilt(stub_trainer(cohort_config(tmp_path, students=students)), "one", at=0)
    run(spoilt(trainer, "two", at=1))
    assert trainer.progress.step == 3 and not trainer.cohort.active
    # The checkpoint of the first failure, of 2 steps, had two's spoilt weights in it: none was ever good.
    assert [one.retired.weights_of for one in trainer.cohort.learners.values() if one.retired] == [None, None]


def test_the_teachers_fault_ends_the_run_for_all(tmp_path: Path) -> None:
    trainer = stub_trainer(cohort_config(tmp_path))
    trainer.teacher.at = lambda block, images: StubTeacher().at(block, images * math.nan)
    with pytest.raises(UserError, match=r"block 1 of teacher.weights=.* non-finite"):
        trainer.run()
    trainer.close()


def test_another_set_of_students_does_not_go_on(tmp_path: Path) -> None:
    run(stub_trainer(cohort_config(tmp_path / "old")))
    path = newest(tmp_path / "old" / "checkpoints")
    fewer = {name: own for name, own in STUDENTS.items() if name != "fixed"}
    with pytest.raises(UserError, match=r"saved with students=\['eager', 'fixed', 'stuck'\]"):
        stub_trainer(cohort_config(tmp_path / "new", students=fewer)).restore(path)
    with pytest.raises(UserError, match="saved with students="):
        stub_trainer(stub_config(tmp_path / "one")).restore(path)
    seeded = STUDENTS | {"stuck": {"student.seed": 5}}
    with pytest.raises(UserError, match=r"saved with students.stuck.student.seed=4, this run has .*=5"):
        stub_trainer(cohort_config(tmp_path / "other", students=seeded)).restore(path)
    (path / "fixed" / "state.pt").unlink()
    assert newest(tmp_path / "old" / "checkpoints").name == "step00000003", "one student's part is missing"


def test_nobody_else_works_in_a_students_folder(tmp_path: Path) -> None:
    config = cohort_config(tmp_path / "company")
    run(stub_trainer(config))
    with pytest.raises(UserError, match=r"output=.*/eager: belongs to the cohort in .*/company"):
        find_resume(stub_config(tmp_path / "company" / "eager", "resume=auto"), ONE)
    assert find_resume(replace(config, resume="auto"), ONE) == newest(tmp_path / "company" / "checkpoints")
