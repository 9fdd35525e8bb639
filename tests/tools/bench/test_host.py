"""The host's part of a step: what is counted follows the depth, and the width changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from runs import finish, fork

ROOT = Path(__file__).resolve().parents[3]
YAML = """
teacher: {model: vit_tiny_patch16_224, kwargs: {patch_size: 14, depth: 3}}
student: {model: vit_tiny_patch16_224, kwargs: {patch_size: 14, depth: 1}}
data: {train: digits}
engine: {precision: bf16}
"""
# Norm, qkv, attention, projection, sum; norm, product, GELU, product, sum.
BLOCK = 10


def rows(tmp_path: Path, *overrides: str) -> list[dict]:
    config, out = tmp_path / "run.yaml", tmp_path / "host.json"
    config.write_text(YAML)
    command = ["--config", str(config), "--blocks", "1,2", "--batch", "4", "--rounds", "1", "--steps", "1"]
    done = finish(fork(ROOT / "tools/bench/host.py", *command, "--json", str(out), *overrides, processes=1))
    assert done.returncode == 0, done.stdout[-2000:]
    return json.loads(out.read_text())["rows"]


@pytest.mark.seconds
def test_launches_by_block_and_phase(tmp_path: Path) -> None:
    first, second, last = rows(tmp_path)
    assert [row["block"] for row in (first, second, last)] == [1, 2, 3]
    parts = [row["parts"] for row in (first, second, last)]
    assert parts[1]["teacher"] - parts[0]["teacher"] == parts[2]["teacher"] - parts[1]["teacher"] == BLOCK
    for row, part in zip((first, second, last), parts, strict=True):
        assert sum(part.values()) == row["launches"] and row["reads"] == 0 and math.isfinite(row["host_ms"])
        assert part["student.backward"] > part["student.forward"] > 0 and part["match"] > 0 and part["optimizer"] > 0
        assert part["other"] > 50  # the colours, which a CPU's loader would have done already


@pytest.mark.slow
def test_lars_in_fp16_reads_the_overflow_flag_in_every_step_and_goes_over_lists(tmp_path: Path) -> None:
    found = rows(tmp_path, "optim.name=lars", "optim.lr=1e-6", "engine.precision=fp16")
    assert [row["reads"] for row in found] == [1, 1, 1]
    assert found[0]["parts"]["optimizer"] < 2 * found[0]["parts"]["student.backward"]
