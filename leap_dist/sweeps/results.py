"""The tables and the picture of a sweep, from what its runs left."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from leap_dist.errors import UserError
from leap_dist.monitoring.columns import COLUMNS, Column
from leap_dist.monitoring.comparison import draw, read
from leap_dist.runtime.files import write_text, write_whole
from leap_dist.sweeps.plan import Plan, Run, result


def check_columns(keys: Sequence[str]) -> None:
    """Raise UserError for a key that is no column."""
    for key in keys:
        if key not in COLUMNS:
            raise UserError(f"show: {key} is none of {', '.join(COLUMNS)}")


def write_results(plan: Plan, failures: Mapping[str, str]) -> None:
    """Write results.csv and results.md. failures: run -> why it has not been finished."""
    results = {name: result(run, plan) for name, run in plan.runs.items()}
    done = {name: summary for name, summary in results.items() if summary is not None}
    columns = {
        key: COLUMNS[key]
        for key in plan.show or COLUMNS
        if any(COLUMNS[key].of(summary) is not None for summary in done.values())
    }
    write_text(plan.out / "results.csv", _csv(plan.runs, done, failures))
    write_text(plan.out / "results.md", _markdown(plan, done, columns, failures))


def draw_curves(plan: Plan) -> None:
    """Write curves.png: all finished runs, a colour for each row."""
    runs = [read(run.folder, run.row.name) for run in plan.runs.values() if result(run, plan) is not None]
    if runs:
        write_whole(plan.out / "curves.png", lambda partial: draw(runs).savefig(partial, dpi=120, format="png"))


def status(name: str, done: Mapping[str, Any], failures: Mapping[str, str]) -> str:
    """A run's, in a word."""
    return "done" if name in done else "failed" if name in failures else "not made"


def _csv(runs: Mapping[str, Run], done: Mapping[str, Any], failures: Mapping[str, str]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["row", "seed", "student_seed", "status", *COLUMNS, "folder", "error"])
    for name, run in runs.items():
        values = [COLUMNS[key].of(done[name]) if name in done else None for key in COLUMNS]
        end = (run.folder, failures.get(name))
        table.writerow([run.row.name, run.seed, run.student_seed, status(name, done, failures), *values, *end])
    return text.getvalue()


def _markdown(plan: Plan, done: Mapping[str, Any], columns: Mapping[str, Column], failures: Mapping[str, str]) -> str:
    """The rows with mean and sample standard deviation over their seeds, then every run."""
    labels = [column.label for column in columns.values()]
    means = []
    for row in plan.rows.values():
        summaries = [done[name] for name, run in plan.runs.items() if run.row == row and name in done]
        cells = [_spread([column.of(summary) for summary in summaries], column) for column in columns.values()]
        means.append([row.name, str(len(summaries)), *cells])
    each = []
    for name, run in plan.runs.items():
        cells = [_spread([column.of(done[name])], column) if name in done else "" for column in columns.values()]
        each.append([run.row.name, run.seeds, status(name, done, failures), *cells])
    parts = [
        "Mean ± sample standard deviation over n runs of other seeds; no deviation where all are equal.\n",
        _table(["row", "n", *labels], means),
        "\nEvery run:\n",
        _table(["row", "seed", "status", *labels], each),
        *_companies(plan),
        *(f"\n- {name}: {why}" for name, why in failures.items()),
    ]
    return "\n".join(parts) + "\n"


def _companies(plan: Plan) -> list[str]:
    """Which runs shared a pass, and what that means."""
    passes: dict[str, list[str]] = {}
    for name, run in plan.runs.items():
        if run.company:
            passes.setdefault(run.company, []).append(name)
    if not passes:
        return []
    return [
        "\nThese shared one pass of the teacher. Each has the numbers it has alone, but their seconds are those of the "
        "pass, so they have none of their own here and are not to be compared:\n",
        *(f"- {company}: {', '.join(names)}" for company, names in passes.items()),
    ]


def _spread(values: Sequence[Optional[float]], column: Column) -> str:
    """Mean, and the deviation unless all are equal; empty unless every run has a value."""
    if not values or None in values:
        return ""
    mean = column.digits(statistics.fmean(values))
    return mean if len(set(values)) < 2 else f"{mean} ± {column.digits(statistics.stdev(values))}"


def _table(heading: list[str], lines: list[list[str]]) -> str:
    rows = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
