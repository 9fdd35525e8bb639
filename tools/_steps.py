"""A run's own training steps on images that are already on hand, one at a time, for the tools that measure steps.

What is not a run's: the images (random, the same every step), the curriculum (it goes where the tool aims it) and, by
default, the teacher's weights (random) and a learning rate at which the student stays what it is, so that no step
differs from the next.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from leap_dist.assembly import build_objective, check_pair
from leap_dist.checkpoint import Checkpoints
from leap_dist.config import Config, load
from leap_dist.coordinator import Coordinator
from leap_dist.curriculum import build_curriculum
from leap_dist.data import Batch
from leap_dist.distributed import World
from leap_dist.engine import build_engine
from leap_dist.errors import UserError
from leap_dist.flops import teacher_flops
from leap_dist.optim import build_optimizer
from leap_dist.teacher import describe_teacher
from leap_dist.teacher.lazy import LazyBackbone
from leap_dist.teacher.replicated import ReplicatedTeacher
from leap_dist.telemetry import Telemetry
from leap_dist.trainer import Interrupt, Parts, Trainer

STEPS_PER_EPOCH = 10**6
# Instead of the run's own; overrides on the tool's command line come later and win.
DEFAULTS = [
    "data.train=digits", "data.val=null", "teacher.weights=random", "optim.lr=1e-6", "telemetry.progress=false",
]  # fmt: skip
# What the tools decide: every target must be one that a score could still end.
FIXED = [
    "teacher.placement=replicated", "teacher.memory_budget=null", "curriculum.mode=leap", "curriculum.block=null",
    "curriculum.start=1", "curriculum.snap_to_last_at=null", "curriculum.threshold=1e9", "engine.accumulation=1",
    "resume=none",
]  # fmt: skip


def load_for_steps(path: Path | None, overrides: list[str], *, batch: int, output: Path) -> Config:
    """A run's config made fit for steps without data. output: where the steps' telemetry goes.

    Raises:
        UserError: as `leap_dist.config.load`, or an override of what the tools decide.
    """
    decided = [*FIXED, f"data.global_batch={batch}", f"output={output}"]
    for override in overrides:
        if override.split("=")[0] in {item.split("=")[0] for item in decided}:
            raise UserError(f"{override}: decided by this tool; leave it out")
    return load(path, [*DEFAULTS, *overrides, *decided])


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


class OneBatch:
    """A loader that gives the same micro-batch for ever."""

    def __init__(self, images: Tensor) -> None:
        count = len(images)
        self._batch = Batch(images, torch.zeros(count, dtype=torch.long), torch.arange(count))

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batch, again and again."""
        return itertools.repeat(self._batch)

    def close(self) -> None:
        """Nothing to release."""


class Steps:
    """The steps of `leap_dist.trainer`, at any target block.

    teacher: built by the caller from `lazy`, which holds the blocks. Telemetry is on, and writes into config.output.
    """

    def __init__(self, config: Config, world: World, teacher: ReplicatedTeacher, images: Tensor) -> None:
        spec = describe_teacher(config.teacher, config.data.image_size)
        check_pair(config, spec)
        objective = build_objective(config, spec)
        parts = Parts(
            teacher=teacher,
            flops=teacher_flops(config.teacher, config.data.image_size),
            engine=build_engine(config, objective, build_optimizer(config.optim, objective), len(images)),
            loader=OneBatch(images),
            coordinator=Coordinator(build_curriculum(config.curriculum, spec.depth), world),
            checkpoints=Checkpoints(config, world, num_samples=len(images)),
        )
        self.trainer = Trainer(config, world, parts)
        self.trainer.telemetry = Telemetry(config, self.trainer.total_steps, 0)
        self._interrupt = Interrupt()
        self._batches = self.trainer._batches()

    def aim(self, block: int) -> None:
        """Make 1-indexed `block` the target of the steps that follow."""
        self.trainer.teacher.retarget(block)
        self.trainer.curriculum.restart_at(block)

    def run(self, count: int = 1) -> None:
        """`count` steps as a run takes them: the decision on the last one, data, teacher, student, optimizer."""
        for _ in range(count):
            micro_batches = next(self._batches)
            self.trainer._settle(self._interrupt)
            self.trainer._step(micro_batches)

    def close(self) -> None:
        """Release telemetry."""
        self.trainer.close()


def held_teacher(config: Config, device: torch.device) -> tuple[LazyBackbone, HeldTeacher]:
    """The whole teacher on the device, and the blocks it is made of."""
    lazy = LazyBackbone(config.teacher, config.data.image_size, device)
    return lazy, HeldTeacher(lazy)


def in_dtype(config: Config, dtype: str) -> Config:
    """The same run with its teacher in another dtype."""
    return replace(config, teacher=replace(config.teacher, dtype=dtype))
