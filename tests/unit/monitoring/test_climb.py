"""The picture of a run's climb draws what the ledger holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leap_dist.errors import UserError
from leap_dist.monitoring import climb

# Advances after steps 1 and 9; from then on, at the last block, only shown scores and ends of epochs have lines.
LINES = [(0, 1, 0.5, 1), (1, 1, 0.8, 2), (2, 2, 0.4, 2), (9, 2, 0.9, 3), (19, 3, None, 3)]


def write_ledger(folder: Path, lines: list[tuple[Any, ...]] = LINES) -> None:
    keys = ("step", "block", "score", "next_block")
    rows = [dict(zip(keys, line, strict=True)) | {"threshold": 0.75} for line in lines]
    rows[0]["depth"] = 3
    (folder / "curriculum.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_stairs_and_scores_are_the_ledgers(tmp_path: Path) -> None:
    write_ledger(tmp_path)
    found = climb.read(tmp_path)
    assert (found.advances, found.end, found.saved) == ([2, 10], 20, None)
    above, below = climb.draw(found).axes
    assert above.lines[0].get_xydata().tolist() == [[0, 1], [1, 1], [2, 2], [9, 2], [10, 3], [19, 3], [20, 3]]
    assert below.lines[0].get_xydata().tolist() == [[0, 0.5], [1, 0.8], [2, 0.4], [9, 0.9]]
    (threshold,) = below.collections[0].get_segments()
    assert threshold.tolist() == [[0, 0.75], [10, 0.75]], "at the last block it decides nothing"


def test_a_block_entered_on_an_epochs_last_step_and_left_at_its_end_was_never_trained_on(tmp_path: Path) -> None:
    write_ledger(tmp_path, [(0, 1, 0.5, 1), (1, 1, 0.8, 2), (1, 2, None, 3), (2, 3, 0.1, 3)])
    blocks = climb.read(tmp_path).blocks
    assert dict(zip(blocks.steps.tolist(), blocks.values.tolist(), strict=True)) == {0: 1, 1: 1, 2: 3}


def test_a_run_in_mid_climb_has_its_threshold_to_the_end(tmp_path: Path) -> None:
    write_ledger(tmp_path, LINES[:3])
    (threshold,) = climb.draw(climb.read(tmp_path)).axes[1].collections[0].get_segments()
    assert threshold.tolist() == [[0, 0.75], [3, 0.75]]


def test_the_saved_share_is_the_summarys(tmp_path: Path) -> None:
    write_ledger(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"teacher_flops_saved": 0.266}))
    (text,) = climb.draw(climb.read(tmp_path)).axes[0].texts
    assert text.get_text() == "27% of the teacher's FLOPs saved"


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no line of curriculum\.jsonl"):
        climb.read(tmp_path)


def test_a_ledger_that_begins_in_the_middle_is_drawn_to_the_summarys_depth(tmp_path: Path) -> None:
    row = {"step": 7, "block": 2, "score": None, "next_block": 2}
    (tmp_path / "curriculum.jsonl").write_text(json.dumps(row) + "\n")
    assert climb.read(tmp_path).depth == 2
    (tmp_path / "summary.json").write_text(json.dumps({"teacher_depth": 12}))
    found = climb.read(tmp_path)
    assert (found.depth, found.threshold) == (12, None)
    assert not climb.draw(found).axes[1].collections
