"""The analysis benchmark: it runs, and its bar decides the exit status."""

from __future__ import annotations

import pytest

from bench import analysis

SMALL = ["--model", "vit_tiny_patch16_224", "--image-size", "64", "--images", "8", "--batch", "2"]


@pytest.mark.seconds
def test_the_bar_decides(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert analysis.main(SMALL) == 0
    printed = capsys.readouterr().out
    assert "bare forward passes" in printed and "MiB after a quarter" in printed
    monkeypatch.setattr(analysis, "SECONDS", -60.0)
    assert analysis.main([*SMALL, "--teacher", "vit_tiny_patch16_224"]) == 1
