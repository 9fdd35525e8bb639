"""The benchmark runs from the command line and writes complete rows."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.seconds
def test_benchmark_writes_complete_rows_and_ratios(tmp_path: Path) -> None:
    shape = ["--rows", "96", "--student", "8", "--teacher", "24", "--repeats", "2"]
    command = [sys.executable, str(ROOT / "tools/bench/feature_match.py"), *shape, "--impls", "gram", "reference"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [*command, "--csv", "rows.csv"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert "gram + CKA: " in child.stdout and "x the speed of eager" in child.stdout
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 3  # implementations, with and without CKA, parts
    assert all(row["shape"] == "M=96 Ds=8 Dt=24" and float(row["median"]) > 0 for row in rows)
    memory = {row["name"]: float(row["memory"]) for row in rows if row["part"] == "full"}
    assert memory["eager + CKA"] > memory["eager"] >= 96 * 24 * 4 / 2**20  # at least P itself
