"""Runs side by side: score, loss, target block and accuracy over steps, over the teacher's FLOPs and over seconds.

Reads of each run folder what is there: curriculum.jsonl (the ledger of decisions), TensorBoard (curriculum/block,
curriculum/cka or curriculum/cosine, loss/total), evaluation.jsonl (kNN between epochs, `evaluation.every_epochs`) and
summary.json (accuracies of the student at the end). Without a ledger score and blocks are TensorBoard's, seconds are
counted from its first point, and there are no FLOPs. Runs of one name have one colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leap_dist.errors import UserError
from leap_dist.monitoring.board import read_points
from leap_dist.runtime.integrity import check_named, read_lines, read_sealed

LEDGER, SUMMARY, BOARD, VALIDATION = "curriculum.jsonl", "summary.json", "tensorboard", "evaluation.jsonl"
SCORES = ("curriculum/cka", "curriculum/cosine")
AXES = {"step": "optimizer step", "flops": "teacher FLOPs spent", "seconds": "seconds"}
ROWS = {"score": "score", "loss": "loss", "block": "target block"}
KINDS = {"patch": "patches", "cls": "class token", "cls_patch": "both"}  # of features that are judged
MEASURES = {"knn": ("o", "kNN"), "probe": ("^", "linear probe")}


class Series(NamedTuple):
    """Values by step."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run folder tells.

    series: by the names of ROWS and of KINDS, the latter being kNN between epochs; clocks: cumulative FLOPs and seconds
    by step, as far as they are known; accuracies: of the finished student, by kind and measure; missing: inputs that
    are not there, for the user.
    """

    name: str
    series: dict[str, Series]
    clocks: dict[str, Series]
    accuracies: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def along(self, axis: str, steps: np.ndarray) -> np.ndarray | None:
        """Where `steps` lie on an axis of AXES; None where the run does not tell."""
        if axis == "step":
            return steps
        clock = self.clocks.get(axis)
        return None if clock is None else np.interp(steps, clock.steps, clock.values)

    @property
    def last_step(self) -> int:
        """Of all that is known."""
        return int(max(series.steps[-1] for series in self.series.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(folder: Path, name: str) -> Run:
    """The run in `folder`. UserError if there is none, or a file of it cannot be read."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    ledger, board, summary = read_ledger(folder), _board(folder / BOARD), read_summary(folder / SUMMARY)
    validations = read_validations(folder)
    series = {row: found for row, found in board.items() if row in ROWS}
    clocks = {"seconds": board["seconds"]} if "seconds" in board else {}
    if ledger:
        series |= {"score": column(ledger, "score"), "block": stairs(ledger)}
        clocks = {"flops": column(ledger, "teacher_flops"), "seconds": column(ledger, "seconds")}
    series |= {kind: column(validations, f"{kind}_knn") for kind in KINDS}
    series = {row: found for row, found in series.items() if len(found.steps)}
    if not series:
        raise UserError(f"{folder}: no run folder; it holds neither {LEDGER} nor TensorBoard points of a run")
    accuracies = {
        kind: found
        for kind in KINDS
        if (found := {m: summary[f"student_{kind}_{m}"] for m in MEASURES if f"student_{kind}_{m}" in summary})
    }
    there = {LEDGER: ledger, BOARD: board, SUMMARY: summary, f"accuracies in {SUMMARY}": accuracies or not summary}
    return Run(
        name=name,
        series=series,
        clocks={axis: clock for axis, clock in clocks.items() if len(clock.steps)},
        accuracies=accuracies,
        missing=tuple(what for what, found in there.items() if not found),
    )


@dataclass(frozen=True)
class _Decision:
    """What is read of a ledger's line."""

    step: int
    block: int
    score: float | None = None
    next_block: int | None = None
    teacher_flops: float | None = None
    seconds: float | None = None
    threshold: float | None = None
    depth: int | None = None


@dataclass(frozen=True)
class _Validation:
    """What is read of a line of evaluation.jsonl."""

    step: int


@dataclass(frozen=True)
class _Summary:
    """What is read of summary.json."""

    teacher_depth: int | None = None
    teacher_flops_saved: float | None = None
    epochs: float | None = None
    train_seconds: float | None = None
    flops: dict[str, float] = field(default_factory=dict)


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ledger; none where it is not there. UserError for one that is damaged."""
    return _lines(folder / LEDGER, _Decision)


def read_validations(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's evaluations between epochs, each at the last step that was done by then."""
    return [{**line, "step": line["step"] - 1} for line in _lines(folder / VALIDATION, _Validation)]


def _lines(path: Path, shape: Any) -> list[dict[str, Any]]:
    """Of a file in the run folder; none where it is not there. UserError for what is not what was written."""
    if not path.is_file():
        return []
    try:
        check_named(path, path.with_name(SUMMARY))
        return read_lines(path, shape)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def column(lines: Sequence[dict[str, Any]], key: str) -> Series:
    """The numbers of a key by step, the last where a step has several."""
    found = {line["step"]: line[key] for line in lines if line.get(key) is not None}
    return Series(np.array(sorted(found)), np.array([float(found[step]) for step in sorted(found)]))


def stairs(ledger: Sequence[dict[str, Any]]) -> Series:
    """The target block by step: its first line's own, and of an advance the next step's, which need not have a line.

    A step may have a second line, of the epoch that ended with it: then the block that it names was never trained on.
    """
    last, own, following = ledger[-1]["step"], {}, {}
    for line in ledger:
        own.setdefault(line["step"], line["block"])
        if line.get("next_block", line["block"]) != line["block"] and line["step"] < last:
            following[line["step"] + 1] = line["next_block"]
    found = following | own
    return Series(np.array(sorted(found)), np.array([float(found[step]) for step in sorted(found)]))


def _board(folder: Path) -> dict[str, Series]:
    """Loss, score, block, and seconds since the first point, of a TensorBoard folder; empty if there is none."""
    points = read_points(folder, {*SCORES, "loss/total", "curriculum/block"}.__contains__)
    score = next((tag for tag in SCORES if tag in points), None)
    found = {}
    for name, tag in {"loss": "loss/total", "block": "curriculum/block", "score": score}.items():
        if tag in points:
            steps = np.array(points[tag].steps)
            found[name] = Series(steps, np.array(points[tag].values))
            found["seconds"] = Series(steps, np.array(points[tag].times) - points[tag].times[0])
    return found


def read_summary(path: Path) -> dict[str, Any]:
    """Of a run folder; empty where it is not there. UserError for what is not what was written."""
    if not path.is_file():
        return {}
    summary, fault = read_sealed(path, shape=_Summary)
    if fault:
        raise UserError(f"{path} {fault}; remove it, and resume=auto writes it anew")
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def draw(runs: Sequence[Run]) -> Any:
    """Figure: a row for each of ROWS and KINDS that a run has, a column for each of AXES."""
    from matplotlib.figure import Figure

    colors = _colors(runs)
    labels = ROWS | {kind: f"accuracy by {words}" for kind, words in KINDS.items()}
    rows = [row for row in labels if any(row in run.series or row in run.accuracies for run in runs)]
    figure = Figure(figsize=(13, 2.9 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), len(AXES), squeeze=False, sharex="col", sharey="row")
    for row, panels in zip(rows, grid, strict=True):
        for axis, panel in zip(AXES, panels, strict=True):
            for run in runs:
                _draw_run(panel, run, row, axis, colors[run.name])
            panel.grid(alpha=0.3)
        panels[0].set_ylabel(labels[row])
        if row == "loss":
            panels[0].set_yscale("log")
    for label, panel in zip(AXES.values(), grid[-1], strict=True):
        panel.set_xlabel(label)
    _legend(figure, runs, colors)
    return figure


def _colors(runs: Sequence[Run]) -> dict[str, str]:
    """A color for each name: matplotlib's ten, or where they do not go round, twenty."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    names = list(dict.fromkeys(run.name for run in runs))
    if len(names) <= 10:
        return {name: f"C{index}" for index, name in enumerate(names)}
    return {name: to_hex(colormaps["tab20"](index % 20)) for index, name in enumerate(names)}


def _draw_run(panel: Any, run: Run, row: str, axis: str, color: str) -> None:
    end = run.along(axis, np.array([run.last_step]))
    for measure, value in run.accuracies.get(row, {}).items() if end is not None else ():
        panel.plot(end, [value], MEASURES[measure][0], color=color)
    if row in run.series:
        steps, values = run.series[row]
        where = run.along(axis, steps)
        if where is not None:
            style = {"drawstyle": "steps-post", "linewidth": 2} if row == "block" else {"linewidth": 1}
            panel.plot(where, values, color=color, **style)


def _legend(figure: Any, runs: Sequence[Run], colors: dict[str, str]) -> None:
    """Names of the runs by color, and of the accuracies by mark."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    for measure, (mark, label) in MEASURES.items():
        if any(measure in found for run in runs for found in run.accuracies.values()):
            handles.append(Line2D([], [], color="grey", marker=mark, linestyle="", label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)


def names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    raise UserError(f"{folders[0]}: the same run twice")
