"""Every decision is on record, once, whatever the run lived through; and a record can be followed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from leap_dist.curriculum.ledger import LEDGER, Ledger, Schedule, known_lines, read_schedule
from leap_dist.errors import UserError
from stubs import DEPTH, StubTeacher, dies_at, stub_config, stub_trainer


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (output / LEDGER).read_text().splitlines()]


def run(output: Path, *overrides: str, teacher: StubTeacher | None = None) -> Any:
    trainer = stub_trainer(stub_config(output, *overrides), teacher)
    assert trainer.run()
    trainer.close()
    return trainer


def without_seconds(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(output)]


def test_every_scored_step_has_its_decision_and_reason(tmp_path: Path) -> None:
    trainer = run(tmp_path, "curriculum.threshold=-1")
    start, *steps = lines(tmp_path)
    assert (start["decision"], start["reason"], start["next_block"], start["depth"]) == ("start", "start", 1, DEPTH)
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4, 5]
    assert [line["epoch"] for line in steps] == [0, 0, 0, 1, 1, 1]
    assert [line["block"] for line in steps] == [1, 2, 3, 4, 4, 4]
    assert [line["next_block"] for line in steps] == [2, 3, 4, 4, 4, 4]
    assert [line["decision"] for line in steps] == ["advance"] * 3 + ["stay"] * 3
    assert [line["reason"] for line in steps] == ["threshold"] * 3 + ["last_block"] * 3
    assert all(line["ema"] == line["score"] and line["threshold"] == -1 for line in steps)  # no smoothing
    assert [line["teacher_flops"] for line in steps] == [40, 120, 240, 400, 560, 720]  # 4 images, 10 FLOPs a block
    assert steps[-1]["teacher_flops"] == trainer.learner.costs.flops["teacher"]
    seconds = [line["seconds"] for line in steps]
    assert seconds == sorted(seconds) and seconds[-1] <= trainer.learner.costs.seconds


def test_the_end_of_an_epoch_is_a_decision_of_its_own(tmp_path: Path) -> None:
    run(tmp_path, "curriculum.threshold=2", "curriculum.max_epochs_per_block=1", "curriculum.ema_alpha=0.5")
    _, *steps = lines(tmp_path)
    assert [(line["step"], line["decision"], line["reason"]) for line in steps[2:5]] == [
        (2, "stay", "below_threshold"),
        (2, "advance", "max_epochs"),
        (3, "stay", "below_threshold"),
    ]
    assert steps[3]["score"] is None and steps[3]["ema"] == steps[2]["ema"] > 0 and steps[3]["epoch"] == 0
    scores, ema = [line["score"] for line in steps[:3]], 0.0
    for line, score in zip(steps, scores, strict=False):
        ema = 0.5 * score + 0.5 * ema
        assert line["ema"] == pytest.approx(ema)


def test_a_snap_and_a_calibrated_start_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "start", "curriculum.start=2", "curriculum.snap_to_last_at=2", "epochs=1")
    assert lines(tmp_path / "start")[0]["reason"] == "snap"
    run(tmp_path / "snap", "curriculum.threshold=-1", "curriculum.snap_to_last_at=2", "epochs=1")
    assert [(line["reason"], line["next_block"]) for line in lines(tmp_path / "snap")[1:3]] == [
        ("snap", DEPTH), ("last_block", DEPTH),
    ]  # fmt: skip
    run(tmp_path / "calibrated", "curriculum.start=null", "curriculum.threshold=2", "epochs=1")
    start = lines(tmp_path / "calibrated")[0]
    assert start["reason"] == "calibrated" and start["teacher_flops"] == 4 * 10 * DEPTH


def test_at_the_last_block_only_what_is_scored_and_the_end_of_epochs_is_kept(tmp_path: Path) -> None:
    run(tmp_path, "curriculum.mode=fixed", "curriculum.start=null", "telemetry.every=4")
    _, *steps = lines(tmp_path)
    assert [(line["step"], line["score"] is not None) for line in steps] == [
        (0, True), (2, False), (4, True), (5, False),
    ]  # fmt: skip
    assert steps[1]["reason"] == "unscored"


@pytest.mark.parametrize("every", ["checkpoint.every_steps=1", "checkpoint.every_steps=3", "checkpoint.every_epochs=1"])
def test_a_run_that_was_killed_has_the_ledger_of_one_that_was_not(every: str, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    overrides = ["curriculum.threshold=2", "curriculum.max_epochs_per_block=1", "epochs=3", every]
    run(whole, *overrides)
    cut = stub_trainer(stub_config(halves, *overrides))
    cut.loader.epoch = dies_at(cut.loader, epoch=1, index=2)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    cut.close()
    with (halves / LEDGER).open("a") as file:
        file.write('{"step": 5, "blo')  # what a kill leaves of a line
    resumed = stub_trainer(stub_config(halves, *overrides, "resume=auto"))
    name = (halves / "checkpoints" / "latest").read_text()
    resumed.restore(halves / "checkpoints" / name)
    resumed.run()
    resumed.close()
    assert without_seconds(halves) == without_seconds(whole)


def test_a_run_that_continues_another_begins_with_its_lines_and_costs(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    earlier = stub_trainer(stub_config(first, "curriculum.threshold=0.3", "epochs=2"))
    earlier.timer.carry_on({"teacher": 1000.0})
    earlier.run()
    earlier.close()
    continued = stub_trainer(stub_config(second, "curriculum.threshold=0.3", "epochs=2"))
    continued.restore(first / "checkpoints" / "step00000003")
    continued.run()
    continued.close()
    assert without_seconds(second) == without_seconds(first)
    assert (
        continued.learner.costs.flops == earlier.learner.costs.flops
        and continued.learner.costs.full_flops == earlier.learner.costs.full_flops
    )
    assert continued.learner.costs.phases["teacher"] > 1000.0


def test_a_replay_takes_the_same_blocks_and_still_scores(tmp_path: Path) -> None:
    teacher = StubTeacher()
    overrides = ["curriculum.threshold=0.25", "curriculum.max_epochs_per_block=2", "epochs=4"]
    run(tmp_path / "a", *overrides, teacher=teacher)
    assert len(set(teacher.asked)) > 1
    other = StubTeacher()
    replay = ["curriculum.threshold=9", "curriculum.start=4", f"curriculum.replay={tmp_path / 'a' / LEDGER}", "seed=5"]
    run(tmp_path / "b", "epochs=4", *replay, teacher=other)
    assert other.asked == teacher.asked
    start, *steps = lines(tmp_path / "b")
    assert start["reason"] == "replay" and start["next_block"] == teacher.asked[0]
    assert {line["reason"] for line in steps if line["decision"] == "advance"} == {"replay"}
    assert all(math.isfinite(line["score"]) for line in steps if line["block"] < DEPTH)


def test_a_run_that_ends_within_an_epoch_can_be_replayed_to_its_end(tmp_path: Path) -> None:
    """At the last block only the steps that are shown have a line, and here none is after the first."""
    ends = ["epochs=1.7", "curriculum.threshold=-1", "telemetry.every=100"]
    run(tmp_path / "a", *ends)
    teacher = StubTeacher()
    run(tmp_path / "b", "epochs=1.7", f"curriculum.replay={tmp_path / 'a' / LEDGER}", teacher=teacher)
    assert teacher.asked == [1, 2, 3, 4, 4]


@pytest.mark.seconds
def test_a_replay_that_is_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    overrides = ["curriculum.threshold=2", "curriculum.max_epochs_per_block=1", "epochs=3"]
    run(tmp_path / "a", *overrides)
    replay = ["epochs=3", f"curriculum.replay={tmp_path / 'a' / LEDGER}", "checkpoint.every_steps=1"]
    cut = stub_trainer(stub_config(tmp_path / "b", *replay))
    cut.loader.epoch = dies_at(cut.loader, epoch=1, index=0)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    cut.close()
    teacher = StubTeacher()
    resumed = stub_trainer(stub_config(tmp_path / "b", *replay, "resume=auto"), teacher)
    resumed.restore(tmp_path / "b" / "checkpoints" / "step00000002")
    resumed.run()
    resumed.close()
    assert teacher.asked == [1] + [2] * 3 + [3] * 3


def test_a_ledger_gives_each_step_its_block(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(step=0, block=2, next_block=2, decision="start", depth=9)
    for step, block, following in [(0, 2, 2), (4, 2, 3), (5, 3, 4), (5, 4, 5), (9, 5, 9), (11, 9, 9)]:
        ledger.write(step=step, block=block, next_block=following)
    ledger.close()
    schedule = read_schedule(tmp_path / LEDGER, depth=9, total_steps=12)
    assert [schedule.at(step) for step in range(12)] == [2] * 5 + [3] + [5] * 4 + [9] * 2
    assert Schedule((0, 3), (1, 2)).at(10**9) == 2


GOOD = [
    {"step": 0, "block": 1, "next_block": 1, "depth": 4},
    {"step": 0, "block": 1, "next_block": 2},
    {"step": 1, "block": 2, "next_block": 2},
]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda good: good[:2], ["ends after step 0", "last step is 1"]),
        (lambda good: [], ["ends after step -1"]),
        (lambda good: [good[0] | {"depth": 12}, *good[1:]], ["12 blocks", "has 4"]),
        (lambda good: [good[0], good[1] | {"next_block": 5}, good[2] | {"block": 5}], ["line 2", "1 to 4"]),
        (lambda good: [*good, good[1]], ["line 4", "step 0", "after step 1", "must rise"]),
        (lambda good: good[2:], ["line 1", "must rise from 0"]),
        (lambda good: [*good[:2], {"step": 1.5, "block": 2, "next_block": 2}], ["line 3", "step: a whole number"]),
        (lambda good: [*good[:2], ["no", "line"]], ["line 3"]),
    ],
)
def test_a_ledger_that_does_not_fit_is_refused_in_one_line(change: Any, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    path.write_text("\n".join(map(json.dumps, GOOD)))
    assert read_schedule(path, depth=4, total_steps=2).blocks == (1, 2)
    path.write_text("\n".join(map(json.dumps, change(GOOD))))
    with pytest.raises(UserError) as caught:
        read_schedule(path, depth=4, total_steps=2)
    message = str(caught.value)
    assert message.startswith(f"curriculum.replay={path}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_what_is_no_ledger_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("epochs: 3\n")
    with pytest.raises(UserError, match=r"curriculum.replay=.*config.yaml: cannot be read as JSON lines"):
        read_schedule(path, depth=4, total_steps=2)


def test_lines_that_a_checkpoint_knew_and_that_have_changed_are_refused(tmp_path: Path) -> None:
    path, ledger = tmp_path / LEDGER, Ledger(tmp_path)
    for step in range(3):
        ledger.write(step=step, block=1, next_block=1)
    lines, mark = ledger.lines, ledger.mark
    ledger.write(step=3, block=1, next_block=2)
    ledger.close()
    whole = path.read_bytes()
    kept = known_lines(path, lines, mark)
    assert b"".join(kept) == b"".join(whole.splitlines(keepends=True)[:3])
    again = Ledger(tmp_path, kept)
    assert (again.lines, again.mark) == (lines, mark)
    again.write(step=3, block=1, next_block=2)
    assert again.mark == ledger.mark
    again.close()
    for damaged in (whole.replace(b'"step":1', b'"step":7'), whole[:40], b"", whole[len(whole) // 4 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"its first 3 lines are not those .*; put them back, or remove the file"):
            known_lines(path, lines, mark)
    path.unlink()
    assert known_lines(path, lines, mark) == []
