"""`make test-gpu`: the suite's runs are on CUDA there, and a run of more ranks than GPUs is skipped by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("wanted", "there", "skips"), [("cuda", 1, True), ("cuda", 2, False), ("cpu", 0, False)])
def test_a_run_of_more_ranks_than_gpus_is_skipped(
    monkeypatch: pytest.MonkeyPatch, wanted: str, there: int, skips: bool
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", wanted)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    try:
        runs.require_gpus(2)
        skipped = False
    except pytest.skip.Exception as reason:
        skipped = True
        assert str(reason) == "needs 2 GPUs, and there is 1"
    assert skipped is skips


def test_the_target_lets_cuda_through_and_names_files_that_are_there() -> None:
    rule = re.search(r"^test-gpu:.*?\n\n", (ROOT / "Makefile").read_text(), re.M | re.S)
    assert rule and "DS_ACCELERATOR=cuda" in rule[0]
    stems = re.search(r"py,\\\s+([a-z_ ]+)\)\)", rule[0])
    assert stems
    for stem in stems[1].split():
        assert (ROOT / "tests" / "distributed" / f"test_{stem}.py").is_file()
    assert 'setdefault("DS_ACCELERATOR", "cpu")' in (ROOT / "tests" / "conftest.py").read_text()
