"""What is said while a run is put together."""

from __future__ import annotations

from pathlib import Path

import pytest

from leap_dist.assembly import warn_of_normalisation
from leap_dist.config import load
from leap_dist.teacher import describe_teacher


def test_another_normalisation_is_said_with_what_to_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = ["teacher.model=vit_small_patch16_224", "teacher.weights=random", "student.model=s", "data.train=digits"]
    config = load(None, asked)
    spec = describe_teacher(config.teacher, 224)
    warn_of_normalisation(config, spec)
    (message,) = caplog.messages
    typed = message.partition("; set ")[2].split(" ")
    assert [text.partition("=")[0] for text in typed] == ["data.mean", "data.std"]
    caplog.clear()
    warn_of_normalisation(load(None, [*asked, *typed]), spec)
    assert not caplog.messages
