"""The curriculum's state machine, against sequences observed on the published LEAP code and worked by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable

import pytest

from leap_dist.config import CurriculumConfig
from leap_dist.curriculum.policy import Curriculum, build_curriculum
from leap_dist.errors import UserError


def blocks_used(curriculum: Curriculum, scores: Iterable[float], epoch_ends: Iterable[int] = ()) -> list[int]:
    """The target of each step, where an epoch ends after the 0-based steps in `epoch_ends`."""
    ends, used = set(epoch_ends), []
    for step, score in enumerate(scores):
        used.append(curriculum.block)
        curriculum.observe(score)
        if step in ends:
            curriculum.end_epoch()
    return used


def test_threshold_advances_one_block_per_step_and_stops_at_the_last() -> None:
    curriculum = Curriculum(4, threshold=0.8)
    advanced, used = [], []
    for step, score in enumerate([0.79, 0.80, 0.81, 0.5, 0.9, 0.95]):
        used.append(curriculum.block)
        if curriculum.observe(score):
            advanced.append(step)
    assert used == [1, 1, 2, 3, 3, 4]
    assert advanced == [1, 2, 4]
    assert curriculum.finished


def test_ema_restarts_from_zero_at_every_advance() -> None:
    # EMA 0.4 then 0.6 on each block; a threshold of 0.6 itself would be a floating-point tie.
    curriculum = Curriculum(4, threshold=0.59, ema_alpha=0.5)
    assert blocks_used(curriculum, [0.8] * 7) == [1, 1, 2, 2, 3, 3, 4]


def test_slow_ema_advances_at_step_56() -> None:
    curriculum = Curriculum(3, threshold=0.85, ema_alpha=0.05)
    first = next(step for step in range(200) if curriculum.observe(0.9))
    assert first == 56
    assert first + 1 == math.ceil(math.log(1 - 0.85 / 0.9) / math.log(1 - 0.05))


def test_epoch_limit_advances_at_the_end_of_the_epoch() -> None:
    curriculum = Curriculum(12, max_epochs_per_block=2)
    assert blocks_used(curriculum, [0.1] * 10, epoch_ends=[1, 3, 5, 7, 9]) == [1] * 4 + [2] * 4 + [3] * 2


def test_partial_epoch_counts_as_a_whole_one() -> None:
    curriculum = Curriculum(12, max_epochs_per_block=2)
    scores = [0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1]  # block 2 is entered after step 2, in the middle of an epoch
    assert blocks_used(curriculum, scores, epoch_ends=[1, 3, 5, 7]) == [1, 1, 1, 2, 2, 2, 3]


def test_end_epoch_reports_its_own_advance_and_resets_the_counters() -> None:
    curriculum = Curriculum(3, max_epochs_per_block=2)
    curriculum.observe(0.5)
    assert curriculum.ema == 0.5
    assert [curriculum.end_epoch(), curriculum.end_epoch()] == [False, True]
    assert (curriculum.block, curriculum.ema, curriculum.epochs_on_block) == (2, 0.0, 0)


def test_snap_jumps_to_the_last_block() -> None:
    assert blocks_used(Curriculum(12, snap_to_last_at=3), [0.9] * 4) == [1, 2, 12, 12]


def test_snap_applies_to_the_start() -> None:
    assert blocks_used(Curriculum(12, start=5, snap_to_last_at=3), [0.1, 0.1]) == [12, 12]


def test_snap_applies_to_calibration_and_resume() -> None:
    curriculum = Curriculum(12, snap_to_last_at=3)
    curriculum.restart_at(5)
    assert curriculum.block == 12
    curriculum.load_state_dict({"depth": 12, "block": 4, "ema": 0.3, "epochs": 3, "epochs_on_block": 1})
    assert curriculum.block == 12


def test_restart_forgets_the_past() -> None:
    curriculum = Curriculum(12, ema_alpha=0.5)
    curriculum.observe(0.4)
    curriculum.end_epoch()
    curriculum.restart_at(4)
    assert (curriculum.block, curriculum.ema, curriculum.epochs_on_block) == (4, 0.0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_non_finite_score_changes_nothing(bad: float, alpha: float) -> None:
    # The published EMA kept a NaN until the epoch limit, even at alpha = 1 (0 * nan is nan).
    curriculum = Curriculum(4, threshold=0.59, ema_alpha=alpha)
    curriculum.observe(0.2)
    before = curriculum.state_dict()
    assert not curriculum.observe(bad)
    assert curriculum.state_dict() == before
    assert [curriculum.observe(0.9), curriculum.observe(0.9)].count(True) >= 1


def test_non_finite_score_does_not_advance_below_a_negative_threshold() -> None:
    curriculum = Curriculum(4, threshold=-1.0)
    assert not curriculum.observe(math.nan)
    assert curriculum.observe(-0.5)


def test_last_block_never_advances() -> None:
    curriculum = Curriculum(2, start=2, max_epochs_per_block=1)
    assert not curriculum.observe(1.0)
    assert not curriculum.end_epoch()
    assert curriculum.block == 2


def test_it_waits_at_a_block_until_the_last_ones_turn() -> None:
    """Neither score nor epoch limit takes it past block 3; the end of the run's second epoch does."""
    curriculum = Curriculum(5, threshold=0.8, hold_at=3, last_after=2, max_epochs_per_block=1)
    assert blocks_used(curriculum, [0.9] * 8, epoch_ends=[3, 5, 7]) == [1, 2, 3, 3, 3, 3, 5, 5]
    assert curriculum.finished and not curriculum.end_epoch()


@pytest.mark.parametrize("step", range(7))
def test_one_that_waits_is_resumed_anywhere(step: int) -> None:
    ends = [1, 3, 5]
    whole, first, second = (Curriculum(5, threshold=0.8, hold_at=2, last_after=2) for _ in range(3))
    used = blocks_used(whole, [0.9] * 7, ends)
    assert used == [1, 2, 2, 2, 5, 5, 5]
    head = blocks_used(first, [0.9] * step, ends)
    second.load_state_dict(first.state_dict())
    assert head + blocks_used(second, [0.9] * (7 - step), [end - step for end in ends]) == used


def test_why_it_waits_and_moves() -> None:
    curriculum = Curriculum(5, threshold=0.8, hold_at=2, last_after=1, start=2)
    assert curriculum.finished and not curriculum.observe(0.9) and curriculum.last_check.reason == "held"
    assert curriculum.end_epoch() and curriculum.last_check.reason == "snap"
    assert not curriculum.observe(0.9) and curriculum.last_check.reason == "last_block"


def test_a_slow_climb_is_cut_short_for_the_last_block() -> None:
    curriculum = Curriculum(5, threshold=0.8, last_after=2)
    assert blocks_used(curriculum, [0.1] * 6, epoch_ends=[1, 3]) == [1, 1, 1, 1, 5, 5]


def test_a_jump_while_it_waits_ends_where_it_waits() -> None:
    curriculum = Curriculum(5, threshold=0.8, hold_at=4, last_after=2, snap_to_last_at=2)
    assert blocks_used(curriculum, [0.9] * 5, epoch_ends=[1, 3]) == [1, 4, 4, 4, 5]


def test_resumed_run_takes_the_same_decisions() -> None:
    scores = [0.3 + 0.1 * (step * 7 % 5) for step in range(40)]
    ends = range(3, 40, 4)
    make = lambda: Curriculum(9, threshold=0.62, ema_alpha=0.3, max_epochs_per_block=2)  # noqa: E731
    whole = blocks_used(make(), scores, ends)
    first, second = make(), make()
    head = blocks_used(first, scores[:18], ends)
    second.load_state_dict(first.state_dict())
    assert head + blocks_used(second, scores[18:], [end - 18 for end in ends]) == whole
    assert len(set(whole)) > 3


def test_state_of_another_teacher_is_refused() -> None:
    with pytest.raises(UserError, match=r"block 12.*block 40"):
        Curriculum(40).load_state_dict(Curriculum(12).state_dict())


@pytest.mark.parametrize("start", [0, 5])
def test_start_outside_the_teacher_is_a_bug(start: int) -> None:
    with pytest.raises(ValueError, match=f"block {start}"):
        Curriculum(4, start=start)


@pytest.mark.parametrize(
    ("config", "block"),
    [
        (CurriculumConfig(mode="fixed"), 12),
        (CurriculumConfig(mode="fixed", block=7, threshold=0.0, max_epochs_per_block=1), 7),
        (CurriculumConfig(mode="all_layers"), 12),
    ],
)
def test_modes_without_a_curriculum_stay_where_they_are(config: CurriculumConfig, block: int) -> None:
    curriculum = build_curriculum(config, 12)
    assert blocks_used(curriculum, [1.0] * 4, epoch_ends=range(4)) == [block] * 4
    assert curriculum.finished


def test_leap_takes_every_option_of_its_config() -> None:
    config = CurriculumConfig(start=2, threshold=0.45, ema_alpha=0.5, max_epochs_per_block=1, snap_to_last_at=4)
    curriculum = build_curriculum(config, 12)
    # EMA 0.4, 0.6: on after step 1; block 3 ends with its epoch; the next block is 4, so the last.
    assert blocks_used(curriculum, [0.8, 0.8, 0.1, 0.1], epoch_ends=[2]) == [2, 2, 3, 12]


def test_leap_ends_at_the_block_of_its_config() -> None:
    climbing = build_curriculum(CurriculumConfig(block=3), 12)
    assert blocks_used(climbing, [0.9] * 5, epoch_ends=range(5)) == [1, 2, 3, 3, 3]
    assert climbing.finished
    snapping = build_curriculum(CurriculumConfig(block=7, snap_to_last_at=2), 12)
    assert blocks_used(snapping, [0.9] * 3) == [1, 7, 7]
    starting = build_curriculum(CurriculumConfig(block=7, start=7), 12)
    assert starting.finished


def test_leap_waits_at_the_block_of_its_config() -> None:
    waiting = build_curriculum(CurriculumConfig(block=3, last_block_after=2), 12)
    assert blocks_used(waiting, [0.9] * 7, epoch_ends=[2, 5]) == [1, 2, 3, 3, 3, 3, 12]


@pytest.mark.parametrize("key", ["start", "snap_to_last_at"])
def test_nothing_lies_beyond_the_end(key: str) -> None:
    with pytest.raises(UserError, match=rf"curriculum\.{key}=8: it climbs to curriculum.block=7 only"):
        build_curriculum(CurriculumConfig(**{"block": 7, key: 8}), 12)


def test_a_replay_goes_as_deep_as_its_ledger() -> None:
    curriculum = build_curriculum(CurriculumConfig(block=3, replay="curriculum.jsonl"), 12)
    assert curriculum.follow(12) and curriculum.block == 12


@pytest.mark.parametrize("key", ["block", "start", "snap_to_last_at"])
@pytest.mark.parametrize("value", [0, 13, -1])
def test_block_outside_the_teacher_is_named(key: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"curriculum\.{key}={value}: .* 1 to 12"):
        build_curriculum(CurriculumConfig(**{key: value}), 12)


def test_curriculum_needs_no_torch() -> None:
    code = "import sys, leap_dist.curriculum.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
