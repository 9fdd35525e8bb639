"""The depth benchmark: its shares of FLOPs are the teacher's, and a tolerance decides the exit status."""

from __future__ import annotations

import pytest

from bench import teacher
from leap_dist.config import TeacherConfig
from leap_dist.models.flops import teacher_flops

SMALL = ["--model", "vit_tiny_patch16_224", "--image-size", "32", "--batch", "1", "--repeats", "2"]


@pytest.mark.seconds
def test_shares_run_from_a_quarter_of_the_depth_to_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert teacher.main([*SMALL, "--tolerance", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:-1]
    flops = teacher_flops(TeacherConfig(model="vit_tiny_patch16_224"), 32)
    assert [int(line.split()[0]) for line in lines] == list(range(3, 13))
    for line in lines:
        block, _, _, share, _ = line.split()
        assert float(share) == pytest.approx(flops.upto(int(block)) / flops.upto(12), abs=1e-3)
    assert lines[-1].split()[2] == "1.000"
    assert teacher.main([*SMALL, "--tolerance", "0"]) == 1
