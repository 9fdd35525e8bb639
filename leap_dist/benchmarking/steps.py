"""A run's own training steps on images that are already on hand, one at a time, for the tools that measure steps.

What is not a run's: the images (random, the same every step), the curriculum (it goes where the tool aims it) and, by
default, the teacher's weights (random) and a learning rate at which the student stays what it is, so that no step
differs from the next.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leap_dist.assembly import build_parts, check_pair
from leap_dist.config import Config, load_without_files, members
from leap_dist.data import BadSamples, Batch
from leap_dist.errors import UserError
from leap_dist.models import step_flops
from leap_dist.runtime.allocator import keep_freed_memory
from leap_dist.runtime.checkpoint import Checkpoints
from leap_dist.runtime.distributed import World
from leap_dist.runtime.timing import PhaseTimer
from leap_dist.teacher import describe_teacher
from leap_dist.teacher.lazy_backbone import LazyBackbone
from leap_dist.teacher.replicated import ReplicatedTeacher
from leap_dist.trainer import Parts, Trainer

STEPS_PER_EPOCH = 10**6
# Instead of the run's own; overrides on the tool's command line come later and win.
DEFAULTS = ["optim.lr=1e-6", "telemetry.progress=false"]
# What the tools decide: every target must be one that a score could still end.
FIXED = [
    "teacher.placement=replicated", "teacher.memory_budget=null", "curriculum.mode=leap", "curriculum.block=null",
    "curriculum.start=1", "curriculum.snap_to_last_at=null", "curriculum.replay=null", "curriculum.threshold=1000",
    "engine.accumulation=1", "resume=none",
]  # fmt: skip


def load_for_steps(path: Path | None, overrides: list[str], *, batch: int, output: Path) -> Config:
    """A run's config made fit for steps without data. output: where the steps' telemetry goes.

    Raises:
        UserError: as `leap_dist.config.load`, or an override of what the tools decide.
    """
    mixing = f"data.mixup_group={batch}" if batch > 1 else "data.mixup=false"
    decided = [*FIXED, f"data.global_batch={batch}", mixing, f"output={output}"]
    for override in overrides:
        if override.split("=")[0] in {item.split("=")[0] for item in decided}:
            raise UserError(f"{override}: decided by this tool; leave it out")
    return load_without_files(path, *DEFAULTS, *overrides, *decided)


def require_deepspeed() -> None:
    """Raise UserError where DeepSpeed is missing: the step runs in its engine."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed is not installed, and the training step runs in its engine; pip install deepspeed")


def random_images(config: Config, device: torch.device) -> Tensor:
    """(B, 3, S, S) from the run's seed, on the device."""
    size = config.data.image_size
    shape = (config.data.global_batch, 3, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(config.seed)).to(device)


class HeldTeacher(ReplicatedTeacher):
    """Holds every block whatever the target, so that aiming at another one loads nothing."""

    def _share(self, block: int) -> range:
        return range(self.spec.depth)

    def _settle(self, block: int) -> None:
        self._lazy.judge(self.spec.depth)
        super()._settle(block)


class Exchangeable:
    """The teacher of a run that is measured with several: stands for `current`."""

    def __init__(self, current: ReplicatedTeacher) -> None:
        self.current = current

    def __getattr__(self, name: str) -> Any:
        return getattr(self.current, name)


class Finished(Exception):
    """The script of a run has ended."""


class Conducted:
    """A loader through which a script conducts a run: it gives the same batch for every item of the script.

    The script goes on when the run asks for the next batch, so between two items of it lies one whole step: the
    decision on the step before, teacher, student, optimizer. Raises Finished at the end of the script.
    """

    def __init__(self, batch: Batch) -> None:
        self.script: Iterator[None] = iter(())
        self._batch = batch

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batch, as long as the script goes on."""
        for _ in self.script:
            yield self._batch
        raise Finished

    def close(self) -> None:
        """Nothing to release."""


def batch_of(images: Tensor) -> Batch:
    """Finished images (B, 3, S, S) as a loader's batch."""
    count = len(images)
    return Batch(images, torch.zeros(count, dtype=torch.long), torch.arange(count), torch.arange(count))


def build_conducted(config: Config, world: World, teacher: ReplicatedTeacher, batch: Batch) -> Trainer:
    """A trainer whose run `conduct` conducts, on the same batch at every step; everything but loader and teacher is a
    run's own.
    """
    size = len(batch.ids)
    spec = describe_teacher(config.teacher, config.data.image_size)
    students = members(config)
    for own in students.values():
        check_pair(own, spec, world.device, size)
    parts = Parts(
        teacher=Exchangeable(teacher),
        students={
            name: build_parts(own, world, spec, None, step_flops(own), own.data, size) for name, own in students.items()
        },
        loader=Conducted(batch),
        bad_samples=BadSamples(Path(config.output) / "bad_samples.jsonl", 0, world),
        checkpoints=Checkpoints(config, world, layout=str(size), teacher=teacher.fingerprint),
        timer=PhaseTimer(world.device),
    )
    return Trainer(config, world, parts)


def conduct(trainer: Trainer, script: Iterator[None]) -> None:
    """Run the trainer, a step for each item of the script."""
    trainer.loader.script = script
    try:
        trainer.run()
    except Finished:
        pass
    finally:
        trainer.close()


def aim(trainer: Trainer, teacher: ReplicatedTeacher, block: int) -> None:
    """Make 1-indexed `block` of `teacher` the target of the next steps."""
    trainer.teacher.current = teacher
    for learner in trainer.cohort.learners.values():
        learner.curriculum.restart_at(block)


def held_teacher(config: Config, device: torch.device) -> tuple[LazyBackbone, HeldTeacher]:
    """The whole teacher on the device, and the blocks it is made of; the rest as `build_teacher` has it."""
    if device.type == "cpu":
        keep_freed_memory()
    lazy = LazyBackbone(config.teacher, config.data.image_size, device)
    return lazy, HeldTeacher(lazy)


def in_dtype(config: Config, dtype: str) -> Config:
    """The same run with its teacher in another dtype."""
    return replace(config, teacher=replace(config.teacher, dtype=dtype))
