"""One student: its engine and heads, its schedule, its curriculum and score, and what it writes.

The score of a step travels to the host while the backward pass runs, and is read before the next step begins, which
is the first that may see another target block. So nothing waits, and the order is LEAP's: the step's own block gives
its features, loss and score; the decision holds from the next step on (with `teacher.prefetch`, from the one after).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from leap_dist.matching import Calibration, Evidence, Match, mean_of, reset_heads
from leap_dist.models import StepFlops
from leap_dist.monitoring import Accountant, Bar, Costs, Journal, configured_peaks, memory_bytes
from leap_dist.runtime.aside import Aside
from leap_dist.runtime.distributed import World, device_name, on_first, sum_over_ranks
from leap_dist.runtime.draws import Draws
from leap_dist.runtime.engine import check_scale, update_numbers
from leap_dist.runtime.gradients import Gradients
from leap_dist.runtime.host_copy import HostCopy
from leap_dist.runtime.optim import lr_factor, peak_lr
from leap_dist.runtime.progress import Progress
from leap_dist.runtime.seeds import DROPOUT, HEAD, step_seed
from leap_dist.runtime.timing import SHARED, PhaseTimer, RunClock
from leap_dist.teacher.lookahead import MicroBatch


@dataclass(frozen=True)
class StudentParts:
    """What one student is made of; `leap_dist.assembly` puts it together.

    config: the student's own, whole as if it were a run's alone. timer: of its own phases.
    """

    config: Config
    engine: Any
    coordinator: Coordinator
    flops: StepFlops
    timer: PhaseTimer
    validation: Validation


@dataclass(frozen=True)
class Span:
    """What students of a run have in common. depth: blocks of the teacher; steps are optimizer steps.

    clock: of the run. timer: of the phases that it goes through once for all students.
    """

    depth: int
    steps_per_epoch: int
    total_steps: int
    clock: RunClock
    timer: PhaseTimer


@dataclass(frozen=True)
class Retired:
    """Why a student trains no more. step: whose loss was not finite, or the number of steps if its last update was bad.

    weights_of: the steps that the weights it has now had been through; None: it has none that are good.
    """

    step: int
    why: str
    weights_of: Optional[int]


class _Current(NamedTuple):
    """The optimizer step that is under way; losses and evidence of the micro-batches so far."""

    step: int
    blocks: Sequence[int]
    lr: float
    scored: bool
    losses: list[Tensor]
    evidence: list[Evidence]


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

    name: in a cohort, else "". progress: where the run is, and this student's own target blocks and evaluations.
    """

    def __init__(self, name: str, world: World, parts: StudentParts, span: Span) -> None:
        config = parts.config
        self.name = name
        self.config = config
        self.world = world
        self.engine = parts.engine
        self.gradients = Gradients(parts.engine, config.engine, world)
        self.coordinator = parts.coordinator
        self.curriculum = parts.coordinator.curriculum
        self.validation = parts.validation
        self.timer = parts.timer
        for head in self.engine.module.heads:
            self.timer.watch(head, "match")
        self.flops = parts.flops
        self.span = span
        self.peak_lr = peak_lr(config.optim, config.data.global_batch)
        self.accountant = Accountant(
            config, parts.flops, world.size, configured_peaks(config, world.device), device_name(world.device)
        )
        self.journal = Journal(config, world, self.curriculum, span.depth, name)
        self.spectroscope = Spectroscope(config, world, self.engine.module.heads[-1])
        self.progress = Progress()
        self.costs = Costs()
        self.retired: Optional[Retired] = None
        self.pending: Optional[Pending] = None
        self._current: Optional[_Current] = None
        self._draws = Draws(world.device)
        self._aside = Aside(world.device)
        self._ledger: list[bytes] = []  # on rank 0, the lines known to the checkpoint

    # -- from session to session --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it beside the engine's own state."""
        state = {
            "progress": asdict(self.progress),
            "costs": asdict(self.costs),
            "curriculum": self.curriculum.state_dict(),
            **self.journal.state_dict(),
        }
        return state if self.retired is None else state | {"retired": asdict(self.retired)}

    def load_state_dict(self, state: dict[str, Any], run: Path) -> None:
        """Continue from `state_dict()` of the run in the folder `run`."""
        self.progress = Progress(**state["progress"])
        self.costs = Costs(**state["costs"])
        self.retired = Retired(**state["retired"]) if "retired" in state else None
        known = (run / LEDGER, state["ledger_lines"], state.get("ledger_mark", ""))
        on_first(lambda: self._ledger.extend(known_lines(*known) if self.world.is_main else ()), self.world)
        self.curriculum.load_state_dict(state["curriculum"])
        self.timer.carry_on({phase: value for phase, value in self.costs.phases.items() if phase not in SHARED})

    def open(self, bar: Optional[Bar]) -> None:
        """Begin to write. bar: the run's, on rank 0."""
        length = {"steps_per_epoch": self.span.steps_per_epoch, "total_steps": self.span.total_steps}
        self.journal.open(self.progress, self.costs, bar, **length, ledger=self._ledger)
        self.validation.write(self.progress.validations)  # over whatever has become of the file
        self.accountant.begin(self.progress.step, self.costs)

    def read_clocks(self) -> None:
        """Bring the seconds of `costs` up to now."""
        self.costs.seconds = self.span.clock.seconds()
        self.costs.phases = self.span.timer.totals() | self.timer.totals()

    # -- the start ----------------------------------------------------------------------------------------------------

    def calibration(self) -> Optional[Calibration]:
        """What finds the first target block on the run's first batch, if that is not given."""
        leap = self.config.curriculum.mode == "leap" and self.config.curriculum.start is None
        return Calibration(self.engine, self._over_ranks) if leap and self.coordinator.schedule is None else None

    def start(self, calibrated: Optional[int]) -> None:
        """Begin at the block that is given, or that the calibration has found (LEAP: the block the untrained student
        scores highest on; the shallowest of equals). Collective.
        """
        how, schedule, start = "start", self.coordinator.schedule, self.config.curriculum.start
        if schedule is not None:
            how = "replay"
            self.coordinator.start_at(schedule.at(0))
        elif calibrated is not None:
            self.accountant.charge_calibration(self.costs, self.curriculum.climbs_to)
            self.coordinator.start_at(calibrated)
            how = "calibrated" if self.curriculum.block == calibrated else "snap"
        elif start not in (None, self.curriculum.block):
            how = "snap"
        self.read_clocks()
        self.accountant.begin(self.progress.step, self.costs)  # rates are of steps, not of the calibration
        self.journal.start(how)

    # -- one step -----------------------------------------------------------------------------------------------------

    def wanted(self, step: int, begun: bool = False) -> Sequence[int]:
        """The blocks that a step whose work begins now matches, rising; the last is its target.

        begun: the work may have begun in an earlier session, with the block of then.
        """
        if self.config.curriculum.mode == "all_layers":
            return range(1, self.span.depth + 1)
        if begun and self.progress.next_block:
            return (self.progress.next_block,)
        schedule = self.coordinator.schedule
        return (self.curriculum.block if schedule is None else schedule.at(step),)

    def begin(self, blocks: Sequence[int]) -> None:
        """An optimizer step begins, which matches `blocks`; its micro-batches follow by `train_on`."""
        step = self.progress.step
        self._enter(blocks[-1])
        # Drop path and dropout: the same after a resume.
        self._draws.begin(step_seed(self.config.student_seed, step, DROPOUT, self.world.rank))
        self._current = _Current(step, blocks, self._set_lr(), self._wants_score(), [], [])
        self.spectroscope.before(step)

    def train_on(self, batch: MicroBatch) -> None:
        """The step's next micro-batch. The last one takes the update and leaves the step's numbers in `pending`."""
        current = self._current
        assert current is not None
        last = len(current.losses) + 1 == self.config.engine.accumulation
        with self._draws.turn(last):
            with self.timer.phase("student.forward"):
                targets = batch.targets(current.blocks, logits=self.config.teacher_classes > 0)
                match: Match = self.engine(batch.images, targets, current.scored, batch.labels.get(self.labelling))
                current.losses.append(torch.stack([match.loss.detach(), *match.terms.values()]))
                _gather(current.evidence, match)
            if last:
                means = self._sent(mean_of(current.losses), *current.evidence)
                self.pending = Pending(current.step, current.blocks[-1], current.lr, list(match.terms), means)
            with self.timer.phase("student.backward"):
                self.gradients.add(match.loss)
            with self.timer.phase("optimizer"):
                self.engine.step()
            if last:
                self.engine.module.after_step()

    @property
    def labelling(self) -> tuple[int, float]:
        """Which soft labels it trains on: (classes, smoothing); no classes where it has no classifier."""
        return self.config.student.num_classes, self.config.objective.label_smoothing

    def _enter(self, block: int) -> None:
        """The student meets a target block: a new one is noted, and the head starts anew if that is asked for."""
        trajectory, step = self.progress.trajectory, self.progress.step
        if trajectory and trajectory[-1][1] == block:
            return
        if trajectory and self.config.curriculum.reset_head:
            reset_heads(self.engine, step_seed(self.config.student_seed, step, HEAD))
        trajectory.append((step, block))
        self.journal.target(step, block)

    def _sent(self, losses: Tensor, evidence: Optional[Evidence] = None) -> HostCopy:
        """Send own loss, mean losses, score and the last update to the host. losses: own, loss first. Collective."""
        update = update_numbers(self.engine, losses)  # not aside: the step's own update will write to the loss scale
        with self._aside.work([losses, update, *(() if evidence is None else evidence.tensors)]):
            means, score = self._over_ranks(losses, evidence)
            return HostCopy(torch.cat([losses[:1], means, score[None].to(losses), update]))

    def _over_ranks(self, losses: Tensor, evidence: Optional[Evidence]) -> tuple[Tensor, Tensor]:
        """Mean losses, and the score of all ranks; NaN without evidence. Collective."""
        reduction, objective = self.config.curriculum.reduction, self.engine.module
        with self.timer.phase("match"):
            return objective.over_ranks(losses, evidence, reduction, self.world, self._summed)

    def _summed(self, tensor: Tensor) -> Tensor:
        with self.timer.phase("communication"):
            return sum_over_ranks(tensor)

    def _wants_score(self) -> bool:
        """At the last block the score decides nothing, so it is computed only when it is shown."""
        return not self.curriculum.finished or self.progress.step % self.config.telemetry.every == 0

    def _set_lr(self) -> float:
        step, total, advanced_at = self.progress.step, self.span.total_steps, self.progress.advanced_at
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
        self.span.clock.pause()
        knn = self.validation.knn(self.engine)
        spent = self.span.clock.go_on()
        self.validation.note(progress, knn, costs.flops, seconds=costs.seconds, spent=spent)
        self.journal.points(progress.step - 1, {f"evaluation/{key}": value for key, value in knn.items()})


def _gather(evidence: list[Evidence], match: Match) -> None:
    """Merge what a micro-batch says of the deepest target into what those before have said, if it says anything."""
    if match.evidence:
        evidence[:] = [known.merged(match.evidence[-1]) for known in evidence] or [match.evidence[-1]]
