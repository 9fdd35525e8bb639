"""The profiler window: its steps, its ranges, and nothing outside it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from leap_dist.errors import UserError
from leap_dist.models.features import Features
from leap_dist.monitoring.profiling import check_window
from stubs import DEPTH, StubTeacher, stub_config, stub_trainer


@dataclass
class BlockTeacher(StubTeacher):
    """Runs a module for every block up to the target."""

    blocks: nn.ModuleList = field(default_factory=lambda: nn.ModuleList(nn.Identity() for _ in range(DEPTH)))

    def features_of(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Features]:
        for block in self.blocks[: self.block]:
            images = block(images)
        return super().features_of(images, blocks)


def ranges(output: Path) -> dict[str, int]:
    """How often each of our ranges is in the one trace of rank 0."""
    (path,) = (output / "tensorboard").glob("rank0.*.pt.trace.json.gz")
    found: dict[str, int] = {}
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        if event.get("cat") == "user_annotation":
            found[event["name"]] = found.get(event["name"], 0) + 1
    return found


def run(output: Path, *overrides: str) -> Any:
    teacher = BlockTeacher()
    trainer = stub_trainer(stub_config(output, "curriculum.threshold=-1", *overrides), teacher)
    assert trainer.run()
    trainer.close()
    assert not trainer.timer.tracing
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in teacher.blocks)
    return trainer


@pytest.mark.parametrize("window", [(1, 2), (4, 5)])
def test_the_trace_holds_the_phases_of_its_steps(window: tuple[int, int], tmp_path: Path) -> None:
    """Steps 1 and 2 have blocks 2 and 3, steps 4 and 5 (the last of the run) all four."""
    run(tmp_path, f"telemetry.profile_steps=[{window[0]},{window[1]}]")
    found = ranges(tmp_path)
    for name in ("data", "teacher", "student.forward", "student.backward", "optimizer"):
        assert found[name] == 2, name
    assert found["decide"] == found["broadcast"] == 2  # a step begins with the decision on the one before
    assert found["match"] >= 4  # patch tokens, class token, score
    blocks = {name: count for name, count in found.items() if name.startswith("teacher.block_")}
    expected = {1: {1: 2, 2: 2, 3: 1}, 4: {1: 2, 2: 2, 3: 2, 4: 2}}[window[0]]
    assert blocks == {f"teacher.block_{number}": count for number, count in expected.items()}


def test_no_window_no_profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leap_dist.monitoring.profiling.profile", lambda **_: pytest.fail("a profiler was built"))
    monkeypatch.setattr(
        "leap_dist.runtime.timing.record_function", lambda name: pytest.fail(f"a range {name} was opened")
    )
    run(tmp_path)
    assert not list((tmp_path / "tensorboard").glob("*.json*"))


def test_a_window_past_the_end_is_refused(tmp_path: Path) -> None:
    config = stub_config(tmp_path, "telemetry.profile_steps=[4,6]")
    check_window(config, total_steps=7)
    with pytest.raises(UserError, match=r"telemetry.profile_steps=\[4, 6\]: the run has 6 steps, the last one is 5"):
        check_window(config, total_steps=6)


@pytest.mark.parametrize("prefetch", [0, 1])
def test_the_window_counts_the_steps_that_train(prefetch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where batches are fetched a step ahead."""
    trainer = stub_trainer(stub_config(tmp_path, f"teacher.prefetch={prefetch}"), BlockTeacher())
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(trainer.profiler, "before", lambda step: told.append((step, trainer.progress.step)))
    assert trainer.run()
    trainer.close()
    assert told == [(step, step) for step in range(7)]
