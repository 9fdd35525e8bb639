"""The sweep over target blocks: its arithmetic on made-up times, and a real one from the command line."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leap_dist.benchmarking import skipping
from leap_dist.benchmarking.skipping import Memory, Sample
from leap_dist.config import Config, load
from leap_dist.errors import UserError
from leap_dist.models.flops import teacher_flops
from runs import finish, fork

ROOT = Path(__file__).resolve().parents[2]
DEPTH = 3
YAML = """
teacher: {model: vit_tiny_patch16_224, weights: random, kwargs: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}}
student: {model: vit_tiny_patch16_224, kwargs: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}}
data: {train: digits, image_size: 16}
"""


def config(tmp_path: Path) -> tuple[Path, Config]:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path, load(path, [])


def table(tmp_path: Path, times: dict[int, list[float]], batch: int = 4) -> list[skipping.Row]:
    samples = {block: [Sample(time, time / 2) for time in found] for block, found in times.items()}
    memory = {block: Memory(float(block), 1.0) for block in times}
    return skipping.rows(config(tmp_path)[1], samples, memory, batch)


def test_time_that_follows_flops_has_efficiency_one_and_lies_on_the_ideal_line(tmp_path: Path) -> None:
    flops = {row.block: row.step_flops for row in table(tmp_path, {1: [1.0], 2: [1.0], 3: [1.0]})}
    rows = table(tmp_path, {block: [1e-4 * count] for block, count in flops.items()})
    assert [row.skip_efficiency for row in rows] == [pytest.approx(1), pytest.approx(1), None]
    for row in rows:
        assert row.images_per_s == pytest.approx(row.ideal_images_per_s)
        assert row.time_saved == pytest.approx(row.flops_saved)


def test_efficiency_is_time_saved_over_flops_saved_and_medians_ignore_a_busy_moment(tmp_path: Path) -> None:
    rows = table(tmp_path, {1: [8.0, 8.0, 500.0], 3: [9.0, 10.0, 11.0]}, batch=4)
    first, last = rows
    assert (first.step_ms, last.step_ms) == (8.0, 10.0)
    assert first.time_saved == pytest.approx(0.2)
    assert first.skip_efficiency == pytest.approx(0.2 / (1 - first.step_flops / last.step_flops))
    assert (first.images_per_s, first.teacher_ms, first.student_ms) == (500.0, 4.0, 4.0)


def test_step_flops_are_the_teachers_up_to_the_block_and_the_students_of_every_block(tmp_path: Path) -> None:
    teacher = teacher_flops(config(tmp_path)[1].teacher, 16)
    rows = table(tmp_path, {1: [1.0], 2: [1.0], 3: [1.0]})
    assert [row.teacher_flops for row in rows] == [teacher.upto(block) for block in (1, 2, 3)]
    assert len({row.step_flops - row.teacher_flops for row in rows}) == 1
    assert [b.step_flops - a.step_flops for a, b in itertools.pairwise(rows)] == list(teacher.blocks[1:])


def test_blocks_are_checked_and_always_hold_the_last() -> None:
    assert skipping.chosen_blocks("all", 3) == [1, 2, 3]
    assert skipping.chosen_blocks("2,1", 5) == [1, 2, 5]
    for wrong in ("0", "1,6", "one"):
        with pytest.raises(UserError, match=f"--blocks {wrong}"):
            skipping.chosen_blocks(wrong, 5)


@pytest.mark.seconds
def test_a_sweep_writes_csv_picture_and_board(tmp_path: Path) -> None:
    path, run = config(tmp_path)
    out = tmp_path / "out"
    command = ["--config", str(path), "--out", str(out), "--batch", "2", "--rounds", "2", "--steps", "2"]
    done = finish(fork(ROOT / "tools/profile_skip.py", *command, processes=1))
    assert done.returncode == 0, done.stdout[-2000:]
    with (out / "skip.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["block"]) for row in rows] == [1, 2, 3]
    flops = teacher_flops(run.teacher, 16)
    for row in rows:
        assert int(row["teacher_flops"]) == flops.upto(int(row["block"]))
        assert 0 < float(row["teacher_ms"]) < float(row["step_ms"])
        assert float(row["images_per_s"]) == pytest.approx(2e3 / float(row["step_ms"]))
        assert float(row["step_peak_mib"]) > 0
    weights = [float(row["teacher_weights_mib"]) for row in rows]
    assert weights[1] - weights[0] == pytest.approx(weights[2] - weights[1]) and weights[0] < weights[1]
    assert rows[-1]["skip_efficiency"] == "" and rows[0]["skip_efficiency"] != ""
    assert (out / "skip.png").read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(out))
    board.Reload()
    shown = board.Scalars("skip/images_per_s")
    assert [event.step for event in shown] == [1, 2, 3]
    assert [event.value for event in shown] == pytest.approx([float(row["images_per_s"]) for row in rows])
    assert "skip/figure" in board.Tags()["images"] and "result/worst_skip_efficiency" in board.Tags()["scalars"]
