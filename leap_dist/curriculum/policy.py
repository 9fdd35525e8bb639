"""LEAP's curriculum (arXiv 2606.19483): which teacher block is imitated now, and when the next one is.

A state machine of numbers in, numbers out: it knows no tensors, models or ranks. One rank feeds it, its block is
broadcast.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Literal, NamedTuple, Optional

from leap_dist.config import CurriculumConfig
from leap_dist.errors import UserError

Reason = Literal["threshold", "max_epochs", "snap", "replay", "below_threshold", "held", "last_block", "unscored"]


class Check(NamedTuple):
    """What the last check saw, and why it moved on or did not."""

    ema: float
    reason: Reason


class Curriculum:
    """Target block, 1-indexed from the shallowest, rising to `depth` one check at a time.

    depth: the deepest block it ever reaches. A curriculum that starts there is finished: a fixed target is that.
    hold_at, last_after: no score takes it past the block `hold_at`; after `last_after` epochs of the run, wherever it
        is, it jumps to `depth`. None: neither.
    threshold, ema_alpha: advance when the score's EMA, ema <- a*score + (1-a)*ema from 0, reaches the threshold.
    max_epochs_per_block: advance after this many epochs whatever the score; the one a block is entered in counts whole.
    snap_to_last_at: from this block on, jump to `hold_at`, or `depth`.
    """

    def __init__(
        self,
        depth: int,
        threshold: float = 0.85,
        ema_alpha: float = 1.0,
        max_epochs_per_block: int = 5,
        start: int = 1,
        snap_to_last_at: Optional[int] = None,
        hold_at: Optional[int] = None,
        last_after: Optional[int] = None,
    ) -> None:
        self.depth = depth
        self.climbs_to = hold_at or depth
        self.last_after = last_after
        self.epochs = 0
        self.threshold = threshold
        self.ema_alpha = ema_alpha
        self.max_epochs_per_block = max_epochs_per_block
        self.snap_to_last_at = snap_to_last_at
        self.last_check = Check(0.0, "unscored")
        self.restart_at(start)

    @property
    def finished(self) -> bool:
        """Whether it has climbed, so that no score can change anything any more."""
        return self.block >= self.climbs_to

    def observe(self, score: float) -> bool:
        """Take one step's score of the current block; return whether the block changed.

        A non-finite score is ignored: it says nothing about the block, and in the EMA it would stay for ever.
        """
        if not math.isfinite(score):
            self.last_check = Check(self.ema, "unscored")
            return False
        self.ema = self.ema_alpha * score + (1 - self.ema_alpha) * self.ema
        return self._check()

    def end_epoch(self) -> bool:
        """Count one more epoch, of the run and on the current block; return whether the block changed."""
        self.epochs += 1
        self.epochs_on_block += 1
        return self._check()

    def follow(self, block: int) -> bool:
        """Go to `block`, as a replayed ledger has it; return whether that is a change."""
        if block == self.block:
            return False
        self.last_check = Check(self.ema, "replay")
        self._enter(block)
        return True

    def restart_at(self, block: int) -> None:
        """Begin at `block`, or where that snaps to."""
        self._enter(block)
        self._snap()

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes during a run, as plain numbers."""
        return {
            "depth": self.depth, "block": self.block, "ema": self.ema, "epochs": self.epochs,
            "epochs_on_block": self.epochs_on_block,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises UserError if it was taken from a curriculum of another depth."""
        if state["depth"] != self.depth:
            raise UserError(
                f"checkpoint: its curriculum goes to teacher block {state['depth']}, this run's to block {self.depth}; "
                "resume with the same teacher, curriculum.block and curriculum.last_block_after"
            )
        self.epochs = state.get("epochs", 0)
        self._enter(state["block"], state["ema"], state["epochs_on_block"])
        self._snap()

    def _enter(self, block: int, ema: float = 0.0, epochs_on_block: int = 0) -> None:
        if not 1 <= block <= self.depth:
            raise ValueError(f"block {block} is outside 1..{self.depth}")
        self.block = block
        self.ema = ema
        self.epochs_on_block = epochs_on_block

    def _snap(self) -> bool:
        target = self.block
        if self.snap_to_last_at is not None and self.block >= self.snap_to_last_at:
            target = max(target, self.climbs_to)
        if self.last_after is not None and self.epochs >= self.last_after:
            target = self.depth
        if target == self.block:
            return False
        self._enter(target)
        return True

    def _check(self) -> bool:
        block, ema = self.block, self.ema
        self.last_check = Check(ema, self._move_on())
        return self.block != block

    def _move_on(self) -> Reason:
        """Advance if it is time; return why, or why not."""
        if self._snap():
            return "snap"
        if self.finished:
            return "last_block" if self.block == self.depth else "held"
        if self.ema < self.threshold and self.epochs_on_block < self.max_epochs_per_block:
            return "below_threshold"
        reason: Reason = "max_epochs" if self.ema < self.threshold else "threshold"
        self._enter(self.block + 1)
        return "snap" if self._snap() else reason


def build_curriculum(config: CurriculumConfig, depth: int) -> Curriculum:
    """The curriculum of `config` over a teacher of `depth` blocks.

    It ends at `block`, or at the last; with `last_block_after` it only waits at `block`. The modes without a curriculum
    are one that starts where it ends.
    One that replays a ledger never moves on by itself, and goes as deep as the ledger does.
    Raises UserError if block, start or snap_to_last_at lies outside the teacher, or one of the two beyond the end.
    """
    for key in ("block", "start", "snap_to_last_at"):
        value = getattr(config, key)
        if value is not None and not 1 <= value <= depth:
            raise UserError(f"curriculum.{key}={value}: the teacher has {depth} blocks; use 1 to {depth}, or null")
    last = config.block or depth
    if config.mode != "leap":
        return Curriculum(last, start=last)
    if config.replay is not None:
        return Curriculum(depth, math.inf, config.ema_alpha, max_epochs_per_block=sys.maxsize)
    for key in ("start", "snap_to_last_at"):
        if (getattr(config, key) or 1) > last:
            raise UserError(f"curriculum.{key}={getattr(config, key)}: it climbs to curriculum.block={last} only")
    holds = config.last_block_after is not None
    return Curriculum(
        depth if holds else last,
        threshold=config.threshold,
        ema_alpha=config.ema_alpha,
        max_epochs_per_block=config.max_epochs_per_block,
        start=config.start or 1,
        snap_to_last_at=config.snap_to_last_at,
        hold_at=last if holds else None,
        last_after=config.last_block_after,
    )
