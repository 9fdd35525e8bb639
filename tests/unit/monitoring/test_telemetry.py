"""What is shown is what happened."""

from __future__ import annotations

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from leap_dist.monitoring.dashboard import CARDS, LAYOUT
from leap_dist.monitoring.telemetry import Telemetry, block_figure, memory_bytes, table
from stubs import stub_config


def events(output: Path) -> EventAccumulator:
    found = EventAccumulator(str(output / "tensorboard"))
    found.Reload()
    return found


def test_points_are_written_at_their_step_and_bar_moves_by_images(tmp_path: Path) -> None:
    telemetry = Telemetry(stub_config(tmp_path, "telemetry.every=2"), total_steps=4, first_step=0)
    for step in range(4):
        telemetry.step({"block": "1/4"})
        if telemetry.is_due(step):
            telemetry.points(step, {"loss/total": float(step)})
    telemetry.close()
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss/total")] == [(0, 0.0), (2, 2.0)]


def test_charts_are_grouped_and_explained(tmp_path: Path) -> None:
    Telemetry(stub_config(tmp_path), total_steps=4, first_step=0).close()
    found = events(tmp_path)
    layout = Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    assert sum(len(category.chart) for category in layout.category) == sum(map(len, LAYOUT.values()))
    for name, text in CARDS.items():
        (card,) = found.Tensors(f"what the charts mean/{name}/text_summary")
        assert card.tensor_proto.string_val[0].decode() == text.strip()


def test_a_resumed_run_hides_the_points_it_repeats(tmp_path: Path) -> None:
    config = stub_config(tmp_path)
    first = Telemetry(config, total_steps=4, first_step=0)
    for step in range(4):
        first.points(step, {"loss/total": -1.0})
    first.close()
    second = Telemetry(config, total_steps=4, first_step=2)
    for step in range(2, 4):
        second.points(step, {"loss/total": 1.0})
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
