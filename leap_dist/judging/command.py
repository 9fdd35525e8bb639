"""What a tool that runs on several ranks says, and how it ends."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from leap_dist.errors import UserError, one_line


def say(tool: str, message: str) -> None:
    """One line on stderr that says which rank speaks."""
    print(f"{tool} [rank {os.environ.get('RANK', '0')}]: {one_line(message)}", file=sys.stderr, flush=True)


def status_of(tool: str, work: Callable[[], None]) -> int:
    """Do the work. Exit status: 0 done; 2 a user's mistake, one line; 1 a bug."""
    try:
        work()
    except UserError as error:
        say(tool, f"error: {error}")
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def leave(status: int) -> None:
    """Go at once where it failed: others may be waiting in a collective, and their launcher for this rank."""
    if status:
        sys.stdout.flush()
        os._exit(status)
