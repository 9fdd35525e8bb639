"""The page of a run says what its files say, whatever they say, and fetches nothing."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from leap_dist.errors import UserError
from leap_dist.report import write_comparison, write_report
from leap_dist.runtime.files import lock
from leap_dist.runtime.integrity import write_sealed
from made_run import CONFIG, DEPTH, STEPS, SUMMARY, Page, ledger, make_pictures, make_run, outside, write_lines

HOSTILE = """<script>alert(1)</script>"><img src=http://x.org/a.png onerror=alert(1)> {{ 7 * 7 }} $x^{ & 'q'"""


def test_every_figure_of_the_page_is_the_summarys(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "made")))
    accuracies = {key for key in SUMMARY if re.match(r"(student|student_ema|teacher)_(cls|patch|cls_patch)_", key)}
    others = {"teacher_flops_saved", "time_saved", "skip_efficiency", "final_block", "train_seconds", "images_per_s"}
    assert set(page.figures) == accuracies | others | {"student_teacher_cka"}
    for key, values in page.figures.items():
        assert set(values) == {SUMMARY[key]}, key
        if key in accuracies:
            assert set(page.shown[key]) == {f"{SUMMARY[key]:.1%}"}
    assert "saved 25.0% of the teacher's FLOPs and 12.5% of the time" in page.text
    assert "72.0% on both where its teacher has 92.0%" in page.text
    assert "climbed from block 1 to block 3 of the teacher's 4" in page.text and "1 min 20 s" in page.text
    assert f"3 of {DEPTH}" in page.text and f"{STEPS} steps" in page.text
    assert outside(page) == []


def test_advances_phases_and_flops_are_the_files(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "made")))
    for row in ("start 0 1 highest score before training", "9 0 1 → 2 threshold reached 0.762 18.0 s",
                "29 2 2 → 3 its epochs were over 0.762 58.0 s"):  # fmt: skip
        assert row in page.text
    assert "teacher the frozen teacher, up to the target block 30.0 s 37.5%" in page.text
    assert "other mixup, telemetry and Python 43.0 s 53.8%" in page.text
    assert "teacher up to the target block 3 TFLOP" in page.text
    assert "not run blocks of the teacher that were skipped 1 TFLOP" in page.text, "a quarter of what all would be"
    for told in ("abc123-dirty", "torch 2.11.0", "2 on 1 node", "leap_dist/train.py --config x", "a device",
                 "student.kwargs.embed_dim 96", "Every training sample could be read"):  # fmt: skip
        assert told in page.text
    titles = {attributes["aria-label"] for attributes in page.all("svg")}
    assert titles == {"Target block", "Score", "Saved so far", "Accuracy while it trains", "Loss and its terms",
                      "Learning rate", "Speed"}  # fmt: skip
    assert page.text.count("optimizer step") == 0, "the text of charts is theirs"


def test_the_page_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    made = re.compile(r"Made by leap_dist on [\d: -]+UTC")
    first, second = (made.sub("", write_report(folder).read_text()) for _ in range(2))
    assert first == second


def test_no_name_of_anybody_becomes_a_part_of_the_page(tmp_path: Path) -> None:
    """Names in config, ledger, history, lists, summary and folder, of the page itself and where runs are compared."""
    config = deepcopy(CONFIG)
    config["student"] = {"model": HOSTILE, "kwargs": {HOSTILE: HOSTILE}}
    config["data"]["train"] = HOSTILE
    summary = SUMMARY | {"retired": {"why": HOSTILE, "weights_of": 3, "step": 5}}
    folder = make_run(tmp_path / "<script>alert('x')<", config=config, summary=None)
    write_lines(folder / "curriculum.jsonl", [{**line, "reason": HOSTILE} for line in ledger()])
    history = [{"event": "start", "at": HOSTILE, "device": HOSTILE, "command": HOSTILE, "commit": HOSTILE}]
    history[0] |= {"versions": {HOSTILE: HOSTILE}}
    write_lines(folder / "history.jsonl", [*history, {"event": "warning", "at": "", "text": f"{HOSTILE} \ud800"}])
    write_lines(folder / "bad_samples.jsonl", [{"id": 1, "shard": HOSTILE, "reason": HOSTILE}])
    write_sealed(folder / "summary.json", summary)
    other = make_run(tmp_path / "other")
    write_comparison([folder, other], [HOSTILE, "$\\frac{"], tmp_path / "both.html")
    for path in (write_report(folder), tmp_path / "both.html"):
        page = Page(path)
        assert outside(page) == [] and page.all("img") == []
        assert " ".join(HOSTILE.split()) in page.text and "49" not in page.text.split()


CASES = {
    "running": (None, None, "is running, and was at step 40 of 40"),
    "stopped": ({"event": "stop", "at": "", "step": 20}, None, "A signal stopped it after 40 of 40 steps"),
    "failed": ({"event": "failure", "at": "", "step": 20, "text": "bad"}, None, "failed after 40 of 40 steps: bad"),
    "trained": ({"event": "end", "at": "", "step": 40}, None, "has no summary"),
    "not finished": (None, None, "did not end by itself; its last known step is 40 of 40"),
    "finished": ({"event": "end", "at": "", "step": 40}, SUMMARY, "saved 25.0%"),
    "retired": (None, SUMMARY | {"retired": {"step": 7, "why": "non-finite loss", "weights_of": None}},
                "This student failed: non-finite loss. It left no good weights."),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_first_sentence_says_how_the_run_stands(case: str, tmp_path: Path) -> None:
    last, summary, sentence = CASES[case]
    folder = make_run(tmp_path / "made", summary=summary)
    if last is not None:
        with (folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(last) + "\n")
    held = lock(folder / ".lock", 0) if case == "running" else None
    page = Page(write_report(folder))
    if held is not None:
        held.close()
    assert sentence in page.text
    assert f"made {'failed' if case == 'retired' else case}" in page.text


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("epochs: 3\n")
    page = Page(write_report(tmp_path))
    assert "not finished" in page.text and "epochs" in page.text and page.all("svg") == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "{}"),
        ("summary.json", '{"student_patch_knn": "<b>"}'),
        ("summary.json", '{"seconds_by_phase": {"data": "1"}}'),
        ("summary.json", '{"retired": {"weights_of": 1}}'),
        ("curriculum.jsonl", '{"step": "x"}\n'),
        ("curriculum.jsonl", "\0"),
        ("evaluation.jsonl", "[]\n"),
        ("evaluation.jsonl", '{"step": 1, "patch_knn": "x"}\n'),
        ("config.yaml", "a: [1"),
        ("config.yaml", "- 1"),
        ("bad_samples.jsonl", '{"id": 1}\n'),
        ("history.jsonl", "no JSON\n"),
        ("tensorboard/events.out.tfevents.9", "\xff" * 40),
        ("pictures/tokens.png", "x" * 500_000),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(name: str, content: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    page = Page(write_report(folder))
    silent = ("history.jsonl", "tensorboard/events.out.tfevents.9")  # logs, read as far as they go
    if name not in silent and content not in ("{}", "- 1"):
        assert "What could not be read" in page.text and Path(name).name in page.text
    assert "What happened" in page.text
    # Without a sound summary nobody knows whether the ledger is what was written.
    ledger_holds = name != "curriculum.jsonl" and (name, content) != ("summary.json", "{")
    assert ("threshold reached" in page.text) == ledger_holds


def test_odd_values_of_a_ledger_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made", summary=None)
    write_lines(folder / "curriculum.jsonl", [{**line, "ema": "high", "epoch": [1], "reason": 7} for line in ledger()])
    assert "9 - 1 → 2 7 - 18.0 s" in Page(write_report(folder)).text.replace("\N{EN DASH}", "-")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_the_last_and_four_on_the_way(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    make_pictures(folder, range(100, 1000, 100))
    page = Page(write_report(folder))
    assert len(page.all("img")) == 5 and all(
        image["src"].startswith("data:image/png;base64,") for image in page.all("img")
    )
    assert re.findall(r"step (\d+)", page.text.partition("tokens look like")[2])[:4] == ["100", "400", "600", "900"]


def test_a_long_run_gives_a_small_page_with_every_advance(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made", summary=None)
    advances = dict.fromkeys(range(400, 20_000, 500), "threshold")
    lines = ledger(20_000, advances)
    lines[0]["depth"] = 41
    write_lines(folder / "curriculum.jsonl", lines)
    path = write_report(folder)
    page = Page(path)
    assert len(advances) == 40 and page.text.count("threshold reached") == 40
    assert path.stat().st_size < 200_000
    stairs = path.read_text().partition('aria-label="Target block"')[2].partition("</svg>")[0]
    heights = {float(y) for y in re.findall(r"L [\d.]+ ([\d.]+)", max(re.findall(r'd="(M [^"z]*)"', stairs), key=len))}
    assert len(heights) >= 41, "a corner for each block"


@pytest.mark.slow
def test_half_a_million_decisions_give_a_page_below_three_megabytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made", summary=None)
    write_lines(folder / "curriculum.jsonl", ledger(500_000, dict.fromkeys(range(9_000, 30_000, 9_000), "threshold")))
    path = write_report(folder)
    assert path.stat().st_size < 3e6 and Page(path).text.count("threshold reached") == 3


def made_students(folder: Path) -> Path:
    config = CONFIG | {"students": {"patient": {"curriculum.threshold": 0.9}, "small": {}}}
    make_run(folder, config=config, summary=None)
    for name, threshold in (("patient", 0.9), ("small", 0.75)):
        own: dict[str, Any] = CONFIG | {"curriculum": {"threshold": threshold}}
        make_run(folder / name, config=own, summary=SUMMARY | {"shared_with": ["patient", "small"]})
        (folder / name / "history.jsonl").unlink()
    pass_of_all = {"seconds": 90.0, "flops": 5e12, "flops_alone": 8e12, "flops_saved": 0.375}
    write_sealed(folder / "cohort.json", pass_of_all | {"seconds_alone_estimate": 150.0})
    return folder


def test_students_of_one_run_have_a_page_each_and_one_for_all(tmp_path: Path) -> None:
    folder = made_students(tmp_path / "family")
    page = Page(write_report(folder))
    assert [link["href"] for link in page.all("a")] == ["patient/report.html", "small/report.html"]
    assert "5 TFLOP and 1 min 30 s" in page.text and "saved 37.5% of the FLOPs" in page.text
    assert "curriculum.threshold 0.9 0.75" in page.text
    own = Page(folder / "patient" / "report.html")
    assert "a device" in own.text, "its sessions are the run's"
    assert "which students shared" in own.text


def test_runs_are_compared_in_the_order_given(tmp_path: Path) -> None:
    folders = []
    for index, name in enumerate(("zeta", "alpha", "mid")):
        config = CONFIG | {"epochs": float(4 + index), "output": name}
        own = SUMMARY | {"student_patch_knn": 0.5 + 0.1 * (index == 1)}
        folders.append(make_run(tmp_path / name, config=config, summary=own))
    write_report(folders[0])
    out = tmp_path / "out" / "both.html"
    write_comparison(folders, ["zeta", "alpha", "mid"], out)
    page = Page(out)
    assert page.figures["student_patch_knn"] == [0.5, 0.6, 0.5]
    assert page.shown["student_patch_knn"] == ["50.00", "60.00", "50.00"]
    assert page.text.index("zeta") < page.text.index("alpha") < page.text.index("mid")
    assert [link["href"] for link in page.all("a")] == ["../zeta/report.html"], "only where there is a page"
    assert "epochs 4 5 6" in page.text and "output" not in page.text
    best = [attributes for attributes in page.all("td") if "best" in (attributes.get("class") or "").split()]
    assert [one["data-value"] for one in best if one["data-key"] == "student_patch_knn"] == ["0.6"]
    assert {attributes["aria-label"] for attributes in page.all("svg")} >= {"Target block", "Score", "Loss"}
