"""A run that fails says so in one line, whatever it died of."""

from __future__ import annotations

import errno

import pytest

from leap_dist.errors import LONGEST, UserError, one_line
from leap_dist.runtime.reporting import failed


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a loader worker was killed"),
        (OSError(errno.EMFILE, "Too many open files", "/data/shard"), "raise that with ulimit -n"),
        (RuntimeError("unable to open shared memory object: Too many open files (24)"), "raise that with ulimit -n"),
        (UserError("a\nb\x1b[31m" + "x" * 10**6), "a b"),
    ],
)
def test_it_is_one_line_and_status_2(error: Exception, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(error) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and "\x1b" not in said and len(said) < LONGEST + 200


def test_a_short_line_stays_as_it_is() -> None:
    assert one_line("checkpoint a b: é") == "checkpoint a b: é"
