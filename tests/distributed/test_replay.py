"""The ledger of a real run of two ranks, a run that follows it, and the traces of both ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from leap_dist.curriculum.ledger import LEDGER
from runs import launch, run_ok, scalars, write_config


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with advances, and a profiler window."""
    folder = tmp_path_factory.mktemp("first")
    run_ok(write_config(folder, telemetry={"profile_steps": [2, 4]}))
    return folder / "run"


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / LEDGER).read_text().splitlines()]


def test_the_ledgers_blocks_are_those_of_tensorboard_and_of_the_summary(first: Path) -> None:
    start, *steps = ledger(first)
    shown, trajectory = (
        scalars(first, "curriculum/block"),
        json.loads((first / "summary.json").read_text())["trajectory"],
    )
    assert {line["step"]: line["block"] for line in steps} == shown
    assert len(set(shown.values())) > 2, "the run must have advanced"
    advances = [[line["step"] + 1, line["next_block"]] for line in steps if line["decision"] == "advance"]
    assert [[0, start["next_block"]], *advances] == trajectory
    scores = scalars(first, "curriculum/cka")
    assert {line["step"]: line["score"] for line in steps} == pytest.approx(scores, rel=1e-6)
    for line in steps:
        if line["decision"] == "advance":
            assert line["reason"] == "threshold" and line["ema"] >= line["threshold"] == 0.6
        else:
            assert line["reason"] == "last_block" or line["ema"] < line["threshold"]


def test_a_replay_takes_the_same_blocks_at_the_same_steps(first: Path, tmp_path: Path) -> None:
    """Whatever its own scores say: another seed, another learning rate, a threshold that is never reached."""
    config = write_config(tmp_path, seed=3, curriculum={"threshold": 9.0}, optim={"lr": 1e-4})
    run_ok(config, f"curriculum.replay={first / LEDGER}")
    run = tmp_path / "run"
    assert scalars(run, "curriculum/block") == scalars(first, "curriculum/block")
    assert scalars(run, "curriculum/cka") != scalars(first, "curriculum/cka")
    blocks = [(line["step"], line["block"], line["next_block"]) for line in ledger(run)]
    assert blocks == [(line["step"], line["block"], line["next_block"]) for line in ledger(first)]


@pytest.mark.slow  # the rules themselves are unit tests
def test_a_replay_of_a_shorter_run_is_refused_before_anything_is_written(first: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, epochs=2)
    done = launch(config, f"curriculum.replay={first / LEDGER}")
    assert done.returncode != 0 and "Traceback" not in done.stdout
    assert f"curriculum.replay={first / LEDGER}: ends after step 22, this run's last step is 45" in done.stdout
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_every_rank_leaves_a_trace_of_its_blocks(first: Path) -> None:
    blocks = {line["step"]: line["block"] for line in ledger(first)[1:]}
    for rank in (0, 1):
        (path,) = (first / "tensorboard").glob(f"rank{rank}.*.pt.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        for number in range(1, 7):
            assert names.count(f"teacher.block_{number}") == sum(blocks[step] >= number for step in (2, 3, 4))
        assert names.count("student.backward") == names.count("optimizer") == 3
        assert names.count("broadcast") >= 3 and names.count("communication") >= 3
