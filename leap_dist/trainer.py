"""The training loop: data -> teacher -> student -> score -> decision -> journal.

The score of a step travels to the host while the backward pass runs, and is read before the next step begins, which
is the first that may see another target block. So nothing waits, and the order is LEAP's: the step's own block gives
its features, loss and score; the decision holds from the next step on (with `teacher.prefetch`, from the one after).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from leap_dist.analysis.live import Spectroscope
from leap_dist.config import Config
from leap_dist.curriculum.coordinator import Coordinator, NonFiniteLoss
from leap_dist.data import BadSamples, Batch, Feed, TrainLoader, draw_mix, soft_labels
from leap_dist.errors import UserError
from leap_dist.evaluation.periodic import Validation
from leap_dist.matching.objective import Match
from leap_dist.matching.reset import reset_heads
from leap_dist.matching.score import Evidence
from leap_dist.models.features import Features
from leap_dist.models.flops import StepFlops
from leap_dist.monitoring.accounting import Accountant, Costs, configured_peaks
from leap_dist.monitoring.journal import Journal
from leap_dist.monitoring.profiling import ProfilerWindow
from leap_dist.monitoring.telemetry import memory_bytes
from leap_dist.runtime.checkpoint import Checkpoints
from leap_dist.runtime.distributed import World, device_name, sum_over_ranks
from leap_dist.runtime.engine import update_numbers, weights_are_finite
from leap_dist.runtime.host_copy import HostCopy
from leap_dist.runtime.optim import lr_factor, peak_lr
from leap_dist.runtime.progress import Progress, total_steps
from leap_dist.runtime.signals import Interrupt
from leap_dist.runtime.timing import CALIBRATION, PhaseTimer
from leap_dist.teacher import Teacher
from leap_dist.teacher.blame import teacher_fault
from leap_dist.teacher.lookahead import Lookahead, MicroBatch, Work

MIXUP, DROPOUT, HEAD = range(3)  # streams of random numbers
CALIBRATION_CHUNK = 32  # images at a time against all blocks: 32 x 256 x 1536 x 40 blocks are 2 GB in fp32


class Pending(NamedTuple):
    """A step whose numbers have not been read yet.

    values: own loss; loss and its terms (means over ranks); score; the update before it, as `update_numbers`.
    batches: its images, should the loss be non-finite.
    """

    step: int
    block: int
    lr: float
    terms: list[str]
    values: HostCopy
    batches: list[Batch]


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
        self.engine = parts.engine
        self.loader = parts.loader
        self.bad_samples = parts.bad_samples
        self.feed = Feed(config.data, world.device)
        self.coordinator = parts.coordinator
        self.curriculum = parts.coordinator.curriculum
        self.checkpoints = parts.checkpoints
        self.validation = parts.validation
        self.accumulation = config.engine.accumulation
        self.steps_per_epoch = len(parts.loader) // self.accumulation
        self.total_steps = total_steps(config.epochs, self.steps_per_epoch)
        self.peak_lr = peak_lr(config.optim, config.data.global_batch)
        self.timer = parts.timer
        for head in parts.engine.module.heads:
            self.timer.watch(head, "match")
        self.accountant = Accountant(
            config, parts.flops, world.size, configured_peaks(config, world.device), device_name(world.device)
        )
        self.profiler = ProfilerWindow(config, world, self.timer, parts.teacher.blocks)
        self.journal = Journal(config, world, self.curriculum, parts.teacher.spec.depth)
        self.spectroscope = Spectroscope(config, world, parts.engine.module.heads[-1])
        self.lookahead = Lookahead(parts.teacher, self._work, world.device, ahead=config.teacher.prefetch > 0)
        self.progress = Progress()
        self.costs = Costs()
        self.coming: Optional[Work] = None
        self.pending: Optional[Pending] = None
        self.stopping = False
        self.first_step = 0  # of this session
        self.saved_step = -1
        self._ledger_from: tuple[int, Optional[Path]] = (0, None)  # lines known to the checkpoint, its run's folder
        self._clock_zero = time.perf_counter()

    # -- the run ------------------------------------------------------------------------------------------------------

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at `path`."""
        state = self.checkpoints.load(self.engine, path)
        self.progress = Progress(**state["progress"])
        self.first_step = self.progress.step
        self.costs = Costs(**state["costs"])
        self.timer.carry_on(self.costs.phases)
        self._ledger_from = (state["ledger_lines"], path.parent.parent)
        self.curriculum.load_state_dict(state["curriculum"])
        self.saved_step = self.progress.step if path.parent.resolve() == self.checkpoints.folder.resolve() else -1

    def run(self) -> bool:
        """Train to the last step (True), or until a rank is told to stop (False). Saves in both cases."""
        self.checkpoints.claim_output()
        self.bad_samples.reopen(resumed=self.progress.step > 0)
        lines, source = self._ledger_from
        self.journal.open(
            self.progress, self.costs, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps, lines=lines,
            source=source,
        )  # fmt: skip
        self._clock_zero = time.perf_counter() - self.costs.seconds
        self.accountant.begin(self.progress.step, self.costs)
        if self.progress.step:
            self._keep()  # another run's checkpoint: a kill from here on must not start afresh
            self._validate()
        self.profiler.before(self.progress.step)
        with Interrupt() as interrupt:
            while not (self._done or self.stopping):
                self._epoch(interrupt)
            # Still inside: a second signal, torchrun's after SLURM's, must not kill the save that the first asked for.
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
        self.journal.close()
        self.checkpoints.release()

    def _epoch(self, interrupt: Interrupt) -> None:
        """The rest of the current epoch, then the curriculum's end-of-epoch check; not if the run ends within it."""
        for batches, following in self._batches():
            self._settle(interrupt)
            if self.stopping:
                return
            if not self.progress.trajectory:
                self._choose_start(batches)
            self._step(self._next_work(batches, following))
            if self._is_save_due(self.progress.step, self.config.checkpoint.every_steps):
                self._settle(interrupt)
                self._save()
            self.profiler.before(self.progress.step)
        self._settle(interrupt)
        if self.progress.step_in_epoch < self.steps_per_epoch:
            return
        target = self.curriculum.block
        if self.curriculum.end_epoch():
            self.journal.decision(self.progress.step - 1, target, math.nan, advanced=True)
        self.progress.epoch += 1
        self.progress.step_in_epoch = 0
        if self._is_save_due(self.progress.epoch, self.config.checkpoint.every_epochs):
            self._save()
        self._validate()

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

    # -- one step -----------------------------------------------------------------------------------------------------

    def _next_work(self, batches: list[Batch], following: Optional[list[Batch]]) -> Work:
        """What the next step trains on; the work of the step after it begins, if its batches are there."""
        step = self.progress.step
        work = self.coming or self.lookahead.begin(step, self.progress.next_block or self._block_of(step), batches)
        block = self._block_of(step + 1)
        self.coming = None if following is None else self.lookahead.begin(step + 1, block, following)
        self.progress.next_block = None if self.coming is None else block
        return work

    def _block_of(self, step: int) -> int:
        """The target block of a step whose work begins now."""
        schedule = self.coordinator.schedule
        return self.curriculum.block if schedule is None else schedule.at(step)

    def _step(self, work: Work) -> None:
        """One optimizer step; leaves its numbers in `pending`."""
        self._enter(work.block)
        torch.manual_seed(self._seed(DROPOUT, self.world.rank))  # drop path and dropout: the same after a resume
        lr = self._set_lr()
        self.spectroscope.before(self.progress.step)
        scored, evidence, losses = self._wants_score(), None, []
        for index, (images, targets, labels) in enumerate(work.micro_batches):
            with self.timer.phase("student.forward"):
                match: Match = self.engine(images, targets, scored, labels)
                losses.append(torch.stack([match.loss.detach(), *match.terms.values()]))
                evidence = self._gathered(evidence, match)
            if index + 1 == self.accumulation:
                means = self._sent(torch.stack(losses).mean(0), evidence)
                self.pending = Pending(self.progress.step, work.block, lr, list(match.terms), means, work.batches)
            with self.timer.phase("student.backward"):
                self.engine.backward(match.loss)
            with self.timer.phase("optimizer"):
                self.engine.step()
        self.progress.step += 1
        self.progress.step_in_epoch += 1

    def _enter(self, block: int) -> None:
        """The student meets a target block: a new one is noted, and the head starts anew if that is asked for."""
        trajectory = self.progress.trajectory
        if trajectory and trajectory[-1][1] == block:
            return
        if trajectory and self.config.curriculum.reset_head:
            reset_heads(self.engine, self._seed(HEAD))
        trajectory.append((self.progress.step, block))
        self.journal.target(self.progress.step, block)

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
        mix = draw_mix(config.data, batch.positions, torch.Generator().manual_seed(self._seed(MIXUP, step=step)))
        return mix.images(images), None if labels is None else mix.labels(labels)

    def _targets(self, images: Tensor) -> list[Features]:
        if self.config.curriculum.mode == "all_layers":
            return list(self.teacher.sweep(images))
        return [self.teacher.features(images)]

    @staticmethod
    def _gathered(evidence: Optional[Evidence], match: Match) -> Optional[Evidence]:
        """Evidence of the deepest target over the micro-batches so far."""
        if not match.evidence:
            return None
        return match.evidence[-1] if evidence is None else evidence.merged(match.evidence[-1])

    def _sent(self, losses: Tensor, evidence: Optional[Evidence]) -> HostCopy:
        """Send own loss, mean losses, score and the last update to the host. losses: own, loss first. Collective."""
        means = self._summed(losses.clone()) / self.world.size
        score = losses.new_full((), math.nan) if evidence is None else self._score(evidence)
        update = update_numbers(self.engine, losses)
        return HostCopy(torch.cat([losses[:1], means, score[None].to(losses), update]))

    def _score(self, evidence: Evidence) -> Tensor:
        with torch.no_grad(), self.timer.phase("match"):
            return evidence.score(self.config.curriculum.reduction, self.world.size, self._summed)

    def _summed(self, tensor: Tensor) -> Tensor:
        with self.timer.phase("communication"):
            return sum_over_ranks(tensor)

    def _wants_score(self) -> bool:
        """At the last block the score decides nothing, so it is computed only when it is shown."""
        return not self.curriculum.finished or self.progress.step % self.config.telemetry.every == 0

    def _set_lr(self) -> float:
        factor = lr_factor(
            self.config.optim,
            step=self.progress.step,
            total_steps=self.total_steps,
            epochs=self.config.epochs,
            advanced_at=self.progress.advanced_at,
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.peak_lr * factor
        return self.peak_lr * factor

    def _seed(self, *stream: int, step: Optional[int] = None) -> int:
        """A seed for a step (null = the current one): every draw of the run is a function of (seed, step, stream), so a
        resume repeats it.
        """
        mixed = np.random.SeedSequence([self.config.seed, self.progress.step if step is None else step, *stream])
        return int(mixed.generate_state(1, np.uint64)[0] >> 1)

    # -- the decision -------------------------------------------------------------------------------------------------

    def _settle(self, interrupt: Interrupt) -> None:
        """Read the last step's numbers, decide on every rank, write it down."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        own_loss, loss, *terms, score, norm, scale = pending.values.read()
        target = self.curriculum.block
        # Work that began before an advance says nothing about the new block.
        judged = score if pending.block == target else math.nan
        with self.timer.phase("decide", host=True):
            try:
                decision = self.coordinator.decide(
                    step=pending.step, loss=own_loss, score=judged, stop=interrupt.requested,
                    bad=len(self.bad_samples.fresh),
                )  # fmt: skip
            except NonFiniteLoss as error:
                raise self._explained(error, pending) from error
        self.checkpoints.confirm()  # the loss that the saved weights gave is finite
        if decision.bad:
            self.bad_samples.share()
        self.accountant.charge(self.costs, pending.block, scored=not math.isnan(score))
        self._read_clocks()
        self.journal.decision(pending.step, pending.block, judged, advanced=self.curriculum.block != target)
        self._report(pending, loss, terms, score, {"update/grad_norm": norm, "update/loss_scale": scale})
        self.stopping = decision.stop

    def _explained(self, error: NonFiniteLoss, pending: Pending) -> UserError:
        """The error, or the teacher's fault if its features of the step's images are not finite. Collective."""
        images = (self._view(batch, pending.step)[0] for batch in pending.batches)
        until = self.teacher.spec.depth if self.config.curriculum.mode == "all_layers" else pending.block
        fault = teacher_fault(self.teacher, images, until, self.config.teacher, self.world)
        return error if fault is None else UserError(f"{fault}: {error}")

    @torch.no_grad()
    def _choose_start(self, batches: list[Batch]) -> None:
        """First step of the run: calibrate if asked to (LEAP: the block the untrained student scores highest on)."""
        how, schedule = "start", self.coordinator.schedule
        if schedule is not None:
            how = "replay"
            self.coordinator.start_at(schedule.at(0))
        elif self.config.curriculum.mode == "leap" and self.config.curriculum.start is None:
            how, chosen = "calibrated", self._calibrated(batches)
            self.coordinator.start_at(chosen)
            how = how if self.curriculum.block == chosen else "snap"
        elif self.config.curriculum.start not in (None, self.curriculum.block):
            how = "snap"
        self._read_clocks()
        self.accountant.begin(self.progress.step, self.costs)  # rates are of steps, not of the calibration
        self.journal.start(how)

    def _calibrated(self, batches: list[Batch]) -> int:
        """The 1-indexed block of the curriculum with the highest score on this batch; the shallowest of equals."""
        evidence: list[Evidence] = []
        last = self.curriculum.climbs_to
        self.engine.eval()
        with self.timer.only(CALIBRATION):
            for batch in batches:
                for images in self._view(batch, self.progress.step)[0].split(CALIBRATION_CHUNK):
                    found = self.engine(images, list(self.teacher.sweep(images, last)), True).evidence
                    evidence = [a.merged(b) for a, b in zip(evidence, found, strict=True)] if evidence else found
            scores = HostCopy(torch.stack([self._score(item) for item in evidence])).read()
        self.engine.train()
        self.accountant.charge_calibration(self.costs, last)
        return 1 + max(range(last), key=lambda i: scores[i] if math.isfinite(scores[i]) else -math.inf)

    # -- what it cost, what is shown, what is kept --------------------------------------------------------------------

    def _report(
        self, pending: Pending, loss: float, terms: list[float], score: float, update: dict[str, float]
    ) -> None:
        self.journal.step(pending.block, loss, score)
        self.journal.points(pending.step, self.spectroscope.scalars())
        if not self.journal.is_due(pending.step):
            return
        scalars = {
            "loss/total": loss,
            **{f"loss/{name}": term for name, term in zip(pending.terms, terms, strict=True)},
            "curriculum/block": pending.block,
            f"curriculum/{self.config.curriculum.metric}": score,
            "curriculum/ema": self.curriculum.ema,
            "lr": pending.lr,
            "data/bad_samples": len(self.bad_samples),
            "memory/peak_gib": memory_bytes(self.world.device) / 2**30,
            **update,
        }
        self.journal.flush()
        self.journal.points(pending.step, scalars | self.accountant.scalars(pending.step, pending.block, self.costs))

    def _validate(self) -> None:
        """Evaluate the student between two epochs, if that is due and not done; the run's clock stands. Collective."""
        progress, costs = self.progress, self.costs
        done = any(line["epoch"] == progress.epoch for line in progress.validations)
        if done or self.stopping or progress.step_in_epoch or not self.validation.is_due(progress.epoch):
            return
        self._keep()  # what fails from here on does not cost the epoch
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self._read_clocks()
        begin = time.perf_counter()
        knn = self.validation.knn(self.engine)
        spent = time.perf_counter() - begin
        self._clock_zero += spent
        progress.validations.append(
            {
                "epoch": progress.epoch,
                "step": progress.step,
                "knn": knn,
                "teacher_flops": costs.flops["teacher"],
                "flops": costs.total_flops,
                "seconds": costs.seconds,
                "evaluation_seconds": spent,
            }
        )
        self.validation.write(progress.validations)
        self.journal.points(progress.step - 1, {"evaluation/knn": knn})

    def _read_clocks(self) -> None:
        """Bring the seconds of `costs` up to now."""
        self.costs.seconds = time.perf_counter() - self._clock_zero
        self.costs.phases = self.timer.totals()

    @staticmethod
    def _is_save_due(count: int, every: int) -> bool:
        return every > 0 and count % every == 0

    def _keep(self) -> None:
        """Save, and let a resumed run start from that without waiting for the next loss, if the weights are finite."""
        self._save()
        if weights_are_finite(self.engine, self.world):
            self.checkpoints.confirm()

    def _save(self) -> None:
        """Save the run as it stands between two steps, unless that has been done."""
        if self.saved_step == self.progress.step:
            return
        self._read_clocks()
        state = {
            "progress": asdict(self.progress),
            "costs": asdict(self.costs),
            "curriculum": self.curriculum.state_dict(),
            "ledger_lines": self.journal.lines(),
        }
        self.checkpoints.save(self.engine, self.progress.step, state)
        self.saved_step = self.progress.step
