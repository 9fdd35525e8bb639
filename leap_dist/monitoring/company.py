"""What students of one pass show together, and what their company saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Optional

from leap_dist.models import TeacherFlops
from leap_dist.monitoring.accounting import Costs
from leap_dist.monitoring.comparison import KINDS, MEASURES
from leap_dist.runtime.timing import SHARED

BAR_COLUMNS = 60  # of a bar itself: share, images, rate, time left


def bar_words(shown: Mapping[str, Mapping[str, str]], deepest: str, columns: int) -> dict[str, str]:
    """The deepest target, and block and loss of each student if a terminal of so many columns has room for all.

    shown: by student, what `Journal.shown` says of its last step.
    """
    words, room = {"deepest": deepest}, columns - BAR_COLUMNS - len(f"deepest={deepest}")
    own = {name: f"{texts['block'].partition('/')[0]} {texts['loss']}" for name, texts in shown.items() if texts}
    needed = sum(len(f", {name}={text}") for name, text in own.items())
    return words | own if needed <= room else words


class Member(NamedTuple):
    """A student's part in a pass. trajectory: (first step, block) of its targets; steps: that it trained.

    flops: the teacher's, per image, as this student alone needs it. batch: images of a step.
    """

    trajectory: Sequence[tuple[int, int]]
    steps: int
    costs: Costs
    flops: TeacherFlops
    batch: int


def pass_flops(members: Sequence[Member]) -> float:
    """FLOPs of the teacher over the run: at every step to the deepest target, and one pass of all calibrations."""
    flops = max((member.flops for member in members), key=lambda found: found.classifier)
    bounds = sorted({step for member in members for step in (member.steps, *(s for s, _ in member.trajectory))})
    total = max(member.costs.calibration_flops for member in members)
    for first, end in pairwise(bounds):
        deepest = max((_target(member, first) for member in members), default=0)
        total += (end - first) * flops.upto(deepest) * members[0].batch if deepest else 0
    return total


def _target(member: Member, step: int) -> int:
    """Its target block at a step; 0 where it does not train."""
    if step >= member.steps:
        return 0
    return [block for first, block in member.trajectory if first <= step][-1]


def company(members: Mapping[str, Member], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `cohort.json` holds: the pass, each student, and what each alone would have cost.

    results: by student, its summary. Seconds of a student alone are an estimate: its own phases, all of the data's, and
    the teacher's at the pass's seconds per FLOP.
    """
    shared = pass_flops(list(members.values()))
    students = {name: _student(member, shared, results[name]) for name, member in members.items()}
    own = sum(found["own_flops"] for found in students.values())
    alone = sum(found["flops_alone"] for found in students.values())
    seconds = max(member.costs.seconds for member in members.values())
    seconds_alone = sum(found["seconds_alone_estimate"] for found in students.values())
    return {
        "steps": max(member.steps for member in members.values()),
        "seconds": seconds,
        "teacher_flops": shared,
        "flops": shared + own,
        "flops_alone": alone,
        "flops_saved": 1 - (shared + own) / alone if alone else 0.0,
        "seconds_alone_estimate": seconds_alone,
        "seconds_saved_estimate": seconds_alone - seconds,
        "students": students,
    }


ACCURACIES = {
    f"student_{kind}_{measure}": f"{label} of {words}"
    for kind, words in KINDS.items()
    for measure, (_, label) in MEASURES.items()
}


def _student(member: Member, shared: float, summary: Mapping[str, Any]) -> dict[str, Any]:
    costs = member.costs
    own_seconds = sum(value for phase, value in costs.phases.items() if phase not in SHARED)
    others = sum(costs.phases.get(phase, 0.0) for phase in SHARED if phase != "teacher")
    teacher = costs.phases.get("teacher", 0.0) * costs.flops["teacher"] / shared if shared else 0.0
    kept = ("final_block", "steps", *ACCURACIES, "student_top1", "student_teacher_cka", "retired")
    return {key: summary[key] for key in kept if key in summary} | {
        "teacher_flops_alone": costs.flops["teacher"],
        "own_flops": costs.total_flops - costs.flops["teacher"],
        "flops_alone": costs.total_flops,
        "own_seconds": own_seconds,
        "seconds_alone_estimate": own_seconds + others + teacher,
    }


COLUMNS = {
    "final_block": ("block at the end", "{}".format),
    "student_top1": ("top-1", "{:.1%}".format),
    **{key: (label, "{:.1%}".format) for key, label in ACCURACIES.items()},
    "student_teacher_cka": ("CKA to the teacher", "{:.2f}".format),
    "own_flops": ("own FLOPs", "{:.3e}".format),
    "flops_alone": ("FLOPs alone", "{:.3e}".format),
    "seconds_alone_estimate": ("seconds alone, estimated", "{:.1f}".format),
    "retired": ("end", lambda found: f"failed: {found['why']}; {_kept(found['weights_of'])}"),
}


def company_table(found: Mapping[str, Any]) -> str:
    """`company` as Markdown: a row a student, then what their company saved."""
    students = found["students"]
    columns = {key: value for key, value in COLUMNS.items() if any(key in own for own in students.values())}
    rows = [["student", *(label for label, _ in columns.values())], ["---"] * (1 + len(columns))]
    for name, own in students.items():
        rows.append([name, *(digits(own[key]) if key in own else "" for key, (_, digits) in columns.items())])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    saved = max(0.0, found["flops_saved"])
    lines += [
        "",
        f"One pass of the teacher for all: {found['teacher_flops']:.3e} FLOPs; with the students {found['flops']:.3e}, "
        f"where runs alone would have taken {found['flops_alone']:.3e}: {saved:.1%} saved.",
        f"{found['seconds']:.1f} s, where runs alone would have taken {found['seconds_alone_estimate']:.1f} s, "
        "estimated from the seconds of each phase.",
    ]
    return "\n".join(lines) + "\n"


def _kept(weights_of: Optional[int]) -> str:
    return "no weights" if weights_of is None else f"weights of step {weights_of}"
