"""The pages: of one run, and of several side by side. Templates and style lie in this folder."""

from __future__ import annotations

import csv
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional
from urllib.parse import quote

from leap_dist.errors import UserError
from leap_dist.monitoring.columns import COLUMNS, Column
from leap_dist.report import words
from leap_dist.report.facts import Facts, gather, is_run
from leap_dist.report.figures import charts_of_run, charts_of_runs
from leap_dist.runtime.files import write_text
from leap_dist.runtime.integrity import read_sealed

REPORT = "report.html"  # in the run folder
MOST_BAD = 50  # samples that are listed
HERE = Path(__file__).parent


def write_report(folder: Path, out: Optional[Path] = None) -> Path:
    """Write the page of the run in `folder`, or of all its students and of each; return where it is.

    Raises:
        UserError: there is no run, or the disk refuses the page.
    """
    facts = gather(folder)
    path = out or folder / REPORT
    if not facts.family:
        write_text(path, _run_page(facts))
        return path
    students = [gather(folder / name) for name in facts.family]
    for student in students:
        write_text(student.folder / REPORT, _run_page(student))
    _write_comparison(students, path, facts)
    return path


def write_comparison(folders: Sequence[Path], names: Sequence[str], out: Path) -> None:
    """Write a page that compares runs, in this order, by these names.

    Raises:
        UserError: one is no run, or the disk refuses the page.
    """
    _write_comparison([gather(folder, name) for folder, name in zip(folders, names, strict=True)], out)


def runs_in(folder: Path) -> list[Path]:
    """The run folders of a sweep, in the order of its table, or of any folder with runs in it.

    Raises:
        UserError: there are none.
    """
    places = ("*", "runs/*", "passes/*/*")
    found = sorted({path for place in places for path in folder.glob(place) if path.is_dir() and is_run(path)})
    if not found:
        raise UserError(f"{folder}: neither a run folder nor one with runs in it")
    table = _order(folder / "results.csv")
    return sorted(found, key=lambda path: table.get(path.name, len(table)))


def _order(table: Path) -> dict[str, int]:
    """Places of runs in a sweep's table, by the names of their folders."""
    if not table.is_file():
        return {}
    with table.open(encoding="utf-8", errors="replace", newline="") as file:
        folders = [line.get("folder") or "" for line in csv.DictReader(file)]
    return {Path(folder).name: place for place, folder in enumerate(folders)}


def _run_page(facts: Facts) -> str:
    headings, rows = words.accuracies(facts)
    return _render(
        "run.html",
        facts=facts,
        title=facts.name,
        status=words.status(facts),
        models=words.models(facts),
        lead=words.lead(facts),
        tiles=words.tiles(facts),
        accuracy_headings=headings,
        accuracy_rows=rows,
        charts=charts_of_run(facts),
        advances=words.advances(facts),
        phases=words.seconds_by_phase(facts),
        parts_of_flops=words.flops_by_part(facts),
        sessions=words.sessions(facts),
        bad=facts.bad[:MOST_BAD],
        options=words.options(facts),
    )


def _write_comparison(runs: Sequence[Facts], out: Path, cohort: Optional[Facts] = None) -> None:
    columns = {key: column for key, column in COLUMNS.items() if any(_value(column, run) is not None for run in runs)}
    best = {key: _best(key, [_value(column, run) for run in runs]) for key, column in columns.items()}
    table = [
        {
            "facts": run,
            "status": words.status(run),
            "link": _link(run.folder / REPORT, out),
            "cells": [
                (key, _text(column, value), value, value is not None and value == best[key])
                for key, column in columns.items()
                for value in [_value(column, run)]
            ],
        }
        for run in runs
    ]
    text = _render(
        "comparison.html",
        title=cohort.name if cohort else f"{len(runs)} runs",
        cohort=cohort,
        company=_company(cohort),
        runs=runs,
        headings=[column.label for column in columns.values()],
        table=table,
        charts=charts_of_runs(runs),
        differences=words.differences(list(runs)),
    )
    write_text(out, text)


def _value(column: Column, run: Facts) -> Optional[float]:
    return column.of(run.summary) if run.summary else None


def _text(column: Column, value: Optional[float]) -> str:
    return words.NOTHING if value is None else column.digits(value)


def _best(key: str, values: Sequence[Optional[float]]) -> Optional[float]:
    """The highest accuracy of the students; of other columns none is best."""
    known = [value for value in values if value is not None]
    return max(known) if key.startswith("student_") and len(known) > 1 else None


def _link(page: Path, out: Path) -> str:
    """From one page to another, if that is there."""
    relative = os.path.relpath(page.resolve(), out.resolve().parent)
    return quote(relative) if page.is_file() else ""


def _company(cohort: Optional[Facts]) -> Optional[dict[str, Any]]:
    """What cohort.json says of the pass that students shared."""
    path = cohort.folder / "cohort.json" if cohort else None
    if path is None or not path.is_file():
        return None
    found, fault = read_sealed(path)
    needed = ("seconds", "flops", "flops_alone", "flops_saved", "seconds_alone_estimate")
    return found if not fault and all(isinstance(found.get(key), (int, float)) for key in needed) else None


def _render(template: str, **content: Any) -> str:
    """A template with every text in it escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    filters = (words.percent, words.duration, words.flops, words.moment)
    environment.filters |= {function.__name__: function for function in filters}
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    text = environment.get_template(template).render(**content, style=style, made=now)
    return text.encode("utf-8", "replace").decode()  # JSON and names of folders may hold what is no text
