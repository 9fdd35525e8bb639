"""A run goes on at another number of ranks, at every ZeRO stage: same images, same losses, same advances."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from runs import launch, on_ranks, run_ok, scalars, start, write_config

SAVED = (5, 10, 15, 20, 23)
PLAIN = {"checkpoint": {"every_steps": 5, "keep": len(SAVED)}}


def elastic_config(folder: Path, stage: int, **engine: object) -> Path:
    # Threshold 0: everything of this small student is partitioned and gathered, nothing stays whole.
    sharding = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return write_config(folder, **PLAIN, engine={"zero_stage": stage, "deepspeed": sharding, **engine})


def rewind(run: Path, step: int) -> Path:
    """Make an older checkpoint the one that resume=auto starts from."""
    name = f"step{step:08d}"
    (run / "checkpoints" / "latest").write_text(name)
    return run / "checkpoints" / name


def kept(run: Path) -> set[str]:
    """What lies beside `latest`, but for the scripts that DeepSpeed adds."""
    return {path.name for path in (run / "checkpoints").iterdir() if path.suffix != ".py"} - {"latest"}


def assert_same_run(run: Path, uncut: dict[str, dict[int, float]]) -> None:
    losses = scalars(run, "loss/total")
    assert losses.keys() == uncut["loss/total"].keys() and len(losses) == 23
    assert max(abs(losses[step] - wanted) for step, wanted in uncut["loss/total"].items()) < 1e-5
    assert scalars(run, "curriculum/block") == uncut["curriculum/block"]


def follow(config: Path, legs: list[tuple[int, int]]) -> None:
    """An uncut run at 2 ranks, then continued at each (step, ranks) from what the leg before has saved."""
    run = config.parent / "run"
    run_ok(config)
    uncut = {tag: scalars(run, tag) for tag in ("loss/total", "curriculum/block")}
    assert len(set(uncut["curriculum/block"].values())) >= 3, "too few advances to show anything"
    about = (run / "config.yaml").read_text().replace("resume: none", "resume: auto")
    for step, ranks in legs:
        rewind(run, step)
        output = run_ok(config, "resume=auto", processes=ranks)
        assert f"step{step:08d} from" in output or "zero_stage: 0" in about, "nothing was converted"
        assert_same_run(run, uncut)
        assert (run / "config.yaml").read_text() == about
        assert kept(run) == {f"step{step:08d}" for step in SAVED}


def test_two_ranks_then_one_follow_the_uncut_run(tmp_path: Path) -> None:
    follow(elastic_config(tmp_path, stage=2), legs=[(15, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_then_one_then_four_follow_the_uncut_run(stage: int, tmp_path: Path) -> None:
    follow(elastic_config(tmp_path, stage), legs=[(5, 1), (10, 4)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_it_follows_with_accumulation_and_a_head_reset(stage: int, tmp_path: Path) -> None:
    config = elastic_config(tmp_path, stage, accumulation=2)
    config.write_text(config.read_text().replace("threshold: 0.6", "threshold: 0.6\n  reset_head: true"))
    follow(config, legs=[(5, 4), (15, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weight_decay_and_adam_steps_survive_the_conversion(stage: int, tmp_path: Path) -> None:
    """DeepSpeed 0.19 copies the first group's weight decay over all, and shares one step count, at stage 3."""
    said = ["2 ranks: 0 steps, then 2 more", "1 ranks: 2 steps converted, then 2 more"]
    for ranks, words in zip((2, 1), said, strict=True):
        assert words in on_ranks(ranks, "elastic_worker.py", str(stage), str(tmp_path))


@pytest.mark.slow
def test_a_kill_while_converting_and_a_damaged_part_leave_nothing(tmp_path: Path) -> None:
    config = elastic_config(tmp_path, stage=2)
    run = tmp_path / "run"
    run_ok(config, processes=1)
    uncut = {tag: scalars(run, tag) for tag in ("loss/total", "curriculum/block")}
    path = rewind(run, 10)

    process = start(config, "resume=auto")
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints").glob(".universal-*")):
        assert process.poll() is None and time.monotonic() < deadline, "no conversion"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    part = next(path.glob("*_optim_states.pt"))
    whole = part.read_bytes()
    pickled = whole.index(b"\x80\x02", whole.index(b"data.pkl"))  # inside an archive whose index is whole
    part.write_bytes(whole[:pickled] + bytes(64) + whole[pickled + 64 :])
    said = (path / "run.json").read_bytes()
    unmarked = {key: value for key, value in json.loads(said).items() if key not in ("files", "seal")}
    (path / "run.json").write_text(json.dumps(unmarked))  # as an older version saved: damage is not known before
    done = launch(config, "resume=auto")
    assert done.returncode != 0
    faults = re.findall(r"error: checkpoint \S+: cannot be read \(\S+_optim_states\.pt: UnpicklingError: ", done.stdout)
    assert len(faults) == 2, done.stdout[-3000:]
    assert kept(run) == {f"step{step:08d}" for step in SAVED}

    part.write_bytes(whole)
    (path / "run.json").write_bytes(said)
    run_ok(config, "resume=auto")
    assert_same_run(run, uncut)
    assert kept(run) == {f"step{step:08d}" for step in SAVED}
