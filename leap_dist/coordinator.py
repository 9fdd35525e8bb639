"""One decision for all ranks: the coordinator (rank 0) decides, the rest apply its decision at the same step.

Every rank sends one small row over the host-side control group after each step; row 0 carries the decision. So one
collective per step tells the ranks when to advance, that one of them was told to stop, that a loss was not finite,
and that they agree where they are. It waits for the host only: the device still has the backward pass queued.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch

from leap_dist.curriculum import Curriculum
from leap_dist.distributed import World, gather_objects, gather_rows
from leap_dist.errors import UserError
from leap_dist.ledger import Schedule
from leap_dist.timing import PhaseTimer


class Decision(NamedTuple):
    """What holds for every rank from the next step on."""

    advanced: bool
    stop: bool


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

    def decide(self, *, step: int, loss: float, score: float, stop: bool) -> Decision:
        """Close step `step` on every rank. Collective.

        Args:
            loss: this rank's own loss. score: reduced over ranks; NaN when the step was not scored.
            stop: this rank was asked to end the run.

        Raises:
            UserError: a rank's loss is not finite (named), or ranks disagree on step or block.
        """
        curriculum = self.curriculum
        block = curriculum.block
        advanced = self._judge(step, score) if self.world.is_main else False
        decision = [float(curriculum.block), curriculum.ema, float(curriculum.epochs_on_block), float(advanced)]
        row = torch.tensor([step, block, math.isfinite(loss), stop, *decision], dtype=torch.float64)
        with self.timer.phase("broadcast", host=True):
            rows = gather_rows(row, self.world)
        self._require_agreement(rows, step)
        advanced = bool(rows[0, 7])
        if not self.world.is_main:
            curriculum.load_state_dict(self._decided(rows[0]))
        return Decision(advanced, bool(rows[:, 3].any()))

    def start_at(self, block: int) -> None:
        """Start every rank at rank 0's `block` (calibration). Collective."""
        self.curriculum.restart_at(gather_objects(block, self.world)[0])

    def _judge(self, step: int, score: float) -> bool:
        """Whether the steps after `step` have another block; the score is taken note of in any case."""
        advanced = self.curriculum.observe(score)
        return advanced if self.schedule is None else self.curriculum.follow(self.schedule.at(step + 1))

    def _decided(self, row: torch.Tensor) -> dict:
        block, ema, epochs = row[4:7].tolist()
        state = self.curriculum.state_dict()
        return state | {"block": int(block), "ema": ema, "epochs_on_block": int(epochs)}

    @staticmethod
    def _require_agreement(rows: torch.Tensor, step: int) -> None:
        """A drift between ranks ends the run at once, on every rank, in the same words."""
        for rank, (its_step, its_block, finite) in enumerate(rows[:, :3].tolist()):
            if [its_step, its_block] != rows[0, :2].tolist():
                raise UserError(
                    f"ranks drifted apart: rank {rank} is at step {int(its_step)} on block {int(its_block)}, "
                    f"rank 0 at step {int(rows[0, 0])} on block {int(rows[0, 1])}"
                )
            if not finite:
                raise UserError(f"non-finite loss on rank {rank} at step {step}")
