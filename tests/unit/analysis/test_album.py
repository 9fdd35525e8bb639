"""Pictures while a run trains: when, where, of what, and that nobody notices."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leap_dist.analysis.album import IMAGES, Album, token_sheet
from leap_dist.analysis.colours import TokenMap
from leap_dist.config import Config
from small_sets import write
from stubs import DEPTH, GRID, ONE, StubTeacher, stub_config, stub_trainer

MOVING = ("curriculum.threshold=-1", "student.kwargs.drop_path_rate=0.5", "student.kwargs.depth=2")


def trained(output: Path, config: Config, album: bool = True) -> Any:
    """Six steps; blocks 1, 2, 3, 4, 4, 4."""
    trainer = stub_trainer(config)
    shards = write(output / "shards", size=8)
    if album:
        data = replace(config.data, train=str(shards), workers=0)
        trainer.album = Album(replace(config, data=data), ONE)
    trainer.run()
    trainer.close()
    return trainer


def files(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "pictures").iterdir())


def test_pictures_come_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    trained(tmp_path, stub_config(tmp_path, "telemetry.pictures_every=4", *MOVING))
    assert files(tmp_path) == ["tokens.png", "tokens_step_0000004.png"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("tokens/teacher_and_student")] == [3, 5]
    shapes = [np.asarray(Image.open(tmp_path / "pictures" / name)).shape for name in files(tmp_path)]
    assert shapes[0] == shapes[1] and shapes[0][0] > IMAGES * 128 and shapes[0][1] > 3 * 128


def test_the_last_step_may_be_one_of_them(tmp_path: Path) -> None:
    trained(tmp_path, stub_config(tmp_path, "telemetry.pictures_every=3", *MOVING))
    assert files(tmp_path) == ["tokens.png", "tokens_step_0000003.png", "tokens_step_0000006.png"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("tokens/teacher_and_student")] == [2, 5]
    latest, first, last = ((tmp_path / "pictures" / name).read_bytes() for name in files(tmp_path))
    assert latest == last != first


def test_training_does_not_notice(tmp_path: Path) -> None:
    """Weights, modes and random numbers are those of a run without pictures."""
    found = []
    for name, every in (("with", 1), ("without", 0)):
        config = stub_config(tmp_path / name, f"telemetry.pictures_every={every}", *MOVING)
        module = trained(tmp_path / name, config, album=every > 0).learner.engine.module
        found.append((module.state_dict(), [part.training for part in module.modules()], torch.get_rng_state()))
    (ours, modes, draws), (theirs, other_modes, other_draws) = found
    assert all(ours[key].equal(theirs[key]) for key in theirs) and modes == other_modes and draws.equal(other_draws)
    assert not (tmp_path / "without" / "pictures").exists()


def test_a_picture_is_of_the_weights_as_they_are_and_of_the_block_that_was_matched(tmp_path: Path) -> None:
    """Two ways to one picture: by hand from the trained student, and by the run."""
    config = stub_config(tmp_path, "telemetry.pictures_every=100", *MOVING)
    trainer = trained(tmp_path, config)
    album, student = trainer.album, trainer.learner.engine.module.student.eval()
    with torch.no_grad():
        tokens = student(album._images).patch
    targets = StubTeacher().at(DEPTH, album._images).patch
    maps = [[TokenMap(one, grid) for one in found] for found, grid in ((targets, GRID), (tokens, student.grid))]
    headings = ("image", f"teacher, block {DEPTH} of {DEPTH}", "student, step 6")
    assert np.array_equal(np.asarray(token_sheet(album._photos, maps, headings)), picture(tmp_path))


def picture(output: Path) -> Any:
    return np.asarray(Image.open(output / "pictures" / "tokens.png"))


def test_a_disk_that_takes_no_picture_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "pictures").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, stub_config(tmp_path, "telemetry.pictures_every=2", *MOVING))
    assert trainer.progress.step == 6
    assert caplog.text.count("the run goes on without") == 1


def test_students_of_a_cohort_have_their_own(tmp_path: Path) -> None:
    students = "students={one: {curriculum.threshold: -1}, two: {curriculum: {mode: fixed, block: 2, start: null}}}"
    trained(tmp_path, stub_config(tmp_path, "telemetry.pictures_every=2", students))
    shown = []
    for name in ("one", "two"):
        assert files(tmp_path / name) == ["tokens.png", *(f"tokens_step_{step:07d}.png" for step in (2, 4, 6))]
        shown.append(picture(tmp_path / name))
    assert not np.array_equal(*shown) and not (tmp_path / "pictures").exists()
