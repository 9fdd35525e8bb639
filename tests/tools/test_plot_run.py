"""Runs side by side: what is drawn is what the run folders hold, and what they lack is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import plot_run
import pytest
from torch.utils.tensorboard import SummaryWriter

STEPS = 6
SCORES = [0.5, 0.9, 0.4, 0.6, None, 0.8]
BLOCKS = [1, 1, 2, 2, 2, 2]


def write_ledger(folder: Path, flops_per_block: float = 10.0) -> None:
    """Six steps, an advance after the second, no score at the fifth; two seconds a step."""
    spent, lines = 0.0, []
    for step, (score, block) in enumerate(zip(SCORES, BLOCKS, strict=True)):
        spent += block * flops_per_block
        lines.append(
            {"step": step, "epoch": 0, "block": block, "score": score, "teacher_flops": spent, "seconds": 2.0 * step}
        )
    folder.mkdir(exist_ok=True)
    (folder / "curriculum.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_board(folder: Path) -> None:
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for step in range(0, STEPS, 2):
            board.add_scalar("loss/total", 1 / (step + 1), step)
            board.add_scalar("curriculum/cosine", 0.1 * step, step)
            board.add_scalar("curriculum/block", 1 + step // 4, step, walltime=100.0 + step)


def test_a_ledger_gives_score_and_block_over_steps_flops_and_seconds(tmp_path: Path) -> None:
    write_ledger(tmp_path)
    run = plot_run.read(tmp_path, "leap")
    steps, scores = run.series["score"]
    assert steps.tolist() == [0, 1, 2, 3, 5] and scores.tolist() == [0.5, 0.9, 0.4, 0.6, 0.8]
    assert run.along("flops", steps).tolist() == [10, 20, 40, 60, 100]
    assert run.along("seconds", steps).tolist() == [0, 2, 4, 6, 10]
    assert run.missing == ("tensorboard", "summary.json")


def test_an_advance_is_drawn_at_the_next_step_also_where_that_has_no_line(tmp_path: Path) -> None:
    """At the last block only every tenth step is scored: the ledger's next line is steps later."""
    lines = [
        {"step": step, "block": block, "next_block": following, "score": 0.5, "teacher_flops": 1.0, "seconds": 1.0}
        for step, block, following in ((240, 11, 11), (241, 11, 12), (250, 12, 12))
    ]
    (tmp_path / "curriculum.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, blocks = plot_run.read(tmp_path, "leap").series["block"]
    assert (steps.tolist(), blocks.tolist()) == ([240, 241, 242, 250], [11, 11, 12, 12])


def test_a_block_that_no_step_had_is_not_drawn(tmp_path: Path) -> None:
    """The end of the last epoch may advance once more."""
    lines = [{"step": 5, "block": 2, "next_block": following, "score": 0.5} for following in (2, 3)]
    (tmp_path / "curriculum.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_run.read(tmp_path, "leap").series["block"].steps.tolist() == [5]


def test_without_a_ledger_the_board_serves_and_there_are_no_flops(tmp_path: Path) -> None:
    write_board(tmp_path)
    run = plot_run.read(tmp_path, "old")
    assert run.series["score"].values.tolist() == pytest.approx([0, 0.2, 0.4])
    assert run.series["block"].values.tolist() == [1, 1, 2]
    assert run.along("flops", np.array([0])) is None
    assert "curriculum.jsonl" in run.missing


def test_every_run_is_drawn_in_its_color_over_all_three_axes(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(folders):
        write_ledger(folder, flops_per_block=10.0 * (index + 1))
        write_board(folder)
        accuracies = {"student_patch_knn": 0.5 + index / 10, "student_patch_probe": 0.7}
        (folder / "summary.json").write_text(json.dumps(accuracies))
    runs = [plot_run.read(folder, folder.name) for folder in folders]
    figure = plot_run.draw(runs)
    score, loss, block, accuracy = np.array(figure.axes).reshape(4, 3)
    for panels in (score, loss, block, accuracy):
        assert panels[0].get_ylabel() and len(panels) == 3
    over_flops = [line.get_xydata().tolist() for line in score[1].lines]
    assert over_flops[0][-1] == [100.0, 0.8] and over_flops[1][-1] == [200.0, 0.8]
    assert [line.get_color() for line in score[1].lines] == ["C0", "C1"]
    assert [line.get_xydata().tolist() for line in accuracy[1].lines][2] == [[200.0, 0.6]]
    assert loss[0].lines[0].get_xydata()[:, 1].tolist() == pytest.approx([1, 1 / 3, 1 / 5])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "kNN", "linear probe"]


def test_fifteen_rows_have_fifteen_colors(tmp_path: Path) -> None:
    write_ledger(tmp_path)
    run = plot_run.read(tmp_path, "")
    figure = plot_run.draw([replace(run, name=str(index)) for index in range(15)])
    assert len({line.get_color() for line in figure.axes[0].lines}) == 15


def test_accuracy_between_epochs_is_a_curve_over_all_three_axes(tmp_path: Path) -> None:
    """Evaluated when two and six steps are done: after steps 1 and 5. Two runs of one name share a colour."""
    write_ledger(tmp_path)
    lines = [{"epoch": 1, "step": 2, "patch_knn": 0.3}, {"epoch": 3, "step": 6, "patch_knn": 0.6}]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text(json.dumps({"student_patch_knn": 0.6}))
    run = plot_run.read(tmp_path, "leap")
    figure = plot_run.draw([run, run])
    accuracy = np.array(figure.axes).reshape(3, 3)[2]
    assert [panel.lines[1].get_xydata().tolist() for panel in accuracy] == [
        [[1, 0.3], [5, 0.6]], [[20, 0.3], [100, 0.6]], [[2, 0.3], [10, 0.6]],
    ]  # fmt: skip
    assert {line.get_color() for line in accuracy[0].lines} == {"C0"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["leap", "kNN"]


def test_the_picture_is_written_and_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / name for name in ("leap", "base")]
    for run in runs:
        write_ledger(run)
    assert plot_run.main([*map(str, runs), "--out", str(tmp_path / "out" / "runs.png")]) == 0
    assert (tmp_path / "out" / "runs.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == "".join(
        f"plot_run: {run.name}: without tensorboard, summary.json\n" for run in runs
    )


def test_one_run_is_drawn_as_its_climb(tmp_path: Path) -> None:
    lines = [{"step": 0, "block": 1, "next_block": 1, "score": 0.5, "threshold": 0.7, "depth": 2}]
    (tmp_path / "curriculum.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with patch.object(plot_run.climb, "draw", wraps=plot_run.climb.draw) as drawn:
        assert plot_run.main([str(tmp_path), "--out", str(tmp_path / "climb.png")]) == 0
    assert drawn.call_args.args[0].depth == 2
    assert (tmp_path / "climb.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_what_is_no_run_is_refused_in_one_line(make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "other")
    assert plot_run.main([str(tmp_path / "other"), "--out", str(tmp_path / "runs.png")]) == 2
    assert capsys.readouterr().err.startswith(f"plot_run: error: {tmp_path / 'other'}: no ")
    assert not (tmp_path / "runs.png").exists()


def test_names_are_the_shortest_that_tell_runs_apart() -> None:
    assert plot_run.names([Path("/x/leap"), Path("/x/base")]) == ["leap", "base"]
    assert plot_run.names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
