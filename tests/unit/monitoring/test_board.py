"""Points read back from TensorBoard's files, beside TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from leap_dist.monitoring.board import read_points


def write(folder: Path, steps: range, offset: float, name: str, purge: int | None) -> None:
    """A session's file; names give the order, as seconds do."""
    with SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".{name}") as board:
        for step in steps:
            board.add_scalar("loss/total", step + offset, step)
            board.add_scalar("lr", step / 8, step)
    (path,) = folder.glob(f"*.{name}")
    path.rename(folder / f"events.out.tfevents.{name}")


def theirs(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_points_are_those_that_tensorboard_reads(tmp_path: Path) -> None:
    """A session from step 6 on hides what the first wrote of steps 6 to 9."""
    write(tmp_path, range(10), 0.25, "1", purge=0)
    write(tmp_path, range(6, 8), 0.5, "2", purge=6)
    found = read_points(tmp_path, lambda tag: True)
    assert set(found) == {"loss/total", "lr"}
    for tag, points in found.items():
        assert list(zip(points.steps, points.values, strict=True)) == theirs(tmp_path, tag)
    assert found["loss/total"].values.tolist() == [0.25, 1.25, 2.25, 3.25, 4.25, 5.25, 6.5, 7.5]
    assert list(read_points(tmp_path, "lr".__eq__)) == ["lr"]


@pytest.mark.parametrize("left", [0.3, 0.55, 0.9])
def test_a_file_that_was_cut_is_read_up_to_there(left: float, tmp_path: Path) -> None:
    write(tmp_path, range(50), 0.0, "1", purge=0)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    steps = read_points(tmp_path, "loss/total".__eq__)["loss/total"].steps.tolist()
    assert steps == list(range(len(steps))) and abs(len(steps) - 50 * left) < 3


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert read_points(tmp_path / "none", lambda tag: True) == {}
