"""The training loop: what drives data and teacher, gives the student its work, and saves the run.

What one student makes of a step, its decision included, is `leap_dist.learner`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from leap_dist.config import Config
from leap_dist.curriculum.coordinator import Coordinator, NonFiniteLoss
from leap_dist.data import BadSamples, Batch, Feed, TrainLoader, draw_mix, soft_labels
from leap_dist.errors import UserError
from leap_dist.evaluation import Validation
from leap_dist.learner import Learner
from leap_dist.models import Features, StepFlops
from leap_dist.monitoring import ProfilerWindow
from leap_dist.runtime.checkpoint import Checkpoints
from leap_dist.runtime.distributed import World
from leap_dist.runtime.engine import weights_are_finite
from leap_dist.runtime.progress import Progress, total_steps
from leap_dist.runtime.seeds import MIXUP, step_seed
from leap_dist.runtime.signals import EVALUATING, Interrupt
from leap_dist.runtime.timing import PhaseTimer, RunClock
from leap_dist.teacher import Teacher
from leap_dist.teacher.blame import teacher_fault
from leap_dist.teacher.lookahead import Lookahead, MicroBatch, Work

CALIBRATION_CHUNK = 32  # images at a time against all blocks: 32 x 256 x 1536 x 40 blocks are 2 GB in fp32


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `leap_dist.assembly` puts them together."""

    teacher: Teacher
    flops: StepFlops
    engine: Any
    loader: TrainLoader
    bad_samples: BadSamples
    coordinator: Coordinator
    checkpoints: Checkpoints
    timer: PhaseTimer
    validation: Validation


class Trainer:
    """Runs the steps of one run, from a fresh start or a checkpoint, to the end or to a signal."""

    def __init__(self, config: Config, world: World, parts: Parts) -> None:
        self.config = config
        self.world = world
        self.teacher = parts.teacher
        self.loader = parts.loader
        self.bad_samples = parts.bad_samples
        self.feed = Feed(config.data, world.device)
        self.checkpoints = parts.checkpoints
        self.timer = parts.timer
        self.clock = RunClock()
        self.accumulation = config.engine.accumulation
        self.steps_per_epoch = len(parts.loader) // self.accumulation
        self.total_steps = total_steps(config.epochs, self.steps_per_epoch)
        self.learner = Learner(
            config,
            world,
            engine=parts.engine,
            coordinator=parts.coordinator,
            validation=parts.validation,
            flops=parts.flops,
            timer=parts.timer,
            clock=self.clock,
            depth=parts.teacher.spec.depth,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        self.profiler = ProfilerWindow(config, world, self.timer, parts.teacher.blocks)
        self.lookahead = Lookahead(parts.teacher, self._work, world.device, ahead=config.teacher.prefetch > 0)
        self.progress = self.learner.progress
        self.coming: Optional[Work] = None
        self.trained: Optional[Work] = None  # the last step's, should its loss be non-finite
        self.stopping = False
        self.interrupt = Interrupt()
        self.first_step = 0  # of this session
        self.saved_step = -1

    # -- the run ------------------------------------------------------------------------------------------------------

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at `path`."""
        state = self.checkpoints.load(self.learner.engine, path)
        self.progress = Progress(**state["progress"])
        self.first_step = self.progress.step
        self.learner.load_state_dict(state, self.progress, path.parent.parent)
        self.timer.carry_on(self.learner.costs.phases)
        self.saved_step = self.progress.step if path.parent.resolve() == self.checkpoints.folder.resolve() else -1

    def run(self, interrupt: Optional[Interrupt] = None) -> bool:
        """Train to the last step (True), or until a rank is told to stop (False). Saves in both cases.

        interrupt: of the process, that ends it at a signal until the first step is done.
        """
        if interrupt is None:
            with Interrupt() as interrupt:
                return self.run(interrupt)
        self.interrupt = interrupt
        self.checkpoints.claim_output()
        self.bad_samples.reopen(resumed=self.progress.step > 0)
        self.clock.start(self.learner.costs.seconds)
        self.learner.open()
        if self.progress.step:
            self._keep()  # another run's checkpoint: a kill from here on must not start afresh
            self._evaluate()
        self.profiler.before(self.progress.step)
        while not (self._done or self.stopping):
            self._epoch(interrupt)
        self.profiler.close()
        self._save()
        self.checkpoints.confirm()
        return self._done

    @property
    def _done(self) -> bool:
        """Whether all steps are made, and where they end an epoch, that is closed."""
        return (self.progress.epoch, self.progress.step_in_epoch) >= divmod(self.total_steps, self.steps_per_epoch)

    def close(self) -> None:
        """Release loader workers, the terminal and the output folder; safe at any time."""
        self.loader.close()
        self.learner.journal.close()
        self.checkpoints.release()

    def _epoch(self, interrupt: Interrupt) -> None:
        """The rest of the current epoch, then the curriculum's end-of-epoch check; not if the run ends within it."""
        for batches, following in self._batches():
            self._settle(interrupt)
            if self.stopping:
                return
            if not self.progress.trajectory:
                self.learner.choose_start(lambda last, batches=batches: self._swept(batches, last))
            self.trained = self._next_work(batches, following)
            self.learner.step(self.trained)
            self.progress.step += 1
            self.progress.step_in_epoch += 1
            if self._is_save_due(self.progress.step, self.config.checkpoint.every_steps):
                self._settle(interrupt)
                self._save()
            self.profiler.before(self.progress.step)
        self._settle(interrupt)
        if self.progress.step_in_epoch < self.steps_per_epoch:
            return
        self.learner.end_epoch()
        self.progress.epoch += 1
        self.progress.step_in_epoch = 0
        if self._is_save_due(self.progress.epoch, self.config.checkpoint.every_epochs):
            self._save()
        self._evaluate()

    def _settle(self, interrupt: Interrupt) -> None:
        """Close the step before: its numbers are read and decided on, on every rank."""
        try:
            decision = self.learner.settle(interrupt.requested, self.bad_samples)
        except NonFiniteLoss as error:
            raise self._explained(error) from error
        if decision is not None:
            interrupt.hold()  # there is a step to save from now on
            self.checkpoints.confirm()  # the loss that the saved weights gave is finite
            self.stopping = decision.stop

    def _explained(self, error: NonFiniteLoss) -> UserError:
        """The error, or the teacher's fault if its features of the step's images are not finite. Collective."""
        assert self.trained is not None
        images = (self._view(batch, self.progress.step - 1)[0] for batch in self.trained.batches)
        until = self.teacher.spec.depth if self.config.curriculum.mode == "all_layers" else self.trained.block
        fault = teacher_fault(self.teacher, images, until, self.config.teacher, self.world)
        return error if fault is None else UserError(f"{fault}: {error}")

    # -- what a step trains on ----------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[list[Batch], Optional[list[Batch]]]]:
        """Micro-batches of one optimizer step at a time, from where the epoch was left; and of the step after it, if
        the teacher works ahead and epoch and run have one.
        """
        start = self.progress.step_in_epoch
        stream = self.feed.ahead(self.loader.epoch(self.progress.epoch, start * self.accumulation))
        end = min(self.steps_per_epoch, self.total_steps - self.progress.epoch * self.steps_per_epoch)
        steps = (self._fetched(stream) for _ in range(start, end))
        return pairwise(chain(steps, [None])) if self.config.teacher.prefetch else zip(steps, repeat(None))

    def _fetched(self, stream: Iterator[Batch]) -> list[Batch]:
        with self.timer.phase("data", host=True):
            micro_batches = [next(stream) for _ in range(self.accumulation)]
        for batch in micro_batches:
            self.bad_samples.note(batch.bad)
        return micro_batches

    def _next_work(self, batches: list[Batch], following: Optional[list[Batch]]) -> Work:
        """What the next step trains on; the work of the step after it begins, if its batches are there."""
        step, block_of = self.progress.step, self.learner.block_of
        work = self.coming or self.lookahead.begin(step, self.progress.next_block or block_of(step), batches)
        block = block_of(step + 1)
        self.coming = None if following is None else self.lookahead.begin(step + 1, block, following)
        self.progress.next_block = None if self.coming is None else block
        return work

    def _work(self, step: int, batches: list[Batch]) -> Iterator[MicroBatch]:
        """Images, features and labels of a step, micro-batch by micro-batch."""
        for batch in batches:
            images, labels = self._view(batch, step)
            with self.timer.phase("teacher"):
                targets = self._targets(images)
            yield MicroBatch(images, targets, labels)

    def _view(self, batch: Batch, step: int) -> tuple[Tensor, Optional[Tensor]]:
        """Images and, if the student classifies, soft labels on the device; mixed with draws keyed by seed and step."""
        images, labels, config = self.feed.images(batch), None, self.config
        if config.student.num_classes:
            classes, smoothing = config.student.num_classes, config.objective.label_smoothing
            labels = soft_labels(batch.labels, classes, smoothing, self.world.device)
        if not config.data.mixup:
            return images, labels
        generator = torch.Generator().manual_seed(step_seed(config.seed, step, MIXUP))
        mix = draw_mix(config.data, batch.positions, generator)
        return mix.images(images), None if labels is None else mix.labels(labels)

    def _targets(self, images: Tensor) -> list[Features]:
        if self.config.curriculum.mode == "all_layers":
            return list(self.teacher.sweep(images))
        return [self.teacher.features(images)]

    def _swept(self, batches: list[Batch], last: int) -> Iterator[tuple[Tensor, list[Features]]]:
        """The coming step's images in chunks, each with its features of the blocks 1..last."""
        for batch in batches:
            for images in self._view(batch, self.progress.step)[0].split(CALIBRATION_CHUNK):
                yield images, list(self.teacher.sweep(images, last))

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate the student between two epochs, if that is due and not done. Collective."""
        if self.stopping or not self.learner.validation.is_due(self.progress):
            return
        self._keep()  # what fails from here on does not cost the epoch
        with self.interrupt.saved(EVALUATING):
            self.learner.evaluate()

    @staticmethod
    def _is_save_due(count: int, every: int) -> bool:
        return every > 0 and count % every == 0

    def _keep(self) -> None:
        """Save, and let a resumed run start from that without waiting for the next loss, if the weights are finite."""
        self._save()
        if weights_are_finite(self.learner.engine, self.world):
            self.checkpoints.confirm()

    def _save(self) -> None:
        """Save the run as it stands between two steps, unless that has been done."""
        if self.saved_step == self.progress.step:
            return
        self.learner.read_clocks()
        state = {"progress": asdict(self.progress), **self.learner.state_dict()}
        self.checkpoints.save(self.learner.engine, self.progress.step, state)
        self.saved_step = self.progress.step
