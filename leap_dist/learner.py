"""One student: its engine and heads, its schedule, its curriculum and score, and what it writes.

The score of a step travels to the host while the backward pass runs, and is read before the next step begins, which
is the first that may see another target block. So nothing waits, and the order is LEAP's: the step's own block gives
its features, loss and score; the decision holds from the next step on (with `teacher.prefetch`, from the one after).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from leap_dist.analysis.live import Spectroscope
from leap_dist.config import Config
from leap_dist.curriculum.coordinator import Coordinator, Decision
from leap_dist.curriculum.ledger import LEDGER, known_lines
from leap_dist.data import BadSamples
from leap_dist.evaluation import Validation
from leap_dist.matching import Evidence, Match, best_block, reset_heads
from leap_dist.models import Features, StepFlops
from leap_dist.monitoring import Accountant, Costs, Journal, configured_peaks, memory_bytes
from leap_dist.runtime.distributed import World, device_name, on_first, sum_over_ranks
from leap_dist.runtime.engine import check_scale, update_numbers
from leap_dist.runtime.host_copy import HostCopy
from leap_dist.runtime.optim import lr_factor, peak_lr
from leap_dist.runtime.progress import Progress
from leap_dist.runtime.seeds import DROPOUT, HEAD, step_seed
from leap_dist.runtime.timing import CALIBRATION, PhaseTimer, RunClock
from leap_dist.teacher.lookahead import Work

Sweep = Callable[[int], Iterator[tuple[Tensor, list[Features]]]]


class Pending(NamedTuple):
    """A step whose numbers have not been read yet.

    values: own loss; loss and its terms (means over ranks); score; the update before it, as `update_numbers`.
    """

    step: int
    block: int
    lr: float
    terms: list[str]
    values: HostCopy


class Learner:
    """Trains one student on the work it is given, decides its target blocks, and keeps its books.

    progress: where the run is; the learner notes its own target blocks and evaluations there.
    clock: of the run. depth: blocks of the teacher. total_steps: optimizer steps of the run.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        engine: Any,
        coordinator: Coordinator,
        validation: Validation,
        flops: StepFlops,
        timer: PhaseTimer,
        clock: RunClock,
        depth: int,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self.config = config
        self.world = world
        self.engine = engine
        self.coordinator = coordinator
        self.curriculum = coordinator.curriculum
        self.validation = validation
        self.timer = timer
        for head in engine.module.heads:
            timer.watch(head, "match")
        self.clock = clock
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.peak_lr = peak_lr(config.optim, config.data.global_batch)
        self.accountant = Accountant(
            config, flops, world.size, configured_peaks(config, world.device), device_name(world.device)
        )
        self.journal = Journal(config, world, self.curriculum, depth)
        self.spectroscope = Spectroscope(config, world, engine.module.heads[-1])
        self.progress = Progress()
        self.costs = Costs()
        self.pending: Optional[Pending] = None
        self._ledger: list[bytes] = []  # on rank 0, the lines known to the checkpoint

    # -- from session to session --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it beside the engine's own state and `progress`."""
        return {
            "costs": asdict(self.costs),
            "curriculum": self.curriculum.state_dict(),
            **self.journal.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], progress: Progress, run: Path) -> None:
        """Continue from `state_dict()` of the run in the folder `run`."""
        self.progress = progress
        self.costs = Costs(**state["costs"])
        known = (run / LEDGER, state["ledger_lines"], state.get("ledger_mark", ""))
        on_first(lambda: self._ledger.extend(known_lines(*known) if self.world.is_main else ()), self.world)
        self.curriculum.load_state_dict(state["curriculum"])

    def open(self) -> None:
        """Begin to write."""
        length = {"steps_per_epoch": self.steps_per_epoch, "total_steps": self.total_steps}
        self.journal.open(self.progress, self.costs, **length, ledger=self._ledger)
        self.validation.write(self.progress.validations)  # over whatever has become of the file
        self.accountant.begin(self.progress.step, self.costs)

    def read_clocks(self) -> None:
        """Bring the seconds of `costs` up to now."""
        self.costs.seconds = self.clock.seconds()
        self.costs.phases = self.timer.totals()

    # -- the start ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def choose_start(self, sweep: Sweep) -> None:
        """First step of the run: calibrate if asked to (LEAP: the block the untrained student scores highest on).

        sweep: from the deepest block wanted to the first batch in chunks, images with the features of all blocks up to
        that.
        """
        how, schedule, start = "start", self.coordinator.schedule, self.config.curriculum.start
        if schedule is not None:
            how = "replay"
            self.coordinator.start_at(schedule.at(0))
        elif self.config.curriculum.mode == "leap" and start is None:
            how, chosen = "calibrated", self._calibrated(sweep)
            self.coordinator.start_at(chosen)
            how = how if self.curriculum.block == chosen else "snap"
        elif start not in (None, self.curriculum.block):
            how = "snap"
        self.read_clocks()
        self.accountant.begin(self.progress.step, self.costs)  # rates are of steps, not of the calibration
        self.journal.start(how)

    def _calibrated(self, sweep: Sweep) -> int:
        """The 1-indexed block of the curriculum with the highest score on this batch; the shallowest of equals."""
        last = self.curriculum.climbs_to
        with self.timer.only(CALIBRATION):
            block = best_block(self.engine, sweep(last), self._score)
        self.accountant.charge_calibration(self.costs, last)
        return block

    # -- one step -----------------------------------------------------------------------------------------------------

    def block_of(self, step: int) -> int:
        """The target block of a step whose work begins now."""
        schedule = self.coordinator.schedule
        return self.curriculum.block if schedule is None else schedule.at(step)

    def step(self, work: Work) -> None:
        """One optimizer step; leaves its numbers in `pending`."""
        step = self.progress.step
        self._enter(work.block)
        torch.manual_seed(step_seed(self.config.seed, step, DROPOUT, self.world.rank))  # as it was, after a resume
        lr = self._set_lr()
        self.spectroscope.before(step)
        scored, evidence, losses = self._wants_score(), None, []
        for index, (images, targets, labels) in enumerate(work.micro_batches):
            with self.timer.phase("student.forward"):
                match: Match = self.engine(images, targets, scored, labels)
                losses.append(torch.stack([match.loss.detach(), *match.terms.values()]))
                evidence = _gathered(evidence, match)
            if index + 1 == self.config.engine.accumulation:
                means = self._sent(torch.stack(losses).mean(0), evidence)
                self.pending = Pending(step, work.block, lr, list(match.terms), means)
            with self.timer.phase("student.backward"):
                self.engine.backward(match.loss)
            with self.timer.phase("optimizer"):
                self.engine.step()
        self.engine.module.after_step()

    def _enter(self, block: int) -> None:
        """The student meets a target block: a new one is noted, and the head starts anew if that is asked for."""
        trajectory, step = self.progress.trajectory, self.progress.step
        if trajectory and trajectory[-1][1] == block:
            return
        if trajectory and self.config.curriculum.reset_head:
            reset_heads(self.engine, step_seed(self.config.seed, step, HEAD))
        trajectory.append((step, block))
        self.journal.target(step, block)

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
        step, total, advanced_at = self.progress.step, self.total_steps, self.progress.advanced_at
        optim, epochs = self.config.optim, self.config.epochs
        lr = self.peak_lr * lr_factor(optim, step=step, total_steps=total, epochs=epochs, advanced_at=advanced_at)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    # -- the decision -------------------------------------------------------------------------------------------------

    def settle(self, stop: bool, bad_samples: BadSamples) -> Optional[Decision]:
        """Read the last step's numbers, decide on every rank, write it down. None if there is no such step.

        stop: this rank was asked to end the run.
        """
        if self.pending is None:
            return None
        pending, self.pending = self.pending, None
        own_loss, loss, *terms, score, norm, scale = pending.values.read()
        target = self.curriculum.block
        judged = score if pending.block == target else math.nan  # work begun before an advance is of the old block
        with self.timer.phase("decide", host=True):
            decision = self.coordinator.decide(
                step=pending.step, loss=own_loss, score=judged, stop=stop, bad=len(bad_samples.fresh)
            )
        if decision.bad:
            bad_samples.share()
        check_scale(scale, pending.step)
        self.accountant.charge(self.costs, pending.block, scored=not math.isnan(score))
        self.read_clocks()
        self.journal.decision(pending.step, pending.block, judged, advanced=self.curriculum.block != target)
        update = {"update/grad_norm": norm, "update/loss_scale": scale, "data/bad_samples": len(bad_samples)}
        self._report(pending, loss, terms, score, update)
        return decision

    def end_epoch(self) -> None:
        """The curriculum's end-of-epoch check."""
        target = self.curriculum.block
        if self.curriculum.end_epoch():
            self.journal.decision(self.progress.step - 1, target, math.nan, advanced=True)

    def _report(
        self, pending: Pending, loss: float, terms: list[float], score: float, others: dict[str, float]
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
            "curriculum/threshold": math.nan if self.curriculum.finished else self.curriculum.threshold,
            "lr": pending.lr,
            "memory/peak_gib": memory_bytes(self.world.device) / 2**30,
            **others,
        }
        self.journal.flush()
        self.journal.points(pending.step, scalars | self.accountant.scalars(pending.step, pending.block, self.costs))

    # -- between epochs -----------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate the student between two epochs; the run's clock stands. Collective."""
        progress, costs = self.progress, self.costs
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.read_clocks()
        self.clock.pause()
        knn = self.validation.knn(self.engine)
        spent = self.clock.go_on()
        progress.validations.append(
            {
                "epoch": progress.epoch,
                "step": progress.step,
                **knn,
                "teacher_flops": costs.flops["teacher"],
                "flops": costs.total_flops,
                "seconds": costs.seconds,
                "evaluation_seconds": spent,
            }
        )
        self.validation.write(progress.validations)
        self.journal.points(progress.step - 1, {f"evaluation/{key}": value for key, value in knn.items()})


def _gathered(evidence: Optional[Evidence], match: Match) -> Optional[Evidence]:
    """Evidence of the deepest target over the micro-batches so far."""
    if not match.evidence:
        return None
    return match.evidence[-1] if evidence is None else evidence.merged(match.evidence[-1])
