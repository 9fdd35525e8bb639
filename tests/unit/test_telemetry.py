"""What is shown is what happened."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from stubs import stub_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leap_dist.telemetry import PhaseTimer, Telemetry, block_figure, memory_bytes, table


def events(output: Path) -> EventAccumulator:
    found = EventAccumulator(str(output / "tensorboard"))
    found.Reload()
    return found


def test_phases_add_up_over_their_bodies() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.phase("teacher"):
            time.sleep(0.02)
    with timer.phase("data", host=True):
        time.sleep(0.01)
    totals = timer.totals()
    assert 0.04 <= totals["teacher"] < 0.2 and 0.01 <= totals["data"] < 0.1


class Sleeper(torch.nn.Module):
    def forward(self, seconds: float) -> None:
        time.sleep(seconds)


def test_a_watched_module_is_timed_wherever_it_is_called() -> None:
    timer, module = PhaseTimer(torch.device("cpu")), Sleeper()
    timer.watch(module, "match")
    with timer.phase("student"):
        for _ in range(2):
            module(0.02)
        time.sleep(0.02)
    totals = timer.totals()
    assert 0.04 <= totals["match"] < totals["student"] - 0.015


def test_rates_are_per_step_since_the_last_point(tmp_path: Path) -> None:
    telemetry = Telemetry(stub_config(tmp_path, "telemetry.every=2"), total_steps=4, first_step=0)
    for step in range(4):
        telemetry.step(step, {"block": "1/4"}, {"loss/total": float(step)}, {"teacher": 0.5 * (step + 1)})
    telemetry.close()
    found = events(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("loss/total")] == [(0, 0.0), (2, 2.0)]
    assert [event.value for event in found.Scalars("time/teacher")] == pytest.approx([0.5, 0.5])
    assert all(event.value > 0 for event in found.Scalars("images_per_s"))


def test_a_resumed_run_hides_the_points_it_repeats(tmp_path: Path) -> None:
    config = stub_config(tmp_path)
    first = Telemetry(config, total_steps=4, first_step=0)
    for step in range(4):
        first.step(step, {}, {"loss/total": -1.0}, {})
    first.close()
    second = Telemetry(config, total_steps=4, first_step=2)
    for step in range(2, 4):
        second.step(step, {}, {"loss/total": 1.0}, {})
    second.close()
    assert [event.value for event in events(tmp_path).Scalars("loss/total")] == [-1, -1, 1, 1]


def test_the_end_of_a_run_leaves_config_hparams_and_figure(tmp_path: Path) -> None:
    telemetry = Telemetry(stub_config(tmp_path), total_steps=4, first_step=0)
    telemetry.finish({"steps": 4, "student_knn": 0.5, "trajectory": [(0, 1)]}, [(0, 1), (3, 2)], depth=4)
    telemetry.close()
    found = events(tmp_path)
    assert {"config/text_summary"} <= set(found.Tags()["tensors"])
    assert "curriculum/block_over_steps" in found.Tags()["images"]
    assert found.Scalars("result/student_knn")[0].value == 0.5
    assert (tmp_path / "curriculum.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_draws_the_trajectory() -> None:
    axes = block_figure([(0, 1), (10, 2), (30, 5)], steps=50, depth=12).axes[0]
    assert axes.lines[0].get_xdata().tolist() == [0, 10, 30, 50]
    assert axes.lines[0].get_ydata().tolist() == [1, 2, 5, 5]


def test_the_table_aligns_and_leaves_out_what_is_unknown() -> None:
    assert table([("kNN", "50 %"), ("teacher", None), ("steps", "3")]).splitlines() == [
        "-----------", "kNN    50 %", "steps  3", "-----------",
    ]  # fmt: skip


def test_memory_counts_this_process() -> None:
    before = memory_bytes(torch.device("cpu"))
    block = torch.ones(64 << 18)
    assert memory_bytes(torch.device("cpu")) >= max(before, block.nbytes)
