"""What a run says on stderr besides its bar: log lines, and the one line in which it ends."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import select
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leap_dist.errors import UserError, one_line

WORD_OF_RANK_0_S = 5.0
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class Outlet:
    """Standard error for what a run can do without: where nobody reads it any more, it raises nothing."""

    def write(self, text: str) -> int:
        with _losses_forgiven():
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with _losses_forgiven():
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


STDERR = Outlet()


@contextlib.contextmanager
def _losses_forgiven() -> Iterator[None]:
    try:
        yield
    except OSError:  # EIO of a closed terminal, EPIPE of a reader that has left
        forget_lost_output()


def forget_lost_output() -> None:
    """Let standard output and error lead nowhere where their terminal is closed or their reader has left.

    Any later write would raise, a library's too, and Python's own at its end. May be called from a signal's handler.
    """
    for descriptor in (1, 2):
        watch = select.poll()
        watch.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def report_to_stderr(level: int) -> None:
    """Show what leap_dist's modules log, and nobody else's."""
    handler = logging.StreamHandler(STDERR)
    handler.setFormatter(_Lines("leap_dist: %(message)s"))
    logger = logging.getLogger("leap_dist")
    logger.addHandler(handler)
    logger.setLevel(level)


class _Lines(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def complain(message: str, error: BaseException | None = None) -> None:
    """One line on stderr that says which rank speaks, with what was noted on the error."""
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", []))
    # One write: what ranks print in pieces can end up in one line.
    STDERR.write(f"leap_dist [rank {os.environ.get('RANK', '0')}]: error: {one_line(message + notes)}\n")
    STDERR.flush()


def leave_the_word_to_rank_0() -> None:
    """Wait, on another rank: what is wrong with the config is so on all of them, and once rank 0 has said it and left,
    the launcher ends the others. A rank that is still there after that has a mistake of its own to tell.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(WORD_OF_RANK_0_S)


def say_stopped(step: int, launched: bool) -> None:
    """The last line of a run that was told to stop. Launchers end with a traceback of their own at Ctrl-C."""
    after = "; a KeyboardInterrupt or SignalException after this line is the launcher's own" if launched else ""
    STDERR.write(f"leap_dist: stopped at step {step}, all is saved; continue with resume=auto{after}\n")


def give_up(fault: str) -> None:
    """Another rank is gone, and this one waits for it in a collective that nothing else can end."""
    complain(fault)
    os._exit(1)


def failed(error: Exception) -> int:
    """Say why the run failed; return the exit status: 2 a user's mistake, in one line; 1 a bug or a lost rank."""
    if isinstance(error, UserError):
        complain(str(error), error)
        return 2
    from leap_dist.runtime.files import refusal

    refused = refusal(error, Path.cwd(), probe=False)  # by an error that names no file: here, if anywhere
    if words := refused or no_descriptors(error) or _lost_worker(error):
        complain(words, error)
        return 2
    # torch: seconds that a mistyped key must not take
    from leap_dist.runtime.distributed import hint_of_communication, is_lost_peer

    words = " ".join(str(error).partition("Exception raised from")[0].split())  # torch adds its C++ frames
    if is_lost_peer(error):  # the rank that failed says why; this one only says what it noticed
        complain(f"another rank is gone, and says itself why if it could; here: {words}", error)
    elif hint := hint_of_communication(error):
        complain(f"ranks cannot communicate ({hint}); here: {words}", error)
    else:
        traceback.print_exception(error, file=STDERR)
        complain(f"{type(error).__name__}, see above", error)
    return 1


def is_lost_worker(error: BaseException) -> bool:
    """Whether a loader worker was killed. torch raises that in whatever the main thread is doing then."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def _lost_worker(error: Exception) -> str:
    if not is_lost_worker(error):
        return ""
    return f"data.workers: a loader worker was killed, perhaps for want of memory: try fewer of them ({error})"


def no_descriptors(error: BaseException) -> str:
    """Words for an error that says that no more files can be opened; empty for any other."""
    if getattr(error, "errno", None) not in NO_DESCRIPTORS and "Too many open files" not in str(error):
        return ""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"too many open files: this process may have {most}; raise that with ulimit -n, or set fewer data.workers"
