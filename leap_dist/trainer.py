"""The training loop: what drives data and teacher, gives the students their work, and saves the run.

What one student makes of a step, its decision included, is `leap_dist.learner`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from leap_dist.analysis.album import Album
from leap_dist.cohort import Cohort
from leap_dist.config import Config
from leap_dist.data import BadSamples, Batch, Feed, TrainLoader, draw_mix, soft_labels
from leap_dist.errors import UserError
from leap_dist.learner import Learner, Span, StudentParts
from leap_dist.models import Features
from leap_dist.monitoring import ProfilerWindow
from leap_dist.runtime.checkpoint import Checkpoints
from leap_dist.runtime.distributed import World
from leap_dist.runtime.engine import weights_are_finite
from leap_dist.runtime.progress import Progress, total_steps
from leap_dist.runtime.seeds import MIXUP, step_seed
from leap_dist.runtime.signals import EVALUATING, Interrupt
from leap_dist.runtime.timing import SHARED, PhaseTimer, RunClock
from leap_dist.teacher import Teacher
from leap_dist.teacher.blame import teacher_fault
from leap_dist.teacher.lookahead import Lookahead, MicroBatch, Work

CALIBRATION_CHUNK = 32  # images at a time against all blocks: 32 x 256 x 1536 x 40 blocks are 2 GB in fp32


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `leap_dist.assembly` puts them together. students: by name, see `Cohort`.

    album: with `telemetry.pictures_every`.
    """

    teacher: Teacher
    students: Mapping[str, StudentParts]
    loader: TrainLoader
    bad_samples: BadSamples
    checkpoints: Checkpoints
    timer: PhaseTimer
    album: Optional[Album] = None


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
        self.album = parts.album
        self.clock = RunClock()
        self.accumulation = config.engine.accumulation
        self.steps_per_epoch = len(parts.loader) // self.accumulation
        self.total_steps = total_steps(config.epochs, self.steps_per_epoch)
        span = Span(parts.teacher.spec.depth, self.steps_per_epoch, self.total_steps, self.clock, self.timer)
        learners = {name: Learner(name, world, own, span) for name, own in parts.students.items()}
        self.cohort = Cohort(config, world, learners)
        timers = [self.timer, *(own.timer for own in parts.students.values())]
        self.profiler = ProfilerWindow(config, world, timers, parts.teacher.blocks)
        self.lookahead = Lookahead(parts.teacher, self._work, world.device, ahead=config.teacher.prefetch > 0)
        self.coming: Optional[Work] = None
        self.trained: Optional[Work] = None  # the last step's, should a loss be non-finite
        self.stopping = False
        self.interrupt = Interrupt()
        self.first_step = 0  # of this session
        self.seconds_before = 0.0  # in earlier ones
        self.saved_step = -1

    @property
    def progress(self) -> Progress:
        """Where the run is."""
        return self.cohort.progress

    @property
    def learner(self) -> Learner:
        """The student of a run that has one; the first of a cohort."""
        return next(iter(self.cohort.learners.values()))

    # -- the run ------------------------------------------------------------------------------------------------------

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at `path`."""
        self.cohort.load_state_dicts(self.checkpoints.load(self.cohort.engines, path), path.parent.parent)
        self.first_step = self.progress.step
        known = max((one.costs for one in self.cohort.learners.values()), key=lambda costs: costs.seconds)
        self.timer.carry_on({phase: value for phase, value in known.phases.items() if phase in SHARED})
        self.seconds_before = known.seconds
        self.saved_step = self.progress.step if path.parent.resolve() == self.checkpoints.folder.resolve() else -1

    def run(self, interrupt: Optional[Interrupt] = None) -> bool:
        """Train to the last step, or until no student is left that can (True), or until a rank is told to stop (False).
        Saves in all cases.

        interrupt: of the process, that ends it at a signal until the first step is done.
        """
        if interrupt is None:
            with Interrupt() as interrupt:
                return self.run(interrupt)
        self.interrupt = interrupt
        self.checkpoints.claim_output()
        self.bad_samples.reopen(resumed=self.progress.step > 0)
        self.clock.start(self.seconds_before)
        self.cohort.open()
        if self.progress.step:
            self._keep()  # another run's checkpoint: a kill from here on must not start afresh
            self._evaluate()
        self.profiler.before(self.progress.step)
        while not (self._done or self.stopping):
            self._epoch(interrupt)
        self.profiler.close()
        self._retire_spoilt()
        self._save()
        self.checkpoints.confirm()
        self._draw()
        self.cohort.ended("end" if self._done else "stop")
        return self._done

    @property
    def _done(self) -> bool:
        """Whether all steps are made, and where they end an epoch, that is closed; or nobody is left to make them."""
        here = self.progress.epoch, self.progress.step_in_epoch
        return not self.cohort.active or here >= divmod(self.total_steps, self.steps_per_epoch)

    def close(self) -> None:
        """Release loader workers, the terminal and the output folder; safe at any time."""
        self.loader.close()
        self.cohort.close()
        self.checkpoints.release()

    def _epoch(self, interrupt: Interrupt) -> None:
        """The rest of the current epoch, then the curriculum's end-of-epoch check; not if the run ends within it."""
        for batches, following in self._batches():
            self._settle(interrupt)
            if self.stopping or not self.cohort.active:
                return
            if not self.progress.trajectory:
                self.cohort.choose_start(lambda last, batches=batches: self._swept(batches, last))
            self.trained = self._next_work(batches, following)
            self.cohort.step(self.trained)
            if _is_save_due(self.progress.step, self.config.checkpoint.every_steps):
                self._settle(interrupt)
                self._save()
            if self.album is not None and self.album.is_due(self.progress.step):
                self._settle(interrupt)  # a student that this retires is not drawn
                self._draw()
            self.profiler.before(self.progress.step)
        self._settle(interrupt)
        if self.progress.step_in_epoch < self.steps_per_epoch or not self.cohort.active:
            return
        self.cohort.end_epoch()
        if _is_save_due(self.progress.epoch, self.config.checkpoint.every_epochs):
            self._save()
        self._evaluate()

    def _settle(self, interrupt: Interrupt) -> None:
        """Close the step before: its numbers are read and decided on, on every rank."""
        settled = self.cohort.settle(interrupt.requested, self.bad_samples)
        if settled is None:
            return
        self.stopping = settled.stop
        if not settled.failed:
            interrupt.hold()  # there is a step to save from now on
            self.checkpoints.confirm()  # the losses that the saved weights gave are finite
            return
        first = next(iter(settled.failed.values()))
        fault = self._teachers_fault()
        if fault is not None:
            raise UserError(f"{fault}: {first}") from first
        if not self.config.students:
            raise first
        interrupt.hold()
        self.checkpoints.abandon()  # what was saved last gave the bad loss
        for name, error in settled.failed.items():
            self._retire(name, str(error), self.progress.step - 1)
        self._save()

    def _retire(self, name: str, why: str, step: int) -> None:
        """One student of a cohort fails: its last good weights come back, the others go on. Collective."""
        weights_of = self.checkpoints.restore_good(name, self.cohort.learners[name].engine)
        self.cohort.retire(name, why, step, weights_of)

    def _retire_spoilt(self) -> None:
        """At the end of a cohort's run no further loss would show what its last update did to a student. Collective."""
        if not self.config.students:
            return
        for name, learner in self.cohort.active.items():
            if not weights_are_finite(learner.engine, self.world):
                self.checkpoints.abandon()
                self.saved_step = -1
                self._retire(name, f"non-finite weights after step {self.progress.step - 1}", self.progress.step)

    def _teachers_fault(self) -> Optional[str]:
        """What is wrong with the teacher, if its features of the last step's images are not finite. Collective."""
        assert self.trained is not None
        images = (self._view(batch, self.progress.step - 1)[0] for batch in self.trained.batches)
        return teacher_fault(self.teacher, images, self.trained.blocks[-1], self.config.teacher, self.world)

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
        step, learners = self.progress.step, self.cohort.active
        work = self.coming or self.lookahead.begin(step, self.cohort.wanted(step, begun=True), batches)
        wanted = self.cohort.wanted(step + 1)
        self.coming = None if following is None else self.lookahead.begin(step + 1, wanted, following)
        for name, learner in learners.items():
            learner.progress.next_block = None if self.coming is None else wanted[name][-1]
        return work

    def _work(self, step: int, blocks: list[int], batches: list[Batch]) -> Iterator[MicroBatch]:
        """Images, features and labels of a step, micro-batch by micro-batch."""
        for batch in batches:
            images, labels = self._view(batch, step)
            with self.timer.phase("teacher"):
                features = self.teacher.features_of(images, blocks)
            yield MicroBatch(images, features, labels)

    def _view(self, batch: Batch, step: int) -> tuple[Tensor, dict[tuple[int, float], Tensor]]:
        """Images and, for students that classify, soft labels by (classes, smoothing), on the device; mixed with draws
        keyed by seed and step.
        """
        images, device = self.feed.images(batch), self.world.device
        asked = {one.labelling for one in self.cohort.active.values() if one.config.student.num_classes}
        labels = {how: soft_labels(batch.labels, *how, device) for how in sorted(asked)}
        if not self.config.data.mixup:
            return images, labels
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, step, MIXUP))
        mix = draw_mix(self.config.data, batch.positions, generator)
        return mix.images(images), {how: mix.labels(soft) for how, soft in labels.items()}

    def _swept(self, batches: list[Batch], last: int) -> Iterator[tuple[Tensor, list[Features]]]:
        """The coming step's images in chunks, each with its features of the blocks 1..last."""
        for batch in batches:
            for images in self._view(batch, self.progress.step)[0].split(CALIBRATION_CHUNK):
                yield images, list(self.teacher.sweep(images, last))

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate the students between two epochs, if that is due and not done. Collective."""
        due = [one for one in self.cohort.active.values() if one.validation.is_due(one.progress)]
        if self.stopping or not due:
            return
        self._keep()  # what fails from here on does not cost the epoch
        with self.interrupt.saved(EVALUATING):
            for learner in due:
                # In a cohort the next loss retires one that is spoilt; alone it ends the run here, with the reason.
                if not self.config.students or weights_are_finite(learner.engine, self.world):
                    learner.evaluate()

    def _draw(self) -> None:
        """Pictures of the students as they stand, if there are to be any. Collective."""
        if self.album is not None and not self.stopping:
            self.cohort.draw(self.album, self.teacher)

    def _keep(self) -> None:
        """Save, and let a resumed run start from that without waiting for the next loss, if the weights are finite."""
        self._save()
        if all(weights_are_finite(one.engine, self.world) for one in self.cohort.active.values()):
            self.checkpoints.confirm()

    def _save(self) -> None:
        """Save the run as it stands between two steps, unless that has been done."""
        if self.saved_step == self.progress.step:
            return
        self.checkpoints.save(self.cohort.engines, self.progress.step, self.cohort.state_dicts())
        self.saved_step = self.progress.step


def _is_save_due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0
