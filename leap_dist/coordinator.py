"""One decision for all ranks: the coordinator (rank 0) decides, the rest apply its decision at the same step.

Every rank sends one small row over the host-side control group after each step; row 0 carries the decision. So one
collective per step tells the ranks when to advance, that one of them was told to stop, met samples it could not read or
a loss that is not finite, and that they agree where they are. It waits for the host only: the device still has the
backward pass queued.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from leap_dist.curriculum import Curriculum
from leap_dist.distributed import World, gather_objects, gather_rows
from leap_dist.errors import UserError


class Decision(NamedTuple):
    """What holds for every rank once a step is closed. bad: a rank has met unreadable samples, to be shared now."""

    stop: bool
    bad: bool = False


class Coordinator:
    """Keeps the curriculum of all ranks equal to rank 0's."""

    def __init__(self, curriculum: Curriculum, world: World) -> None:
        self.curriculum = curriculum
        self.world = world

    def decide(self, *, step: int, loss: float, score: float, stop: bool, bad: int = 0) -> Decision:
        """Close step `step` on every rank, the curriculum told of its score. Collective.

        Args:
            loss: this rank's own loss. score: reduced over ranks; NaN when the step was not scored.
            stop: this rank was asked to end the run. bad: samples it could not read, of which the others do not know.

        Raises:
            UserError: a rank's loss is not finite (named), or ranks disagree on step or block.
        """
        curriculum = self.curriculum
        block = curriculum.block
        if self.world.is_main:
            curriculum.observe(score)
        decision = [float(curriculum.block), curriculum.ema, float(curriculum.epochs_on_block)]
        row = torch.tensor([step, block, math.isfinite(loss), stop, *decision, bad], dtype=torch.float64)
        rows = gather_rows(row, self.world)
        self._require_agreement(rows, step)
        if not self.world.is_main:
            curriculum.load_state_dict(self._decided(rows[0]))
        return Decision(bool(rows[:, 3].any()), bool(rows[:, 7].any()))

    def start_at(self, block: int) -> None:
        """Start every rank at rank 0's `block` (calibration). Collective."""
        self.curriculum.restart_at(gather_objects(block, self.world)[0])

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
