"""The bar's words and the points of an advance, as the loop's own run leaves them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leap_dist.monitoring.telemetry import Bar
from stubs import StubTeacher, stub_config, stub_trainer


def shown(output: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[str]:
    """What the bar says of the score, step by step, of six steps that climb four blocks in three."""
    texts: list[str] = []
    monkeypatch.setattr(Bar, "step", lambda self, words: texts.append(words["cka"]))
    trainer = stub_trainer(stub_config(output, "curriculum.threshold=-1", *overrides), StubTeacher())
    assert trainer.run()
    trainer.close()
    return texts


def test_the_bar_shows_the_last_score_and_of_which_step_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = shown(tmp_path, monkeypatch, "telemetry.every=100")
    scores = [text.split()[0] for text in texts]
    assert all(float(score) for score in scores)
    assert [text.partition(" ")[2] for text in texts] == ["", "", "", "(step 2)", "(step 2)", "(step 2)"]
    assert scores[3:] == [scores[2]] * 3


def test_a_run_that_has_scored_nothing_yet_shows_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = shown(tmp_path, monkeypatch, "telemetry.every=100", "curriculum.start=4")
    assert texts[0] and texts[0] != "-", "the first step is shown, so it is scored"
    assert texts[1].endswith("(step 0)")


def test_both_sides_of_an_advance_have_a_point_once(tmp_path: Path) -> None:
    """Blocks 1, 2, 3, 4, 4, 4, with a point at every third step: all steps around the advances have one."""
    trainer = stub_trainer(stub_config(tmp_path, "curriculum.threshold=-1", "telemetry.every=3"), StubTeacher())
    assert trainer.run()
    trainer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("curriculum/block")]
    assert sorted(set(points)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [event.step for event in events.Scalars("curriculum/threshold")] == [0], "not once it has climbed"
