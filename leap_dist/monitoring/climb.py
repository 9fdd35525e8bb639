"""The climb of one run: `curriculum.png` of its folder, drawn from the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from leap_dist.errors import UserError
from leap_dist.monitoring.comparison import LEDGER, SUMMARY, Series, column, read_ledger, read_summary, stairs

BLOCK, SAVED, SCORE = "#0072b2", "#009e73", "#d55e00"  # Okabe and Ito: told apart by every eye


@dataclass(frozen=True)
class Climb:
    """What a ledger tells of a run over a teacher of `depth` blocks.

    blocks, scores: by step. threshold: that the scores had to reach, if it is known. saved: share of the teacher's
    FLOPs, None before the run has ended.
    """

    depth: int
    blocks: Series
    scores: Series
    threshold: Optional[float]
    saved: Optional[float]

    @property
    def end(self) -> int:
        """Number of steps."""
        return int(self.blocks.steps[-1]) + 1

    @property
    def advances(self) -> list[int]:
        """First steps of the blocks after the first one."""
        return (self.blocks.steps[1:][self.blocks.values[1:] != self.blocks.values[:-1]]).tolist()


def read(folder: Path) -> Climb:
    """Of the run in `folder`. UserError where it has no ledger.

    The ledger of a run that went on without its first half's begins in the middle; then the summary tells the depth.
    """
    ledger, summary = read_ledger(folder), read_summary(folder / SUMMARY)
    if not ledger:
        raise UserError(f"{folder}: no run folder, or nothing is decided yet; it holds no line of {LEDGER}")
    return climb_of(ledger, summary)


def climb_of(ledger: Sequence[dict[str, Any]], summary: Mapping[str, Any]) -> Climb:
    """Of a ledger that has lines, and of the summary as far as there is one."""
    blocks = stairs(ledger)
    depth = ledger[0].get("depth") or summary.get("teacher_depth") or int(blocks.values.max())
    threshold, saved = ledger[-1].get("threshold"), summary.get("teacher_flops_saved")
    return Climb(depth, blocks, column(ledger, "score"), threshold, saved)


def draw(climb: Climb) -> Any:
    """Figure over the steps: the target block with what was not run above it, and the score with its threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_blocks(above, climb)
    _draw_scores(below, climb)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_blocks(axes: Any, climb: Climb) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, blocks = [*climb.blocks.steps, climb.end], [*climb.blocks.values, climb.blocks.values[-1]]
    axes.fill_between(
        steps, blocks, climb.depth, step="post", color=SAVED, alpha=0.22, linewidth=0, label="blocks not run"
    )
    if climb.saved is not None and climb.saved > 0:
        text = f"{climb.saved:.0%} of the teacher's FLOPs saved"
        axes.text(0.02, 0.9, text, transform=axes.transAxes, va="top", color="#00563d")
    axes.step(steps, blocks, where="post", color=BLOCK, linewidth=2, label="target block")
    axes.set(ylabel="teacher block", ylim=(0, climb.depth * 1.04), xlim=(0, climb.end))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 3, 4, 5, 10]))
    axes.legend(loc="lower right", frameon=False)


def _draw_scores(axes: Any, climb: Climb) -> None:
    axes.plot(*climb.scores, color=SCORE, linewidth=1, label="score")
    arrived = climb.blocks.values[-1] == climb.depth  # where the threshold decides nothing any more
    until = max(climb.advances, default=0) if arrived else climb.end
    if until and climb.threshold is not None:
        label = f"threshold {climb.threshold:g}"
        axes.hlines(climb.threshold, 0, until, linestyles="--", color="0.25", linewidth=1, label=label)
    for step in climb.advances:
        axes.axvline(step, color=BLOCK, alpha=0.25, linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="score")
    axes.legend(loc="lower right", frameon=False, ncols=2)
