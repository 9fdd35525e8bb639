"""The check of a GPU as a list of parts: order, limits, logs, the page, and what is left of one that is cut short."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from leap_dist.benchmarking.device_check import FAILED, OK, SKIPPED, Check, Finding, Part, Result, end_group, failed
from leap_dist.benchmarking.device_runs import apart
from leap_dist.benchmarking.launches import covered

# What a part's process does, by the part's name; its arguments are name, file for the finding, folder.
CHILD = """
import json, os, pathlib, subprocess, sys, time
name, found, folder = sys.argv[1:]
finding = {"summary": f"{name} done", "failures": [], "tables": {"Of " + name: [{"a": 1.0, "b": "x|y"}]}}
if name == "broken":
    print("reason in its own words", file=sys.stderr)
    sys.exit(3)
if name == "missed":
    finding["failures"] = ["2 where 1 is the bar"]
if name == "slow":
    pathlib.Path(found).write_text(json.dumps(finding))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path(folder, "grandchild").write_text(str(child.pid))
    time.sleep(60)
pathlib.Path(found).write_text(json.dumps(finding))
"""


def part(name: str, limit: float = 30.0, on_cpu: bool = True) -> Part:
    return Part(name, f"Part {name}", limit, lambda dry, folder: Finding(""), on_cpu)


def check(tmp_path: Path, parts: list[Part], total: float = 60.0) -> tuple[Check, list[Result]]:
    one = Check(parts, [sys.executable, "-c", CHILD], tmp_path / "page.md", dry=False, total=total)
    one.about = "a made-up device"
    return one, one.run(gpu=False, say=lambda _: None)


def test_parts_that_fail_or_are_cut_do_not_stop_the_others_and_the_page_tells_of_each(
    tmp_path: Path,
) -> None:
    names = ["good", "broken", "missed", "elsewhere", "slow", "last"]
    parts = [part(name, 3.0 if name == "slow" else 30.0, on_cpu=name != "elsewhere") for name in names]
    _, results = check(tmp_path, parts)
    assert [result.name for result in results] == names
    assert [result.state for result in results] == [OK, FAILED, FAILED, SKIPPED, "cut after 3 s", OK]
    assert [result.reason for result in results[1:4]] == [
        "reason in its own words", "2 where 1 is the bar", "needs a CUDA device",
    ]  # fmt: skip
    assert failed(results) and not failed([results[0], results[3]])
    page = (tmp_path / "page.md").read_text()
    for result in results:
        assert f"| {result.title} | {result.state} |" in page
    assert "## Of slow" in page and "| 1 | x/y |" in page  # what a part had found before it was cut
    content = json.loads((tmp_path / "page.json").read_text())
    assert content["about"] == "a made-up device" and [one["state"] for one in content["parts"]][4] == "cut after 3 s"
    assert "reason in its own words" in (tmp_path / "page.logs" / "broken" / "log.txt").read_text()


def test_a_part_that_is_cut_takes_along_what_it_started(tmp_path: Path) -> None:
    check(tmp_path, [part("slow", 3.0)])
    grandchild = int((tmp_path / "page.logs" / "slow" / "grandchild").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{grandchild}/stat").is_file() and time.monotonic() < deadline:
        if Path(f"/proc/{grandchild}/stat").read_text().split()[2] == "Z":  # dead, and nobody has asked yet
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{grandchild}").exists()


def test_no_part_begins_when_the_time_is_up_and_none_takes_more_than_is_left(tmp_path: Path) -> None:
    _, results = check(tmp_path, [part("slow", 30.0), part("good")], total=1.0)
    assert results[0].state == "cut after 1 s"
    assert (results[1].state, results[1].reason) == (SKIPPED, "no time was left")


def test_ctrl_c_ends_the_part_and_leaves_what_there_is(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from leap_dist.benchmarking.device_check import *\n"
        f"child, names = {CHILD!r}, ['good', 'slow', 'last']\n"
        "parts = [Part(name, name, 30.0, None) for name in names]\n"
        "check = Check(parts, [sys.executable, '-c', child], Path(sys.argv[1]), dry=False, total=60)\n"
        "check.run(gpu=False)\n"
    )
    page = tmp_path / "page.md"
    ours = subprocess.Popen([sys.executable, "-c", script, str(page)], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "page.logs" / "slow" / "grandchild").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        ours.send_signal(signal.SIGINT)
        assert ours.wait(30) == 0
    finally:
        end_group(ours)
    states = [(one["state"], one["reason"]) for one in json.loads(page.with_suffix(".json").read_text())["parts"]]
    assert states == [(OK, ""), (FAILED, "interrupted"), (SKIPPED, "interrupted before it")]


def test_scores_are_apart_where_they_differ_and_where_a_step_is_missing() -> None:
    assert apart({0: 0.5, 1: 0.25}, {0: 0.5, 1: 0.75}) == 0.5
    assert apart({0: 0.5}, {0: 0.5, 1: 0.75}) == apart({}, {}) == float("inf")


def test_time_that_overlaps_counts_once() -> None:
    assert covered([(5, 7), (0, 2), (1, 3), (1.5, 1.75)]) == 5
    assert covered([]) == 0
