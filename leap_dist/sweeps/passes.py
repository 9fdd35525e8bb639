"""Which runs of a sweep one process makes: one, or with `together: true` all that may share a pass of the teacher.

Runs share a pass if they differ only in what students of one run may differ in (`students`), the seed not among it: so
each gives the numbers that it gives alone.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leap_dist.config import Config, flat, members, to_yaml
from leap_dist.config.cohort import NAME, SECTIONS, TAKEN
from leap_dist.sweeps.plan import PASSES, Plan, Run, conflict, with_budget

FEWEST = 2  # runs of a pass
_KWARGS = "student.kwargs"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one process makes. runs: that share its pass; folder: of the process's own output."""

    name: str
    runs: tuple[Run, ...]
    folder: Path
    out: Path

    @property
    def asked(self) -> Path:
        """The config it is started with."""
        return self.out / "configs" / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.out / "logs" / f"{self.name}.log"

    def config(self, plan: Plan) -> Config:
        """The config it is started with, once the runs that it depends on have finished."""
        if self.runs[0].company:
            return _company_config(self.runs, self.folder)
        return with_budget(self.runs[0], plan).config


def units(plan: Plan) -> dict[str, Unit]:
    """All of a plan by name; what shares a pass is together."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in plan.runs.values():
        found[run.company or run.name].append(run)
    return {
        name: Unit(
            name=name,
            runs=tuple(runs),
            folder=plan.out / PASSES / name if runs[0].company else runs[0].folder,
            out=plan.out,
        )
        for name, runs in found.items()
    }


def in_company(plan: Plan, wanted: Collection[str]) -> Plan:
    """The plan with those `wanted` runs that may share a pass put into one. What has finished stays where it is."""
    runs, groups = dict(plan.runs), defaultdict(list)
    timed = {name for run in plan.runs.values() if _counts_seconds(run) for name in run.needs()}
    for name, run in plan.runs.items():
        made = next((place for place in _places(run) if place.summary() is not None and not conflict(place)), None)
        if made is not None:
            runs[name] = made
        elif name in wanted and run.row.epochs_as is None and name not in timed and _fits_folder(name):
            groups[_what_is_shared(run.config)].append(run)
    for group in groups.values():
        together = _expressible(group)
        if len(together) >= FEWEST:
            company = _company_name(together)
            runs |= {run.name: run.moved(company) for run in together}
    return replace(plan, runs=runs)


def _counts_seconds(run: Run) -> bool:
    return run.row.epochs_as is not None and run.row.epochs_as[1] == "seconds"


def _places(run: Run) -> Iterable[Run]:
    """Where a run may have been made: alone, or in any company."""
    yield run
    for folder in sorted((run.out / PASSES).glob(f"*/{run.name}")):
        yield run.moved(folder.parent.name)


def _fits_folder(name: str) -> bool:
    return NAME.fullmatch(name) is not None and name.lower() not in TAKEN


def _what_is_shared(config: Config) -> str:
    """Equal for runs that may share a pass."""
    shared = {key: value for key, value in flat(config).items() if key.partition(".")[0] not in (*SECTIONS, "output")}
    return f"{sorted(shared.items())} {config.teacher_classes}"


def _expressible(group: list[Run]) -> list[Run]:
    """Those that a mapping of `students` over the first one's config can say: it adds to a mapping."""
    folder = Path("pass")
    kept = []
    for run in group:
        found = members(_company_config((*group[:1], run), folder))[run.name]
        if found == replace(run.config, output=str(folder / run.name)):
            kept.append(run)
    return kept


def _company_config(runs: tuple[Run, ...], folder: Path) -> Config:
    first = flat(runs[0].config)
    students = {run.name: _own(first, flat(run.config)) for run in runs}
    return replace(runs[0].config, output=str(folder), students=students)


def _own(first: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What of a run's config differs from the first's; null is what takes an argument of the first's model away."""
    own = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if key.partition(".")[0] in SECTIONS and value != first[key]
    }
    if _KWARGS in own:
        own[_KWARGS] = dict.fromkeys(first[_KWARGS]) | own[_KWARGS]
    return own


def _company_name(runs: list[Run]) -> str:
    """Another for every other company, so that one that is continued is the one that was begun."""
    told = "\n".join(f"{run.name}\n{to_yaml(replace(run.config, output=''))}" for run in runs)
    return f"s{runs[0].seed}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
