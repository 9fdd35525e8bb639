"""What a shared pass cost, against a sum over its steps, and what the bar has room for."""

from __future__ import annotations

from typing import Any

import pytest

from leap_dist.models import TeacherFlops
from leap_dist.monitoring.accounting import Costs
from leap_dist.monitoring.company import Member, bar_words, company, company_table, pass_flops

FLOPS = TeacherFlops(embed=5, blocks=(10, 20, 40), norm=1)
BATCH = 4


def member(trajectory: list[tuple[int, int]], steps: int, calibration: float = 0.0, **phases: float) -> Member:
    teacher = calibration + sum(FLOPS.upto(target(trajectory, step)) * BATCH for step in range(steps))
    costs = Costs({"teacher": teacher, "student": 100.0, "match": 11.0}, seconds=30.0, phases=phases)
    costs.calibration_flops = calibration
    return Member(trajectory, steps, costs, FLOPS, BATCH)


def target(trajectory: list[tuple[int, int]], step: int) -> int:
    return max((first, block) for first, block in trajectory if first <= step)[1]


def test_a_pass_goes_to_the_deepest_target_of_those_that_train() -> None:
    """The third was retired after four steps, at block 3; from then on the others' targets count."""
    members = [member([(0, 1), (2, 2)], 6, 900.0), member([(0, 2)], 6, 700.0), member([(0, 3)], 4)]
    deepest = [3, 3, 3, 3, 2, 2]
    assert pass_flops(members) == 900 + sum(FLOPS.upto(block) * BATCH for block in deepest)
    assert pass_flops(members[1:2]) == members[1].costs.flops["teacher"]


def test_company_is_compared_with_each_alone() -> None:
    phases = {"data": 2.0, "teacher": 16.0, "student.forward": 3.0, "optimizer": 1.0}
    members = {"a": member([(0, 1)], 6, **phases), "b": member([(0, 3)], 6, **phases)}
    found = company(members, {"a": {"final_block": 1, "student_patch_knn": 0.5}, "b": {"final_block": 3}})
    shared, alone = 6 * 76 * BATCH, (6 * 16 * BATCH, 6 * 76 * BATCH)
    assert found["teacher_flops"] == shared and found["flops"] == shared + 2 * 111
    assert found["flops_alone"] == sum(alone) + 2 * 111
    assert found["flops_saved"] == pytest.approx(1 - found["flops"] / found["flops_alone"])
    seconds = [own["seconds_alone_estimate"] for own in found["students"].values()]
    assert seconds == pytest.approx([4 + 2 + 16 * 16 / 76, 4 + 2 + 16])
    assert found["seconds_saved_estimate"] == pytest.approx(sum(seconds) - 30)


def test_the_table_has_a_row_for_each_and_says_who_failed() -> None:
    results: dict[str, dict[str, Any]] = {
        "a": {"final_block": 1, "student_patch_knn": 0.5},
        "b": {"final_block": 3, "retired": {"step": 5, "why": "non-finite loss", "weights_of": 4}},
    }
    members = {"a": member([(0, 1)], 6), "b": member([(0, 3)], 5)}
    lines = company_table(company(members, results)).splitlines()
    assert lines[2].startswith("| a | 1 | 50.0% |") and lines[2].endswith("|  |")
    assert lines[3].startswith("| b | 3 |  |") and "failed: non-finite loss; weights of step 4" in lines[3]
    assert "top-1" not in lines[0]


@pytest.mark.parametrize(("columns", "names"), [(80, []), (200, ["small", "tiny"])])
def test_the_bar_shows_each_student_where_there_is_room(columns: int, names: list[str]) -> None:
    shown = {"small": {"block": "7/12", "loss": "0.0123"}, "tiny": {"block": "5/12", "loss": "0.0345"}}
    words = bar_words(shown, "7/12", columns)
    assert list(words) == ["deepest", *names] and words["deepest"] == "7/12"
    if names:
        assert words["tiny"] == "5 0.0345"
