"""A sweep's YAML as a list of runs, each with its whole config, before anything is started."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from leap_dist.config import DEMO_TEACHER, Config, abridged, differences, load, problems, read_yaml, to_yaml
from leap_dist.errors import UserError
from leap_dist.monitoring.comparison import SUMMARY, read_summary

KEYS = {"base", "output", "launcher", "seeds", "student_seeds", "common", "rows", "show", "together"}
ROW_KEYS = {"overrides", "seeds", "student_seeds", "like", "epochs_as"}
PASSES = "passes"  # folder of what shares a pass of the teacher
OWNED = ("seed", "output", "resume", "telemetry.progress")
STUDENT_SEED = "student.seed"  # also the sweep's, where it has `student_seeds`
# What a row's epochs can be made to cost as much as: a finished run's teacher FLOPs, FLOPs of all parts, or seconds.
COSTS = {
    "teacher_flops": lambda summary: summary["flops"]["teacher"],
    "flops": lambda summary: sum(summary["flops"].values()),
    "seconds": lambda summary: summary["train_seconds"],
}
# Operational to a run that goes on, but part of what its numbers mean.
MEASURED = (
    "evaluation.",
    "data.train",
    "data.val:",  # not `data.validate_hash`
    "teacher.weights",
    "engine.accumulation",
    "objective.impl",
    "student.compile",
    "teacher.compile",
)

# What an epoch's cost depends on.
PRICED = (
    "curriculum.",
    "teacher.",
    "student.",
    "objective.cls_weight",
    "objective.feature:",  # not its weight
    "objective.head",
    "objective.impl",
    "objective.kd_alpha",
    "data.train",
    "data.image_size",
    "data.global_batch",
    "data.augment",
    "data.workers",
    "engine.zero_stage",
    "engine.precision",
    "engine.accumulation",
    "engine.deepspeed",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table.

    student_seeds: of initial weights, each with each of `seeds`; none = a run's seed is that of its weights too.
    like: the row it was derived from; epochs_as: (row, cost) whose cost its epochs are to equal, of COSTS.
    """

    name: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    student_seeds: tuple[int, ...] = ()
    like: Optional[str] = None
    epochs_as: Optional[tuple[str, str]] = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row with one seed. config: whole, but for the epochs of a row with `epochs_as`, which `with_budget` sets.

    student_seed: of the initial weights, if it is not the run's.
    company: name of the pass that it shares with other runs; "" = none.
    """

    row: Row
    seed: int
    config: Config
    out: Path
    student_seed: Optional[int] = None
    company: str = ""

    @property
    def name(self) -> str:
        return run_name(self.row.name, self.seed, self.student_seed)

    @property
    def seeds(self) -> str:
        """As the tables show them."""
        return _seeds(self.seed, self.student_seed)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return _folder(self.out, self.company, self.name)

    def moved(self, company: str) -> Run:
        """The same in a company."""
        folder = _folder(self.out, company, self.name)
        return replace(self, company=company, config=replace(self.config, output=str(folder)))

    def needs(self) -> tuple[str, ...]:
        """Runs that must have finished before this one can start: those that its epochs depend on."""
        if self.row.epochs_as is None or self.row.like is None:
            return ()
        return tuple(run_name(row, self.seed, self.student_seed) for row in (self.row.epochs_as[0], self.row.like))

    def summary(self) -> Optional[dict[str, Any]]:
        """What the run left at its end; None before. One that dies while it evaluates leaves a part of it.

        UserError where it is not what the run wrote.
        """
        summary = read_summary(self.folder / SUMMARY)
        if "retired" in summary:  # it failed, and its company went on
            return None
        return summary if "time_saved" in summary else None  # among the last that `leap_dist.wrapup` adds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Runs by name, in the order of the table. launcher: see `tools/sweep.py`; show: columns of the table.

    together: runs that may share a pass of the teacher do, see `leap_dist.sweeps.passes`.
    """

    runs: dict[str, Run]
    rows: dict[str, Row]
    out: Path
    launcher: str = "python"
    show: tuple[str, ...] = ()
    together: bool = False


def _folder(out: Path, company: str, name: str) -> Path:
    return out / PASSES / company / name if company else out / "runs" / name


def run_name(row: str, seed: int, student_seed: Optional[int] = None) -> str:
    """Of a row's run; also of its folder."""
    return f"{row}-s{_seeds(seed, student_seed)}"


def _seeds(seed: int, student_seed: Optional[int]) -> str:
    return str(seed) if student_seed is None else f"{seed}w{student_seed}"


def read_plan(path: Path, out: Optional[Path], overrides: Sequence[str]) -> Plan:
    """The plan of the sweep at `path`. Every config is checked here.

    Args:
        out: instead of the YAML's `output`. overrides: win over base and common, not over the rows'.

    Raises:
        UserError: what is wrong with the YAML or with a row's config, in one line.
    """
    spec = _mapping(path)
    unknown = sorted(set(spec) - KEYS)
    if unknown or not {"base", "rows"} <= set(spec):
        what = f"unknown key {unknown[0]}" if unknown else "base and rows are required"
        raise UserError(f"{path}: {what}; it takes {', '.join(sorted(KEYS))}")
    base, output, launcher = (_text(spec, key, str(path)) for key in ("base", "output", "launcher"))
    out = out or Path(output or f"runs/sweeps/{path.stem}")
    rows = _rows(spec, str(path))
    common = (*_listed(spec, "common", str, str(path)), *overrides)
    _require_free(common, f"{path}, common or command line")
    runs = {}
    for row in rows.values():
        config = _config(row, path.parent / base, common)
        for seed, initial in itertools.product(row.seeds, row.student_seeds or (None,)):
            name = run_name(row.name, seed, initial)
            student = config.student if initial is None else replace(config.student, seed=initial)
            own = replace(config, seed=seed, student=student, output=str(_folder(out, "", name)))
            for problem in problems(own):
                raise UserError(f"row {row.name}: {problem}")
            runs[name] = Run(row=row, seed=seed, student_seed=initial, config=own, out=out)
    for row in rows.values():
        _require_equal_epochs(row, runs)
    for run in runs.values():
        missing = [name for name in run.needs() if name not in runs]
        if missing:
            raise UserError(f"{path}: row {run.row.name}: {missing[0]} is not among the runs, its epochs depend on it")
    show = _listed(spec, "show", str, str(path))
    together = spec.get("together") or False
    if not isinstance(together, bool):
        raise UserError(f"{path}: together={together}: expected true or false")
    return Plan(runs=runs, rows=rows, out=out, launcher=launcher or "python", show=show, together=together)


def chosen(plan: Plan, seeds: Optional[Sequence[int]], student_seeds: Optional[Sequence[int]]) -> frozenset[str]:
    """Names of the runs that have one of these seeds, of the data and of the initial weights; None = any.

    Raises:
        UserError: no run has one of them.
    """
    for option, asked, there in (
        ("--seeds", seeds, {run.seed for run in plan.runs.values()}),
        ("--student-seeds", student_seeds, {run.student_seed for run in plan.runs.values()}),
    ):
        if unknown := set(asked or ()) - there:
            raise UserError(f"{option} {min(unknown)}: no row has that seed")
    return frozenset(
        name
        for name, run in plan.runs.items()
        if (seeds is None or run.seed in seeds) and (student_seeds is None or run.student_seed in student_seeds)
    )


def _text(spec: dict[str, Any], key: str, where: str) -> str:
    """A text of the YAML; '' where there is none, but for `base`."""
    value = spec.get(key) or ""
    if not isinstance(value, str) or (key == "base" and not value):
        raise UserError(f"{where}: {key}={spec.get(key)}: expected a text")
    return value


def _listed(spec: dict[str, Any], key: str, kind: type, where: str) -> tuple[Any, ...]:
    """A list of the YAML, or nothing."""
    value = spec.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise UserError(f"{where}: {key}={value}: expected a list of {'whole numbers' if kind is int else 'texts'}")
    return tuple(value)


def _mapping(path: Path) -> dict[str, Any]:
    spec = read_yaml(path, str(path))
    if not isinstance(spec, dict):
        raise UserError(f"{path}: expected a mapping with base and rows")
    return spec


def _rows(spec: dict[str, Any], where: str) -> dict[str, Row]:
    asked = spec["rows"]
    if not isinstance(asked, dict) or not asked:
        raise UserError(f"{where}: rows: expected names with lists of overrides")
    default = {key: _listed(spec, key, int, where) for key in ("seeds", "student_seeds")}
    rows: dict[str, Row] = {}
    for name, value in asked.items():
        if not re.fullmatch(r"[\w.+-]+", str(name)):
            raise UserError(f"{where}: row {name}: a name of letters, digits and _ . + - is expected, folders bear it")
        known = {"overrides": value} if isinstance(value, list) else value
        rows[str(name)] = _row(str(name), known, rows, default, where)
    return rows


def _row(name: str, value: Any, above: dict[str, Row], default: dict[str, tuple[int, ...]], where: str) -> Row:
    """One row; `above`: those that it may refer to; default: seeds of rows that name none."""
    where = f"{where}: row {name}"
    if not isinstance(value, dict) or set(value) - ROW_KEYS:
        raise UserError(f"{where}: expected a list of overrides, or a mapping of {sorted(ROW_KEYS)}")
    like, epochs_as = value.get("like"), value.get("epochs_as")
    if like is not None and like not in above:
        raise UserError(f"{where}: like={like}: no row above it has that name")
    overrides = (*(above[like].overrides if like else ()), *_listed(value, "overrides", str, where))
    seeds, student_seeds = (_listed(value, key, int, where) or default[key] for key in ("seeds", "student_seeds"))
    row = Row(name=name, overrides=overrides, seeds=seeds or (0,), student_seeds=student_seeds, like=like)
    if epochs_as is None:
        return row
    if not isinstance(epochs_as, dict) or set(epochs_as) != {"of", "by"} or epochs_as["by"] not in COSTS:
        raise UserError(f"{where}: epochs_as: expected {{of: a row, by: one of {', '.join(COSTS)}}}")
    for other in (like, epochs_as["of"]):
        if other not in above or above[other].epochs_as:
            raise UserError(f"{where}: epochs_as needs `like` and `of`: rows above it with epochs of their own")
    return replace(row, epochs_as=(epochs_as["of"], epochs_as["by"]))


def _config(row: Row, base: Path, common: Sequence[str]) -> Config:
    """A row's config; seed and output are still to be set, and the whole still to be checked."""
    _require_free(row.overrides, f"row {row.name}")
    if row.student_seeds and any(text.startswith(f"{STUDENT_SEED}=") for text in (*common, *row.overrides)):
        raise UserError(f"row {row.name}: {STUDENT_SEED}: student_seeds sets it; give one of them")
    try:
        config = load(base, [*common, *row.overrides, "resume=auto", "telemetry.progress=false"], check=False)
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from None
    if config.students:
        raise UserError(f"row {row.name}: students: a row is one student; `together: true` makes rows in one pass")
    if row.epochs_as and config.curriculum.mode == "leap":
        raise UserError(f"row {row.name}: epochs_as: what an epoch of a curriculum costs is not known before it")
    return config


def _require_free(overrides: Sequence[str], where: str) -> None:
    for text in overrides:
        if text.partition("=")[0] in OWNED:
            raise UserError(f"{where}: {text}: the sweep itself sets {', '.join(OWNED)}")


def _require_equal_epochs(row: Row, runs: dict[str, Run]) -> None:
    """UserError unless an epoch of a row with `epochs_as` costs what it does in its row `like`."""
    if row.epochs_as is None:
        return
    like, own = (next(run.config for run in runs.values() if run.row.name == name) for name in (row.like, row.name))
    changed = [text for text in differences(like, own, also=PRICED) if text.startswith(PRICED)]
    if changed:
        raise UserError(f"row {row.name}: epochs_as: an epoch costs something else than in {row.like} ({changed[0]})")


def with_budget(run: Run, plan: Plan) -> Run:
    """The run with as many epochs as cost what `epochs_as` says, an epoch costing what it did in row `like`."""
    if run.row.epochs_as is None:
        return run
    goal, like = (plan.runs[name].summary() for name in run.needs())
    cost = COSTS[run.row.epochs_as[1]]
    epochs = round(like["epochs"] * cost(goal) / cost(like), 3)
    return replace(run, config=replace(run.config, epochs=epochs))


def result(run: Run, plan: Plan) -> Optional[dict[str, Any]]:
    """The summary of a run that has finished and is the one that is wanted; None else."""
    needed = [result(plan.runs[name], plan) for name in run.needs()]
    summary = run.summary()
    return None if summary is None or None in needed or conflict(with_budget(run, plan)) else summary


def conflict(run: Run) -> Optional[str]:
    """How the run that is there differs from the one that is wanted, in a line; None if nothing is in the way."""
    left = run.folder / "config.yaml"  # of the last start, be it by hand
    if not left.is_file() or left.read_text() == to_yaml(run.config):  # parsing all runs after each takes seconds
        return None
    there = load(left, [], check=False)
    # The run notes the demo's teacher as the file that it found in a folder beside or above its own.
    demo, noted = run.config.teacher.weights == DEMO_TEACHER, Path(there.teacher.weights).resolve().parent
    if demo and noted.name == "demo-teacher" and noted.parent in run.folder.resolve().parents:
        there = replace(there, teacher=replace(there.teacher, weights=DEMO_TEACHER))
    changed = differences(there, run.config, also=MEASURED)
    return f"{run.folder} holds a run of another config ({abridged(changed)}); remove it" if changed else None
