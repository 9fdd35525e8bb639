"""A real run on several sources: continued, it is the same; with other proportions it is refused."""

from __future__ import annotations

from pathlib import Path

from leap_dist.data import write_shards
from leap_dist.data.digits import digit_samples
from runs import finish, run_ok, start, write_config


def test_a_run_on_two_sources_is_continued_and_not_with_other_proportions(tmp_path: Path) -> None:
    samples = list(digit_samples("val"))
    for name, part in (("a", samples[:200]), ("b", samples[200:230])):
        write_shards(part, tmp_path / name)
    parts = {str(tmp_path / "a"): 3, str(tmp_path / "b"): 1}
    config = write_config(
        tmp_path, epochs=3, data={"train": parts, "workers": 1}, checkpoint={"every_steps": 4, "keep": 9},
        telemetry={"pictures_every": 4},
    )  # fmt: skip
    run_ok(config)
    middle = tmp_path / "run" / "checkpoints" / "step00000004"
    run_ok(config, f"output={tmp_path / 'rest'}", f"resume={middle}")
    whole, rest = ((tmp_path / run / "student.safetensors").read_bytes() for run in ("run", "rest"))
    assert whole == rest
    other = f"data.train={{{tmp_path / 'a'}: 2, {tmp_path / 'b'}: 1}}"
    done = finish(start(config, other, f"output={tmp_path / 'other'}", f"resume={middle}"))
    said = {line.split("error:")[1] for line in done.stdout.splitlines() if "error:" in line}
    assert done.returncode == 2 and len(said) == 1, done.stdout[-2000:]
    assert "data.train=0.75 of 200 samples" in said.pop()
