"""Students that share a pass of the teacher: in company as alone, to the bit."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from runs import HANG_S, TINY, finish, launch, run_ok, scalars, start, write_config

LOUD = {"objective": {"feature_weight": 1e6, "cls_weight": 1e6}}
NO_VIT = dict.fromkeys(TINY["student"]["kwargs"])  # null takes away what the run's own student is given
# Three unlike students. The convolutional one sees the teacher's grid of 2 x 2 in a map of 16 pixels a cell.
STUDENTS: dict[str, dict[str, Any]] = {
    "patient": {"curriculum": {"threshold": 0.75}},
    "seeded": {"seed": 5, "student.kwargs": {"drop_path_rate": 0.3}, "curriculum.threshold": 0.9},
    "convolutional": {
        "student.model": "convnext_atto", "student.image_size": 32, "student.reduction": 16,
        "student.kwargs": NO_VIT | {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 24]},
    },
}  # fmt: skip
# And one with batch norms, whose numbers are of a rank's own images, that is matched as it is and keeps an average.
NORMED: dict[str, dict[str, Any]] = {
    "normed": {
        "student.model": "resnet10t", "student.image_size": 32, "student.reduction": 16, "student.ema_decay": 0.5,
        "student.kwargs": NO_VIT | {"channels": [8, 16, 48, 48]}, "objective.head": "none",
    }
}  # fmt: skip
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
SAVING = {"checkpoint": {"every_steps": 5, "every_epochs": 0}}
TAGS = ("loss/total", "curriculum/block", "curriculum/cka", "lr")


def nested(own: dict[str, Any]) -> list[str]:
    """A student's own options as a run alone takes them on its command line."""
    found = []
    for key, value in own.items():
        if key == "seed":
            found.append(f"student.seed={value}")
        elif isinstance(value, dict):
            found += [f"{key}.{name}={'null' if inner is None else inner}" for name, inner in value.items()]
        else:
            found.append(f"{key}={value}")
    return found


def in_company(folder: Path, *overrides: str, processes: int, students: Any = STUDENTS, **sections: Any) -> Path:
    folder.mkdir()
    run_ok(write_config(folder, students=students, **sections), *overrides, processes=processes)
    return folder / "run"


def alone(folder: Path, own: dict[str, Any], *overrides: str, processes: int, **sections: Any) -> Path:
    folder.mkdir(parents=True)
    run_ok(write_config(folder, **sections), *nested(own), *overrides, processes=processes)
    return folder / "run"


def decisions(run: Path) -> list[dict[str, Any]]:
    """Every line of the ledger, without the seconds, which differ."""
    lines = [json.loads(text) for text in (run / "curriculum.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    for tag in TAGS:
        assert scalars(one, tag) == scalars(other, tag), tag
    assert decisions(one) == decisions(other)
    exports = {path.name for path in one.glob("*.safetensors")}
    assert exports and exports == {path.name for path in other.glob("*.safetensors")}
    for export in exports:
        mine, theirs = load_file(one / export), load_file(other / export)
        assert mine.keys() == theirs.keys()
        for name, weight in mine.items():
            assert weight.equal(theirs[name]), (export, name)
    flops = [json.loads((run / "summary.json").read_text())["flops"] for run in (one, other)]
    assert flops[0] == flops[1]


def assert_as_alone(tmp_path: Path, processes: int, *overrides: str, students: Any = STUDENTS, **sections: Any) -> Path:
    company = in_company(tmp_path / "company", *overrides, processes=processes, students=students, **sections)
    for name, own in students.items():
        one = alone(tmp_path / "alone" / name, own, *overrides, processes=processes, **sections)
        assert_same(company / name, one)
    blocks = [tuple(scalars(company / name, "curriculum/block").values()) for name in students]
    assert len(set(blocks)) >= 2, "their curricula are too alike to show anything"
    return company


def test_in_company_as_alone_to_the_bit(tmp_path: Path) -> None:
    """One rank, and all that could be mixed up between students: dropout, accumulation, work ahead, a calibration."""
    company = assert_as_alone(
        tmp_path, 1, "teacher.prefetch=1", "curriculum.start=null", epochs=0.5, engine={"accumulation": 2}
    )
    told = json.loads((company / "cohort.json").read_text())
    deepest = max(own["teacher_flops_alone"] for own in told["students"].values())
    assert deepest <= told["teacher_flops"] < sum(own["teacher_flops_alone"] for own in told["students"].values())
    assert told["flops"] == told["teacher_flops"] + sum(own["own_flops"] for own in told["students"].values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_at_every_zero_stage(stage: int, processes: int, tmp_path: Path) -> None:
    sharding = SHARD_ALL if stage == 3 else {}
    engine = {"zero_stage": stage, "deepspeed": sharding, "accumulation": 2}
    assert_as_alone(tmp_path, processes, students=STUDENTS | NORMED, engine=engine)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["sharded", "pipelined"])
def test_under_every_placement(placement: str, tmp_path: Path) -> None:
    assert_as_alone(tmp_path, 2, f"teacher.placement={placement}", "teacher.prefetch=1", epochs=0.5)


@pytest.mark.slow
def test_only_one_of_them_learns_from_the_teachers_logits(tmp_path: Path) -> None:
    """Two classify at the last block, with other labels each; the third has no use for logits or labels."""
    last = {"curriculum": {"mode": "fixed", "start": None}, "student.num_classes": 10}
    students = {
        "distils": {**last, "objective": {"kd_alpha": 0.5, "label_smoothing": 0.1}},
        "classifies": last,
        "plain": STUDENTS["patient"],
    }
    company = assert_as_alone(tmp_path, 1, students=students, epochs=0.5)
    assert scalars(company / "distils", "loss/kd") and scalars(company / "classifies", "loss/ce")
    with pytest.raises(KeyError):
        scalars(company / "classifies", "loss/kd")


def killed(config: Path, step: int, processes: int) -> None:
    """Start the cohort, and kill its ranks some time after the checkpoint of a step."""
    process = start(config, processes=processes)
    deadline = time.monotonic() + HANG_S
    while not (config.parent / "run" / "checkpoints" / f"step{step:08d}" / "run.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_killed_and_resumed_it_is_the_same_cohort(stage: int, tmp_path: Path) -> None:
    sections = {**SAVING, "engine": {"zero_stage": stage}, "teacher": {"prefetch": 1}}
    students = STUDENTS | NORMED
    whole = in_company(tmp_path / "whole", processes=2, students=students, **sections)
    (tmp_path / "cut").mkdir()
    config = write_config(tmp_path / "cut", students=students, **sections)
    killed(config, 10, processes=2)
    printed = run_ok(config, "resume=auto", processes=2)
    assert re.search(r"continues at step \d+ of 23 ", printed)
    for name in students:
        assert_same(tmp_path / "cut" / "run" / name, whole / name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_then_one_follow_the_uncut_cohort(stage: int, tmp_path: Path) -> None:
    sections = {"checkpoint": {"every_steps": 5, "keep": 5}, "engine": {"zero_stage": stage}}
    students = {name: own for name, own in STUDENTS.items() if name != "seeded"}  # drop path draws by rank
    config = write_config(tmp_path, students=students, **sections)
    run_ok(config, processes=2)
    run = tmp_path / "run"
    uncut = {name: {tag: scalars(run / name, tag) for tag in TAGS[:2]} for name in students}
    (run / "checkpoints" / "latest").write_text("step00000010")
    run_ok(config, "resume=auto", processes=1)
    for name in students:
        losses = scalars(run / name, "loss/total")
        assert losses.keys() == uncut[name]["loss/total"].keys()
        assert max(abs(losses[step] - wanted) for step, wanted in uncut[name]["loss/total"].items()) < 1e-5
        assert scalars(run / name, "curriculum/block") == uncut[name]["curriculum/block"]


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_student_that_fails_does_not_take_the_others_along(stage: int, tmp_path: Path) -> None:
    """A learning rate that no loss survives: it keeps the weights of the last good checkpoint, the rest is as ever."""
    sections = {"checkpoint": {"every_steps": 2}, "engine": {"zero_stage": stage, "clip": 0.0}, "epochs": 0.5}
    students = {"sound": {}, "wild": {"optim.lr": 1e10, "optim.warmup_epochs": 0.0}}
    config = write_config(tmp_path, students=students, **sections)
    done = launch(config, processes=1)
    assert done.returncode == 2, done.stdout[-3000:]
    assert re.search(r"error: students failed: wild \(non-finite .*\); done: sound", done.stdout), done.stdout[-2000:]
    run = tmp_path / "run"
    about = json.loads((run / "wild" / "summary.json").read_text())["retired"]
    assert (run / "wild" / "student.safetensors").is_file() == (about["weights_of"] is not None)
    assert "| wild |" in (run / "cohort.md").read_text() and "failed: non-finite" in (run / "cohort.md").read_text()
    (tmp_path / "one").mkdir()
    run_ok(write_config(tmp_path / "one", **sections), processes=1)
    assert_same(run / "sound", tmp_path / "one" / "run")
    again = launch(config, "resume=auto", processes=1)
    assert again.returncode == 2 and "students failed: wild" in again.stdout, again.stdout[-2000:]


@pytest.mark.slow
def test_a_student_whose_fp16_scale_is_lost_does_not_take_the_others_along(tmp_path: Path) -> None:
    """A loss whose gradients overflow at every scale: torch begins at 65536, and 17 halvings are below 1."""
    sections = {"engine": {"precision": "fp16"}, "checkpoint": {"every_steps": 5}}
    config = write_config(tmp_path, students={"sound": {}, "lost": LOUD}, **sections)
    done = launch(config, processes=1)
    assert done.returncode == 2, done.stdout[-3000:]
    said = (
        r"error: students failed: lost \(step 17: the gradients overflow in fp16 at a loss scale of 0\.5.*done: sound"
    )
    assert re.search(said, done.stdout), done.stdout[-2000:]
    run = tmp_path / "run"
    about = json.loads((run / "lost" / "summary.json").read_text())["retired"]
    assert (about["step"], about["weights_of"]) == (17, 15) and (run / "lost" / "student.safetensors").is_file()
    (tmp_path / "one").mkdir()
    run_ok(write_config(tmp_path / "one", **sections), processes=1)
    assert_same(run / "sound", tmp_path / "one" / "run")


@pytest.mark.slow
def test_a_cohort_is_told_to_stop_and_goes_on_as_one(tmp_path: Path) -> None:
    config = write_config(tmp_path, students={"a": {}, "b": {"seed": 1}}, **SAVING, epochs=2)
    process = start(config, processes=2)
    deadline = time.monotonic() + HANG_S
    while not (tmp_path / "run" / "checkpoints" / "step00000005" / "run.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)
    os.kill(process.ranks[1], signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 0 and "continue with resume=auto" in done.stdout, done.stdout[-3000:]
    refused = launch(config, "resume=auto", "students.c.seed=3", processes=1)
    assert refused.returncode == 2 and "holds a run of another config (students.c" in refused.stdout
