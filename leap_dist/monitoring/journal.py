"""What a run writes while it goes on: decisions to its ledger, numbers to TensorBoard, lines and a bar to the terminal.

Rank 0 writes. On the other ranks the same calls do nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from leap_dist.config import Config
from leap_dist.curriculum import Curriculum
from leap_dist.curriculum.ledger import LEDGER, Ledger
from leap_dist.errors import UserError
from leap_dist.monitoring.accounting import Costs
from leap_dist.monitoring.telemetry import Bar, Telemetry
from leap_dist.runtime.distributed import World, on_main
from leap_dist.runtime.progress import Progress

log = logging.getLogger(__name__)


class Journal:
    """Of one student, with a curriculum over a teacher of `depth` blocks. It writes from `open` to `close`.

    name: of the student in a cohort. shown: short texts for the bar, of the last step.
    """

    def __init__(self, config: Config, world: World, curriculum: Curriculum, depth: int, name: str = "") -> None:
        self._config = config
        self._world = world
        self._curriculum = curriculum
        self._depth = depth
        self._whose = f"{name}: " if name else ""
        self.shown: dict[str, str] = {}
        self._bar: Optional[Bar] = None
        self._telemetry: Optional[Telemetry] = None
        self._ledger: Optional[Ledger] = None
        self._warned = False
        self._score, self._scored = math.nan, 0  # the last that was taken, and the steps that were done then

    def open(
        self,
        progress: Progress,
        costs: Costs,
        bar: Optional[Bar] = None,
        *,
        steps_per_epoch: int,
        total_steps: int,
        ledger: Sequence[bytes] = (),
    ) -> None:
        """Begin, or go on from a checkpoint. The run keeps `progress` and `costs` up to date for what is written.

        bar: what is said on the terminal stands above it.
        ledger: the lines that a resumed run continues, see `Ledger`.
        """
        self._progress, self._costs = progress, costs
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        if self._world.is_main:
            self._bar = bar
            self._telemetry = Telemetry(self._config, progress.step)
        on_main(lambda: self._open_ledger(ledger), self._world)

    def _open_ledger(self, kept: Sequence[bytes]) -> None:
        self._ledger = Ledger(Path(self._config.output), kept)

    def close(self) -> None:
        """Nothing is written any more; safe at any time."""
        if self._telemetry is not None:
            self._telemetry.close()
        if self._ledger is not None:
            self._attempt(self._ledger.close)

    # -- the ledger ---------------------------------------------------------------------------------------------------

    def start(self, reason: str) -> None:
        """The ledger's first line."""
        self._write(0, self._curriculum.block, decision="start", reason=reason, depth=self._depth)

    def decision(self, step: int, block: int, score: float, advanced: bool) -> None:
        """The ledger's line of a decision: on the score of `step`, which had `block`, or (NaN) on an epoch's end."""
        ema, reason = self._curriculum.last_check
        changes = advanced or self._next_block() != block
        ends = self._progress.step_in_epoch == self._steps_per_epoch or self._progress.step == self._total_steps
        if math.isfinite(score) or changes or ends:
            decision = "advance" if advanced else "stay"
            self._write(step, block, score, ema=ema, decision=decision, reason=reason)

    def state_dict(self) -> dict[str, Any]:
        """How many lines the ledger has so far, all of them on disk, and what tells them apart from others. Collective.

        Raises:
            UserError: on every rank, the disk refuses some of them.
        """
        return on_main(self._flushed, self._world)

    def _flushed(self) -> dict[str, Any]:
        if self._ledger is None:
            return {"ledger_lines": 0, "ledger_mark": ""}
        self._ledger.flush()
        return {"ledger_lines": self._ledger.lines, "ledger_mark": self._ledger.mark}

    def _attempt(self, write: Callable[[], None]) -> None:
        """A write that a run need not end for: what is not on the disk at the next save ends it then. Warns once."""
        try:
            write()
        except UserError as error:
            if not self._warned:
                log.warning("%s waits for the next save: %s", LEDGER, error)
            self._warned = True

    def _next_block(self) -> int:
        """The block of the step after the one that is settled: the curriculum's, unless its work has begun."""
        return self._progress.next_block or self._curriculum.block

    def _write(self, step: int, block: int, score: float = math.nan, ema: float = 0.0, **more: Any) -> None:
        if self._ledger is None:
            return
        self._ledger.write(
            step=step,
            epoch=self._progress.epoch,
            block=block,
            score=score if math.isfinite(score) else None,
            ema=ema,
            threshold=self._config.curriculum.threshold,
            next_block=self._next_block(),
            teacher_flops=self._costs.flops["teacher"],
            seconds=round(self._costs.seconds, 3),
            **more,
        )

    # -- TensorBoard and the terminal ---------------------------------------------------------------------------------

    def target(self, step: int, block: int) -> None:
        """The student meets another target block at the 0-based `step`: a line, and points on both sides of it."""
        if self._telemetry is None:
            return
        self.say(f"step {step}: target block {block} of {self._depth}")
        before = [(step - 1, old) for _, old in self._progress.trajectory[-2:-1]]
        for at, value in [*before, (step, block)]:
            if not self.is_due(at):
                self.points(at, {"curriculum/block": value})

    def step(self, block: int, loss: float, score: float) -> None:
        """Note what the bar shows of a step. A score that was not taken is shown as it last was, with its step."""
        if self._telemetry is None:
            return
        if math.isfinite(score):
            self._score, self._scored = score, self._progress.step
        known = "" if self._scored == self._progress.step else f" (step {self._scored - 1})"
        self.shown = {
            "block": f"{block}/{self._depth}",
            self._config.curriculum.metric: f"{self._score:.3f}{known}" if self._scored else "-",
            "loss": f"{loss:.4f}",
            "teacher FLOPs saved": f"{self._costs.teacher_saved:.0%}",
        }

    def is_due(self, step: int) -> bool:
        """Whether the 0-based `step` gets TensorBoard points, from this rank."""
        return self._telemetry is not None and self._telemetry.is_due(step)

    def points(self, step: int, scalars: Mapping[str, float]) -> None:
        """TensorBoard points, tag -> value, of the 0-based `step`; those that are not finite are left out."""
        if self._telemetry is not None:
            self._telemetry.points(step, {tag: value for tag, value in scalars.items() if math.isfinite(value)})

    def picture(self, step: int, tag: str, pixels: NDArray[np.uint8]) -> None:
        """An image (H, W, 3) in TensorBoard, of the 0-based `step`."""
        if self._telemetry is not None:
            self._telemetry.picture(step, tag, pixels)

    def flush(self) -> None:
        """What has been decided so far is to be read on the disk from now on, if that takes it."""
        if self._ledger is not None:
            self._attempt(self._ledger.flush)

    def say(self, line: str) -> None:
        """A line on the terminal, of this student."""
        if self._bar is not None:
            self._bar.say(self._whose + line)

    def finish(self, summary: dict[str, Any], table: str) -> None:
        """The student's results: hyperparameters with them, and the figure of the curriculum."""
        if self._telemetry is None:
            return
        missing = self._telemetry.finish(summary, table)  # reads the ledger, which the run's last save has flushed
        if missing:
            self.say(missing)
