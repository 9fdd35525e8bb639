"""Hostile files: no code of theirs runs, nothing outside is touched, memory and time are bounded, a line says why.

A dozen in `make test`, all in `make test-slow`. The modules beside this make them.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

import hostile_images  # noqa: F401  # each adds its cases
import hostile_models  # noqa: F401
import hostile_shards  # noqa: F401
import hostile_sources  # noqa: F401
from contained import GROWTH_MIB, contained
from hostile import CANARY, CASES, Case, Evil

PRECIOUS = "precious"


def harm(case: Case, folder: Path) -> str:
    """What a case did that it should not have done; empty if nothing."""
    inside = folder / "case"
    inside.mkdir(parents=True)
    victim = folder / "victim.txt"
    victim.write_text(PRECIOUS)
    work = case.make(inside)
    refusal, grown = contained(work)
    if (folder / CANARY).exists():
        return "ran code"
    if victim.read_text() != PRECIOUS or {path.name for path in folder.iterdir()} != {"case", "victim.txt"}:
        return "touched what is not its own"
    if grown > GROWTH_MIB:
        return f"took {grown:.0f} MiB"
    if case.refused is None:
        return f"was refused: {refusal}" if refusal else ""
    return "" if re.search(case.refused, refusal) else f"was told as {refusal!r}"


def test_the_canary_shows_code_that_ran(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "case")))
    assert (tmp_path / CANARY).exists()


@pytest.mark.seconds
@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: case.name)
def test_a_hostile_file_does_no_harm(case: Case, tmp_path: Path) -> None:
    assert harm(case, tmp_path) == ""


@pytest.mark.slow
def test_no_hostile_file_does_harm(tmp_path: Path) -> None:
    harmed = {}
    for case in CASES:
        try:
            harmed[case.name] = harm(case, tmp_path / case.name)
        except Exception as error:  # the others are still to be tried
            harmed[case.name] = f"{type(error).__name__}: {error}"[:500]
    harmed = {name: what for name, what in harmed.items() if what}
    refused = sum(case.refused is not None for case in CASES)
    print(f"hostile files: {len(CASES)} tried, {refused} to refuse, {len(harmed)} did harm")
    assert not harmed and len(CASES) >= 40
