"""tools/report.py: one page for what it is given, and one line for what is no run."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import report

from made_run import SUMMARY, Page, make_run


def test_a_run_has_its_page_in_its_folder_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "made", summary=None)
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"written to {folder / 'report.html'}\n"
    assert report.main([str(folder), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert "not finished" in Page(tmp_path / "new" / "page.html").text


def test_a_sweep_is_one_page_in_the_order_of_its_table(tmp_path: Path) -> None:
    names = ("slow-s0", "leap-s0", "fixed-s0")
    for index, name in enumerate(names):
        make_run(tmp_path / "runs" / name, summary=SUMMARY | {"epochs": 1.0 + index})
    make_run(tmp_path / "passes" / "one" / "apart-s0", summary=SUMMARY | {"epochs": 9.0})
    with (tmp_path / "results.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["row", "folder"])
        table.writerows([name, f"elsewhere/{name}"] for name in names)
    assert report.main([str(tmp_path)]) == 0
    assert Page(tmp_path / "report.html").figures["epochs"] == [1.0, 2.0, 3.0, 9.0]


def test_several_runs_are_one_page_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [str(make_run(tmp_path / name)) for name in ("b", "a")]
    monkeypatch.chdir(tmp_path)
    assert report.main(folders) == 0
    assert "2 runs" in Page(tmp_path / "report.html").text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["."], ".: neither a run folder nor one"),
        (["run", "run"], "same run twice"),
    ],
)
def test_what_cannot_be_is_one_line(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "run" in given:
        make_run(tmp_path / "run")
    assert report.main(given) == 2
    line = capsys.readouterr().err
    assert line.startswith("report: error: ") and said in line and line.count("\n") == 1
    assert not (tmp_path / "report.html").exists()
