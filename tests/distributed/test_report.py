"""A run of two ranks ends with a page for all students and one for each; and without one, if that is how it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leap_dist.monitoring.history import read_history
from made_run import Page, outside
from runs import run_ok, write_config

pytestmark = pytest.mark.slow


def test_a_page_that_cannot_be_written_costs_no_result_and_comes_with_the_next_end(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        students={"first": {}, "second": {"curriculum.threshold": 0.9}},
        data={"val": "digits"},
        evaluation={"probe_epochs": 1, "max_train_images": 100},
        telemetry={"report": True},
    )
    run = tmp_path / "run"
    (run / "report.html").mkdir(parents=True)
    said = run_ok(config)
    assert said.count("no report.html") == 1 and "tools/report.py" in said
    summary = json.loads((run / "first" / "summary.json").read_text())
    assert "student_patch_probe" in summary and (run / "cohort.json").is_file()
    (run / "report.html").rmdir()
    run_ok(config, "resume=auto")
    page = Page(run / "report.html")
    assert outside(page) == [] and [link["href"] for link in page.all("a")] == [
        "first/report.html", "second/report.html",
    ]  # fmt: skip
    for name in ("first", "second"):
        summary = json.loads((run / name / "summary.json").read_text())
        own = Page(run / name / "report.html")
        assert {"student_patch_probe", "teacher_cls_knn", "train_seconds", "final_block"} <= set(own.figures)
        for key, values in own.figures.items():
            assert set(values) == {summary[key]}, key
    lines = read_history(run)
    assert [line["event"] for line in lines] == ["start", "end", "warning", "start", "end"]
    assert {line["ranks"] for line in lines if line["event"] == "start"} == {2}
    assert lines[3]["step"] == lines[3]["total_steps"] == summary["steps"]
