"""One decision for all ranks: the coordinator (rank 0) decides, the rest apply its decision at the same step.

Every rank sends one small row over the host-side control group after each step; row 0 carries the decision. So one
collective per step tells the ranks when to advance, that one of them was told to stop, met samples it could not read or
a loss that is not finite, and that they agree where they are. It waits for the host only: the device still has the
backward pass queued.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

from leap_dist.curriculum.ledger import Schedule
from leap_dist.curriculum.policy import Curriculum
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, checked_gather, gather_objects
from leap_dist.runtime.timing import PhaseTimer


class Decision(NamedTuple):
    """What holds for every rank once a step is closed. bad: a rank has met unreadable samples, to be shared now."""

    stop: bool
    bad: bool = False


class NonFiniteLoss(UserError):
    """A rank's loss is infinite or no number."""


class Coordinator:
    """Keeps the curriculum of all ranks equal to rank 0's.

    schedule: blocks to take whatever the scores say (`curriculum.replay`). timer: of the run's phases.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        world: World,
        schedule: Optional[Schedule] = None,
        timer: Optional[PhaseTimer] = None,
    ) -> None:
        self.curriculum = curriculum
        self.world = world
        self.schedule = schedule
        self.timer = timer or PhaseTimer(world.device)

    def decide(self, *, step: int, loss: float, score: float, stop: bool, bad: int = 0) -> Decision:
        """Close step `step` on every rank, the curriculum told of its score. Collective.

        Args:
            loss: this rank's own loss. score: reduced over ranks; NaN when the step was not scored.
            stop: this rank was asked to end the run. bad: samples it could not read, of which the others do not know.

        Raises:
            NonFiniteLoss: a rank's loss is not finite (named).
            UserError: ranks disagree on step or block.
        """
        curriculum = self.curriculum
        here = f"step {step} on block {curriculum.block}"
        if self.world.is_main:
            self._judge(step, score)
        row = [curriculum.block, curriculum.ema, curriculum.epochs_on_block, math.isfinite(loss), stop, bad]
        with self.timer.phase("broadcast", host=True):
            rows = checked_gather(here, [float(value) for value in row], self.world).tolist()
        for rank, said in enumerate(rows):
            if not said[3]:
                raise NonFiniteLoss(f"non-finite loss on rank {rank} at step {step}")
        if not self.world.is_main:
            block, ema, epochs = rows[0][:3]
            decided = {"block": int(block), "ema": ema, "epochs_on_block": int(epochs)}
            curriculum.load_state_dict(curriculum.state_dict() | decided)
        return Decision(any(said[4] for said in rows), any(said[5] for said in rows))

    def start_at(self, block: int) -> None:
        """Start every rank at rank 0's `block` (calibration). Collective."""
        self.curriculum.restart_at(gather_objects(block, self.world)[0])

    def _judge(self, step: int, score: float) -> None:
        """Choose the block of the steps after `step`; the score is taken note of in any case."""
        self.curriculum.observe(score)
        if self.schedule is not None:
            self.curriculum.follow(self.schedule.at(step + 1))
