"""leap_dist against the published LEAP code (github.com/KevinZ0217/LEAP, commit c9b7f58): 40 steps of a tiny run.

published/leap_trajectory.json says what that code computed on the inputs that published/inputs.py makes: in `leap` its
curriculum with calibration, an EMA and both reasons to advance, in `last` the last block throughout; LARS, schedule,
clipping and the class token in both. Steps count from 0, blocks from 1. `ema` has the step's own score in it.
No EMA comes nearer to the threshold than 0.0049, so rounding moves no advance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from published import inputs
from runs import on_ranks, scalars

TRAJECTORY = json.loads((Path(inputs.__file__).parent / "leap_trajectory.json").read_text())
CLOSE = 1e-5  # relative; weight decay of 1e-5 for 1e-6 makes 2e-5 of the loss, momentum of 0.901 for 0.9 6e-4


def replay(scenario: str, ranks: int, folder: Path) -> Path:
    """Run a scenario, on `ranks` ranks; returns the run's folder."""
    save_file(inputs.teacher(), folder / "teacher.safetensors")
    given = TRAJECTORY["options"] | TRAJECTORY["scenarios"][scenario]["options"]
    given |= {
        "teacher.weights": str(folder / "teacher.safetensors"), "data.train": "digits", "data.workers": 0,
        "telemetry.every": 1, "telemetry.progress": False, "checkpoint.every_epochs": 0, "output": str(folder / "run"),
    }  # fmt: skip
    words = (value if isinstance(value, str) else json.dumps(value) for value in given.values())
    on_ranks(ranks, "published_worker.py", *(f"{key}={word}" for key, word in zip(given, words, strict=True)))
    return folder / "run"


def of_steps(key: str, steps: list[dict[str, Any]]) -> dict[int, float]:
    return {step["step"]: step[key] for step in steps}


def assert_steps(run: Path, steps: list[dict[str, Any]]) -> None:
    assert scalars(run, "curriculum/block") == of_steps("block", steps)
    for tag, key in (
        ("loss/total", "loss"), ("loss/patch", "patch_loss"), ("loss/cls", "cls_loss"), ("lr", "lr"),
    ):  # fmt: skip
        assert scalars(run, tag) == pytest.approx(of_steps(key, steps), rel=CLOSE), tag
    # What an update did is known after it, and so is shown with the step that follows.
    norms = {step - 1: norm for step, norm in scalars(run, "update/grad_norm").items()}
    assert norms == pytest.approx(of_steps("grad_norm", steps[:-1]), rel=CLOSE)


def assert_end(run: Path, end: dict[str, Any]) -> None:
    left = {name: np.array(values) for name, values in json.loads((run / "trained.json").read_text())["left"].items()}
    assert {name: np.linalg.norm(array) for name, array in left.items()} == pytest.approx(end["norms"], rel=CLOSE)
    values = left["head.weight"].ravel()[end["head_weight_positions"]]
    np.testing.assert_allclose(values, end["head_weight_values"], rtol=CLOSE)


def test_the_inputs_are_those_the_published_code_was_given() -> None:
    assert inputs.digest() == TRAJECTORY["inputs_sha256"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_curriculum_goes_as_in_the_published_code(ranks: int, tmp_path: Path) -> None:
    """On two ranks as well, whose exact score is that of the whole batch."""
    told = TRAJECTORY["scenarios"]["leap"]
    run = replay("leap", ranks, tmp_path)

    assert_steps(run, told["steps"])
    assert_end(run, told["end"])
    scores = json.loads((run / "trained.json").read_text())["scores"]
    assert scores == pytest.approx(told["calibration"], rel=CLOSE)
    begin, *ledger = map(json.loads, (run / "curriculum.jsonl").read_text().splitlines())
    assert (begin["reason"], begin["block"]) == ("calibrated", told["start_block"])
    advances = {line["step"]: line["reason"] for line in ledger if line["decision"] == "advance"}
    assert advances == {step["step"]: step["advance"] for step in told["steps"] if step["advance"]}
    judged = {line["step"]: line for line in ledger if line["score"] is not None}
    assert scalars(run, "curriculum/cka") == pytest.approx(of_steps("cka", told["steps"]), rel=CLOSE)
    climbing = [step for step in told["steps"] if step["block"] < told["end"]["block"]]
    assert len(climbing) > 30
    for step in climbing:
        assert judged[step["step"]]["ema"] == pytest.approx(step["ema"], rel=CLOSE), step["step"]


def test_the_last_block_throughout_goes_as_in_the_published_code(tmp_path: Path) -> None:
    told = TRAJECTORY["scenarios"]["last"]
    run = replay("last", 1, tmp_path)

    assert_steps(run, told["steps"])
    assert_end(run, told["end"])
