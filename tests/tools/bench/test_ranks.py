"""What the table of ranks says that is arithmetic."""

from __future__ import annotations

import pytest

from tools.bench import ranks


def test_bytes_are_those_of_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks.main(["--ranks", "16", "--samples", "64000", "--student", "24", "--teacher", "40"]) == 0
    titles, row = capsys.readouterr().out.splitlines()[1:]
    assert [title for title in ranks.TITLES if title in titles] == list(ranks.TITLES)
    cells = row.split()
    means = 16 * (1 + 24 + 40)
    assert cells[:2] == ["16", "64,000"]
    assert cells[7:] == [f"{4 * (means + 24**2 + 40 * 24 + 40**2) / 1e6:.1f}", f"{4 * means / 1e6:.2f}", "2.6"]


def test_ranks_come_in_nodes_of_eight(capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks.main(["--ranks", "12"]) == 2
    assert "in eights" in capsys.readouterr().err
