"""What the early exits saved, from passes whose times are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from stubs import DEPTH, ONE, StubTeacher, stub_config, stub_trainer

from leap_dist import wrapup


@pytest.mark.parametrize(("start", "calibration"), [("1", 0), ("null", 1)])
def test_time_and_efficiency_follow_the_steps_spent_on_each_block(
    start: str, calibration: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass costs 1 s and 2 s a block; its FLOPs are 10 a block: time saves less than FLOPs do."""
    config = stub_config(tmp_path, f"curriculum.start={start}", "curriculum.threshold=-1")
    trainer = stub_trainer(config, StubTeacher())
    trainer.coordinator.start_at(1)
    monkeypatch.setattr(
        trainer, "_calibrated", lambda batches: (trainer.accountant.charge_calibration(trainer.costs), 1)[1]
    )
    assert trainer.run()
    trainer.close()
    assert [block for _, block in trainer.progress.trajectory] == [1, 2, 3, 4]  # 1, 1, 1 and 3 steps
    trainer.costs.seconds = 100.0
    seconds = {block: 1.0 + 2.0 * block for block in range(1, DEPTH + 1)}
    monkeypatch.setattr(wrapup, "_seconds_by_depth", lambda teacher, images, blocks: {b: seconds[b] for b in blocks})
    summary = wrapup._time_saved(config, ONE, trainer)
    saved = (6 + 4 + 2) - 9 * calibration
    assert summary["time_saved_seconds"] == pytest.approx(saved)
    assert summary["time_saved"] == pytest.approx(saved / (saved + 100))
    spared = 40 * (3 + 2 + 1) - 160 * calibration
    assert summary["skip_efficiency"] == pytest.approx(summary["time_saved"] / trainer.costs.flops_saved)
    assert trainer.costs.teacher_saved == pytest.approx(spared / (6 * 160))
    assert summary["teacher_skip_efficiency"] == pytest.approx((saved / (6 * 9)) / (spared / (6 * 160)))
