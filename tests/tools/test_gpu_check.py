"""The check of a GPU from the command line: its mistakes, its plan, and a dry run of all of it on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leap_dist.benchmarking.device_parts import PARTS

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 9
# What is worth most comes first.
ORDER = [
    "environment", "kernels", "one_step", "no_wait", "colours", "match", "teachers", "steps", "demo", "resume",
    "two_ranks",
]  # fmt: skip
NEEDS_CUDA = {"one_step", "no_wait", "colours"}


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_plan() -> None:
    assert [part.name for part in PARTS] == ORDER
    assert {part.name for part in PARTS if not part.on_cpu} == NEEDS_CUDA
    assert all(5 <= part.limit <= 120 and part.run.__doc__ for part in PARTS)
    first = sum(part.limit for part in PARTS[:7])  # what is right, and the speed of kernel and teacher
    assert first < 60 * MINUTES


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no GPU that torch can use"),
        (("--dry", "--only", "kernels,matsch"), "--only matsch: no such part; there are environment, kernels"),
        (("--dry", "--out", "page.txt"), "a page's name ends in .md"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = gpu_check(*arguments)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(2400)  # its own limits add up to more than the usual
def test_a_dry_run_goes_through_all_parts_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "dry.md"
    done = gpu_check("--dry", "--out", str(out))
    logs = {path.parent.name: path.read_text()[-1500:] for path in tmp_path.glob("dry.logs/*/log.txt")}
    results = {one["name"]: one for one in json.loads(out.with_suffix(".json").read_text())["parts"]}
    assert list(results) == ORDER
    for name, result in results.items():
        expected = ("skipped", "needs a CUDA device") if name in NEEDS_CUDA else ("ok", "")
        assert (result["state"], result["reason"]) == expected, logs.get(name, "")
    assert done.returncode == 0
    tables = {
        title: rows for one in results.values() for title, rows in (one["finding"] or {"tables": {}})["tables"].items()
    }
    assert [row["block"] for row in tables["Whole steps"]] == [1, 4]
    launches = [row["launches"] for row in tables["Whole steps"]]
    assert launches[0] > 100
    assert len(tables["Kernels against float64"]) == 3 * 9
    ranks = tables["Two ranks on one device"]
    assert [row["run"] for row in ranks] == ["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "sharded", "pipelined"]
    assert all(row["steps"] > 1 and row["scores differ by"] < 1e-5 for row in ranks)
    assert tables["Kill and resume"][0]["scores differ by"] == 0.0
    assert "a dry run, no figure means anything" in out.read_text()
