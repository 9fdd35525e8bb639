"""Nothing of a file is believed before it is known to be what was written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import pytest
import xxhash

from leap_dist.errors import UserError
from leap_dist.runtime.integrity import (
    Damaged,
    check_named,
    check_recorded,
    mark_of,
    named_files,
    read_sealed,
    write_recorded,
    write_sealed,
)
from leap_dist.runtime.schema import misfit


@dataclass(frozen=True)
class Shape:
    step: int
    name: str = ""
    rate: Optional[float] = None
    sizes: list[int] = field(default_factory=list)
    marks: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"step": 3, "name": "a", "rate": 1, "sizes": [1], "marks": {"a": "b"}, "newer": [1]}, None),
        ({"step": 3, "rate": None}, None),
        ({}, "step is missing"),
        ([1], "a table is expected"),
        ({"step": "3"}, "step: a whole number is expected, not '3'"),
        ({"step": True}, "step: a whole number is expected, not True"),
        ({"step": 10**400}, "step: a whole number"),
        ({"step": 3, "rate": float("nan")}, "rate: a number is expected, not nan"),
        ({"step": 3, "rate": "x" * 10**6}, "rate: a number is expected, not 'xxx"),
        ({"step": 3, "sizes": [1, [2]]}, "sizes: 1: a whole number is expected"),
        ({"step": 3, "marks": ["a"]}, "marks: a table is expected"),
        ({"step": 3, "marks": {"a": None}}, "marks: 'a': a text is expected, not None"),
    ],
)
def test_a_misfit_is_told_in_a_few_words(value: Any, words: Optional[str]) -> None:
    told = misfit(value, Shape)
    assert told == words if words is None else words in told and len(told) < 200 and "\n" not in told


def test_every_single_bit_of_a_sealed_json_is_seen_or_says_the_same(tmp_path: Path) -> None:
    path, content = tmp_path / "run.json", {"step": 7, "rate": 0.1, "files": {"a.pt": {"bytes": 3}}, "teacher": "ä"}
    write_sealed(path, content)
    whole = path.read_bytes()
    assert read_sealed(path) == (content, "")
    seen = 0
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            found, fault = read_sealed(path, marked="files")
            assert fault or found == content, (at, bit)
            seen += bool(fault)
    assert seen > 7 * len(whole)
    for size in range(len(whole) - 2):
        path.write_bytes(whole[:size])
        assert read_sealed(path)[1]


def test_a_mark_is_what_other_tools_print(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 5000)
    mark = mark_of(tmp_path / "a")
    assert (mark.bytes, mark.xxh128) == (1_280_000, xxhash.xxh128_hexdigest(bytes(range(256)) * 5000))


def test_a_kill_while_a_file_is_replaced_leaves_one_that_its_record_knows(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    write_recorded(path, lambda partial: partial.write_bytes(b"first"), {"step": 1})

    def killed(partial: Path) -> None:
        partial.write_bytes(b"second")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_recorded(path, killed, {"step": 2})
    assert check_recorded(path)["step"] == 1
    between = []
    write_recorded(
        path, lambda partial: (partial.write_bytes(b"third"), between.append(check_recorded(path)["step"])), {"step": 3}
    )
    assert between == [1] and check_recorded(path)["step"] == 3
    path.write_bytes(b"first")  # a copy of long ago
    with pytest.raises(Damaged, match=r"student\.safetensors is damaged") as told:
        check_recorded(path)
    assert "put a whole copy back" in str(told.value)


def test_while_a_file_is_replaced_its_record_knows_the_old_one_and_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader between the two renames, or a kill there."""
    path = tmp_path / "checkpoint.pt"
    write_recorded(path, lambda partial: partial.write_bytes(b"first"), {"step": 1})
    seen = []
    replace = __import__("os").replace

    def watched(source: Path, target: Path) -> None:
        seen.append(check_recorded(path)["step"])
        replace(source, target)
        seen.append(check_recorded(path)["step"])

    monkeypatch.setattr("leap_dist.runtime.files.os.replace", watched)
    write_recorded(path, lambda partial: partial.write_bytes(b"second"), {"step": 2})
    assert seen == [1, 2, 2, 2, 2, 2], "record, file, record: sound before and after each"


def test_a_file_that_a_sealed_json_names_is_compared_with_it(tmp_path: Path) -> None:
    ledger, summary = tmp_path / "curriculum.jsonl", tmp_path / "summary.json"
    ledger.write_text('{"step":0}\n')
    check_named(ledger, summary)  # not finished yet
    write_sealed(summary, {"steps": 1} | named_files(tmp_path, "curriculum.jsonl", "evaluation.jsonl"))
    check_named(ledger, summary)
    ledger.write_text('{"step":1}\n')
    with pytest.raises(UserError, match=r"curriculum.jsonl is damaged: .* \(says summary.json\)"):
        check_named(ledger, summary)
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"steps": 2}))
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        check_named(ledger, summary)
