"""How long a run is, and where it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional


def total_steps(epochs: float, steps_per_epoch: int) -> int:
    """Optimizer steps of a run of so many passes over the data; one at least."""
    return max(1, round(epochs * steps_per_epoch))


@dataclass
class Progress:
    """Saved in every checkpoint.

    trajectory: (first step, block) of every target block so far. next_block: the next step's, where its work has begun
    (`leap_dist.teacher.lookahead`). validations: lines of `leap_dist.evaluation.periodic`.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    trajectory: list[tuple[int, int]] = field(default_factory=list)
    next_block: Optional[int] = None
    validations: list[dict[str, float]] = field(default_factory=list)

    @property
    def advanced_at(self) -> Optional[int]:
        """First step on the current block, if there was an advance."""
        return self.trajectory[-1][0] if len(self.trajectory) > 1 else None
