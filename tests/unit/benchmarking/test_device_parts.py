"""Parts of the check of a GPU that need one, on the CPU: against itself, and with a wait that is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.benchmarking import device_parts
from leap_dist.benchmarking.device_check import Finding
from leap_dist.trainer import Trainer

pytestmark = pytest.mark.seconds


def rows(finding: Finding) -> list[dict[str, Any]]:
    (table,) = finding.tables.values()
    return table


def test_a_step_is_itself_and_another_one_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = device_parts.one_step(True, tmp_path)
    assert same.failures == [] and {row["of"]: row["relative error"] for row in rows(same)} == {
        "loss": 0.0, "score": 0.0, "gradients": 0.0,
    }  # fmt: skip
    outcome, calls = device_parts._outcome, iter((1.0, 1.001))
    monkeypatch.setattr(
        device_parts,
        "_outcome",
        lambda *given: (lambda by: {name: by * value for name, value in outcome(*given).items()})(next(calls)),
    )
    assert len(device_parts.one_step(True, tmp_path).failures) == 3


def test_colours_are_themselves(tmp_path: Path) -> None:
    same = device_parts.colours(True, tmp_path)
    assert same.failures == [] and rows(same)[0]["values apart"] == 0.0


@pytest.mark.slow
def test_a_wait_is_found_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    next_work = Trainer._next_work

    def waiting(self: Trainer, *given: Any) -> Any:
        if modes[-1] == "error" and self.config.optim.name == "adamw":
            raise RuntimeError("called a synchronizing CUDA operation")
        return next_work(self, *given)

    monkeypatch.setattr(Trainer, "_next_work", waiting)
    found = device_parts.no_wait(True, tmp_path)
    assert [row["waits at"] == "nothing" for row in rows(found)] == [True, False, True]
    assert len(found.failures) == 1 and found.failures[0].startswith("bf16 with adamw waits at trainer.py:")
    assert modes[-1] == "default"
