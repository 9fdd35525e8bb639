"""What a run says on stderr besides its bar: log lines, and the one line in which it ends."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback

from leap_dist.errors import UserError

WORD_OF_RANK_0_S = 5.0


def report_to_stderr(level: int) -> None:
    """Show what leap_dist's modules log, and nobody else's."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("leap_dist: %(message)s"))
    logger = logging.getLogger("leap_dist")
    logger.addHandler(handler)
    logger.setLevel(level)


def complain(message: str, error: BaseException | None = None) -> None:
    """One line on stderr that says which rank speaks, with what was noted on the error."""
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", []))
    # One write: what ranks print in pieces can end up in one line.
    sys.stderr.write(f"leap_dist [rank {os.environ.get('RANK', '0')}]: error: {message}{notes}\n")
    sys.stderr.flush()


def leave_the_word_to_rank_0() -> None:
    """Wait, on another rank: what is wrong with the config is so on all of them, and once rank 0 has said it and left,
    the launcher ends the others. A rank that is still there after that has a mistake of its own to tell.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(WORD_OF_RANK_0_S)


def give_up(fault: str) -> None:
    """Another rank is gone, and this one waits for it in a collective that nothing else can end."""
    complain(fault)
    os._exit(1)


def failed(error: Exception) -> int:
    """Say why the run failed; return the exit status: 2 a user's mistake, in one line; 1 a bug or a lost rank."""
    if isinstance(error, UserError):
        complain(str(error), error)
        return 2
    from leap_dist.runtime.distributed import is_lost_peer  # torch: seconds that a mistyped key must not take

    if is_lost_peer(error):  # the rank that failed says why; this one only says what it noticed
        words = " ".join(str(error).partition("Exception raised from")[0].split())  # torch adds its C++ frames
        complain(f"another rank is gone, and says itself why if it could; here: {words}", error)
    else:
        traceback.print_exception(error)
        complain(f"{type(error).__name__}, see above", error)
    return 1
