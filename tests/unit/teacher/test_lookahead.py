"""The teacher a step ahead: which block a step has, what is begun when, and that a resumed run repeats it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leap_dist.config import Config
from leap_dist.curriculum.policy import build_curriculum
from leap_dist.data import Batch
from leap_dist.matching.objective import Objective
from leap_dist.models.features import Features
from leap_dist.models.student import build_student
from leap_dist.runtime.optim import build_optimizer, lr_factor
from leap_dist.teacher.lookahead import Lookahead, MicroBatch
from leap_dist.trainer import Trainer
from stubs import DEPTH, GRID, SPEC, WIDTH, StubLoader, StubTeacher, scalars, stub_config, stub_trainer

STEPS = 7  # an epoch


def run(config: Config, teacher: StubTeacher | None = None, length: int = STEPS) -> Trainer:
    trainer = stub_trainer(config, teacher, length)
    assert trainer.run()
    trainer.close()
    return trainer


def simulated(config: Config, ahead: bool) -> tuple[list[int], list[float]]:
    """Block and loss of every step, by a plain loop that never looks ahead but remembers what a step was given."""
    torch.manual_seed(config.seed)
    student = build_student(config.student, config.data.image_size)
    objective = Objective(student, WIDTH, GRID, config.objective, config.curriculum.metric)
    optimizer, curriculum = build_optimizer(config.optim, objective), build_curriculum(config.curriculum, DEPTH)
    blocks, losses, total = [], [], STEPS * int(config.epochs)
    for epoch in range(int(config.epochs)):
        given = None
        for batch in StubLoader(STEPS).epoch(epoch):
            block = given if ahead and given is not None else curriculum.block
            given = curriculum.block  # the next step's work begins before this step has been judged
            for group in optimizer.param_groups:
                factor = lr_factor(
                    config.optim, step=len(losses), total_steps=total, epochs=config.epochs, advanced_at=None
                )
                group["lr"] = config.optim.lr * factor
            match = objective(batch.images, [StubTeacher().at(block, batch.images)], True)
            match.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            blocks.append(block)
            losses.append(match.loss.item())
            if block == curriculum.block:
                curriculum.observe(match.evidence[-1].score().item())
        curriculum.end_epoch()
    return blocks, losses


CURRICULA = {
    "at once": ["curriculum.threshold=-1"],
    "when learned": ["curriculum.threshold=0.35", "optim.lr=0.05"],
    "by epochs": ["curriculum.threshold=2", "curriculum.max_epochs_per_block=1"],
    "smoothed": ["curriculum.threshold=0.35", "curriculum.ema_alpha=0.5", "optim.lr=0.05"],
}


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("curriculum", CURRICULA)
def test_blocks_and_losses_are_those_of_a_plain_loop(curriculum: str, prefetch: int, tmp_path: Path) -> None:
    config = stub_config(tmp_path, f"teacher.prefetch={prefetch}", "epochs=3", *CURRICULA[curriculum])
    blocks, losses = simulated(config, ahead=prefetch == 1)
    assert len(set(blocks)) >= 3, "too few advances to show anything"
    trainer = run(config)
    assert scalars(tmp_path, "curriculum/block") == blocks
    assert scalars(tmp_path, "loss/total") == pytest.approx(losses, rel=1e-6)
    firsts = [step for step in range(len(blocks)) if step == 0 or blocks[step] != blocks[step - 1]]
    assert trainer.progress.trajectory == [(step, blocks[step]) for step in firsts]
    assert trainer.learner.costs.flops["teacher"] == sum(4 * 10 * block for block in blocks)


def test_an_advance_comes_a_step_later_and_is_counted_once(tmp_path: Path) -> None:
    """Every score advances: step 1 had begun with block 1 when step 0 was judged, so its own score says nothing."""
    run(stub_config(tmp_path, "teacher.prefetch=1", "curriculum.threshold=-1", "epochs=1"), length=6)
    assert scalars(tmp_path, "curriculum/block") == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("prefetch", "order"), [(0, "tststs" * 2), (1, "ttstss" * 2)])
def test_the_next_steps_features_are_begun_before_the_student_trains(
    prefetch: int, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    trainer = stub_trainer(stub_config(tmp_path, f"teacher.prefetch={prefetch}", "curriculum.threshold=2"), length=3)
    features, forward = trainer.teacher.features_of, trainer.learner.engine.module.forward
    trainer.teacher.features_of = lambda images, blocks: (seen.append("t"), features(images, blocks))[1]
    trainer.learner.engine.module.forward = lambda *inputs: (seen.append("s"), forward(*inputs))[1]
    assert trainer.run()
    trainer.close()
    assert "".join(seen) == order


def test_accumulated_micro_batches_share_their_steps_block(tmp_path: Path) -> None:
    teacher = StubTeacher()
    overrides = ["teacher.prefetch=1", "engine.accumulation=2", "curriculum.threshold=-1", "epochs=1"]
    run(stub_config(tmp_path, *overrides), teacher, length=8)
    assert teacher.asked == [1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_ledger_written_ahead_is_replayed_with_and_without_looking_ahead(prefetch: int, tmp_path: Path) -> None:
    first = run(stub_config(tmp_path / "first", "teacher.prefetch=1", "epochs=3", *CURRICULA["when learned"]))
    ledger = tmp_path / "first" / "curriculum.jsonl"
    again = [f"teacher.prefetch={prefetch}", "epochs=3", f"curriculum.replay={ledger}", "optim.lr=0.02"]
    second = run(stub_config(tmp_path / "second", *again))
    assert len(first.progress.trajectory) >= 3
    assert second.progress.trajectory == first.progress.trajectory


LONG = [
    "teacher.prefetch=1", "curriculum.threshold=0.2", "curriculum.ema_alpha=0.5", "curriculum.reset_head=true",
    "data.mixup=true", "data.mixup_group=2", "epochs=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return run(stub_config(tmp_path_factory.mktemp("uncut"), *LONG))


@pytest.mark.seconds
@pytest.mark.parametrize("where", ["one step in", "as an advance is on its way", "between two epochs"])
def test_a_run_that_was_cut_continues_to_the_same_end(where: str, uncut: Trainer, tmp_path: Path) -> None:
    """A checkpoint may be taken while the next step's work is done, and with another block than is now decided."""
    first_on_second_block = uncut.progress.trajectory[1][0]
    assert first_on_second_block % STEPS, "the advance is at the end of an epoch, where nothing is under way"
    cut = {"one step in": 1, "as an advance is on its way": first_on_second_block - 1, "between two epochs": STEPS}
    stopped = stub_trainer(stub_config(tmp_path, *LONG), length=STEPS)
    settle = stopped._settle

    def stop_there(interrupt: Any) -> None:
        settle(interrupt)
        stopped.stopping = stopped.progress.step == cut[where]

    stopped._settle = stop_there
    assert not stopped.run()
    stopped.close()
    resumed = stub_trainer(stub_config(tmp_path, *LONG, "resume=auto"), length=STEPS)
    resumed.restore(tmp_path / "checkpoints" / f"step{cut[where]:08d}")
    under_way = {"one step in": (1, 1), "as an advance is on its way": (1, 2), "between two epochs": (None, 3)}
    assert (resumed.progress.next_block, resumed.learner.curriculum.block) == under_way[where]
    assert resumed.run()
    resumed.close()
    assert resumed.progress.trajectory == uncut.progress.trajectory
    assert resumed.learner.costs.flops == uncut.learner.costs.flops
    assert scalars(tmp_path, "loss/total") == scalars(Path(uncut.config.output), "loss/total")
    for name, tensor in uncut.learner.engine.module.state_dict().items():
        assert torch.equal(tensor, resumed.learner.engine.module.state_dict()[name]), name


class SlowTeacher:
    """Features that are late: 64 products of large matrices, then the images themselves times the block."""

    spec = SPEC

    def __init__(self, device: torch.device) -> None:
        self.block = 1
        self.weight = torch.eye(4096, device=device)

    def retarget(self, block: int) -> None:
        self.block = block
        self.weight = torch.eye(4096, device="cpu").pin_memory().to("cuda", non_blocking=True) * block

    def features(self, images: Tensor) -> Features:
        eye = torch.eye(4096, device=images.device)
        for _ in range(64):
            eye = eye @ eye
        return Features((images @ eye) @ self.weight, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams exist on CUDA only")
def test_what_the_other_stream_made_is_there_when_it_is_read() -> None:
    device = torch.device("cuda")
    teacher = SlowTeacher(device)

    def make(step: int, blocks: list[int], batches: list[Batch]) -> Iterator[MicroBatch]:
        for batch in batches:
            images = batch.images.to(device, non_blocking=True)
            yield MicroBatch(images, {teacher.block: teacher.features(images)})

    ahead = Lookahead(teacher, make, device, ahead=True)
    batches = [torch.randn(8, 4096).pin_memory() for _ in range(6)]
    coming = None
    for step, images in enumerate(batches):
        work = coming or ahead.begin(step, {"": [1]}, [Batch(images, images, images)])
        following = batches[step + 1 : step + 2]
        coming = ahead.begin(step + 1, {"": [1 + step % 3]}, [Batch(i, i, i) for i in following]) if following else None
        (block,) = work.blocks
        for found, features, _ in work.micro_batches:
            assert torch.equal(found.cpu(), images)
            assert torch.allclose(features[block].patch.cpu(), images * block), math.nan
        torch.full((8, 4096), math.nan, device=device)  # takes memory that was let go too early
