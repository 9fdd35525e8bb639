"""The history of a run says when it was at work, with what, and what went wrong."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch

from leap_dist.monitoring import history
from leap_dist.monitoring.history import HISTORY, History, read_history
from stubs import ONE

log = logging.getLogger("leap_dist.somewhere")


def test_sessions_and_their_warnings_follow_each_other(tmp_path: Path) -> None:
    first = History(tmp_path)
    first.start(ONE, 0, 100)
    log.warning("one\nof two lines")
    log.info("no warning")
    first.note("stop", step=40)
    first.close()
    log.warning("nobody listens")
    second = History(tmp_path)
    second.start(ONE, 40, 100)
    second.close()
    lines = read_history(tmp_path)
    assert [line["event"] for line in lines] == ["start", "warning", "stop", "start"]
    assert lines[1]["text"] == "one of two lines"
    assert (lines[0]["ranks"], lines[0]["nodes"], lines[0]["total_steps"], lines[3]["step"]) == (1, 1, 100, 40)
    assert torch.__version__.startswith(lines[0]["versions"]["torch"])
    assert lines[0]["command"] and lines[0]["device"]


def test_half_a_line_and_what_is_none_are_left_out(tmp_path: Path) -> None:
    session = History(tmp_path)
    session.start(ONE, 0, 100)
    session.close()
    with (tmp_path / HISTORY).open("a") as file:
        file.write('[1]\n{"event": 3, "at": ""}\nnonsense\n{"event": "warning", "at": "", "te')
    assert [line["event"] for line in read_history(tmp_path)] == ["start"]
    again = History(tmp_path)
    again.start(ONE, 5, 100)
    again.close()
    assert len((tmp_path / HISTORY).read_text().splitlines()) == 2


def test_where_it_cannot_be_written_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / HISTORY).mkdir()
    session = History(tmp_path)
    session.start(ONE, 0, 100)
    session.note("end", step=100)
    session.close()
    assert [record.getMessage() for record in caplog.records if HISTORY in record.getMessage()] != []
    assert len(caplog.records) == 1, "said once"


def test_a_loaders_worker_writes_nothing(tmp_path: Path) -> None:
    """It has inherited the handler, and what it knows of the file is old."""
    session = History(tmp_path)
    session.start(ONE, 0, 100)
    session._process = os.getppid()
    log.warning("from a worker")
    session.close()
    assert [line["event"] for line in read_history(tmp_path)] == ["start"]


def test_the_commit_is_this_checkouts_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *names, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "first")
    git("tag", "v1")
    monkeypatch.setattr(history, "ROOT", tmp_path)
    assert history._commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert history._commit() == f"{git('rev-parse', 'HEAD')}-dirty"
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(history, "ROOT", tmp_path / "site-packages")
    assert history._commit() is None
