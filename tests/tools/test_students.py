"""Every architecture of timm as a student: it trains, or is refused in one line for a reason that is true of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import students
import timm

from leap_dist.benchmarking.architectures import BEGIN, END, Verdict, architectures, page_with, try_out
from leap_dist.errors import UserError

SHARES = 24  # of more than six hundred, which take an hour


@pytest.fixture(scope="module")
def names() -> list[str]:
    found = list(architectures(30e6))
    assert len(found) > 600
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", range(SHARES))
def test_architectures_below_30_million_parameters_train_or_are_refused_in_a_line(names: list[str], share: int) -> None:
    for name in names[share::SHARES]:
        verdict = try_out(name)  # which asserts gradients, and equal tokens of student, export and plain timm
        assert "\n" not in verdict.refusal
        if verdict.refusal:
            assert "has no spatial map" in verdict.refusal, verdict


@pytest.mark.seconds
def test_the_tool_writes_the_list_and_tries_nothing_twice(tmp_path: Path) -> None:
    record, page = tmp_path / "tried.jsonl", tmp_path / "page.md"
    page.write_text(f"# Title\n{BEGIN}\nold\n{END}\nrest\n")
    earlier = Verdict("some_net", "SomeNet", 1.0, refusal="student.model=some_net: has no spatial map")
    record.write_text(json.dumps(earlier.__dict__) + "\n")
    assert students.main(["test_resnet", "some_net", "--record", str(record), "--write", str(page)]) == 0
    assert [json.loads(line)["name"] for line in record.read_text().splitlines()] == ["some_net", "test_resnet"]
    text = page.read_text()
    assert "old" not in text and text.startswith("# Title\n") and text.endswith("rest\n")
    assert "| ResNet | pooled | `test_resnet` 64 |" in text and "| `some_net` | student.model=some_net: has no" in text
    assert "Tried with timm" in text and "2. Trained: 1. Refused: 1." in text


def test_a_page_without_the_place_is_refused() -> None:
    with pytest.raises(UserError, match="has no lines"):
        page_with("# Title\n", [])


def test_the_pages_list_names_architectures_that_there_are() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "students.md").read_text()
    listed = page.partition(BEGIN)[2].partition(END)[0]
    names = [line.split("`")[1::2] for line in listed.splitlines() if line.startswith("| ")]
    names = [name for group in names for name in group]
    assert len(names) > 100 and len(set(names)) == len(names)
    assert all(timm.is_model(name) for name in names)
