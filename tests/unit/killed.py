"""A kill before each file operation of some work in turn, in forked children."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KILLED = 137
# What reads only, or is told twice.
PASSED_OVER = ("os.listdir", "os.scandir", "shutil.", "tempfile.", "glob.", "ctypes.dlopen", "import")


def killed_everywhere(work: Callable[[], Any], folder: Path) -> Iterator[int]:
    """Run `work` again and again, killed before its 1st, 2nd, ... operation on a file below `folder` or on a library.

    Gives the number of each once its process is dead; ends when the work came to its end.
    """
    number = 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            _die_before(number, str(folder))
            try:
                work()
            except BaseException as error:
                os.write(2, f"{error!r}\n".encode())
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, KILLED), f"the work failed by itself, with {status}"
        if status == 0:
            return
        yield number


def _die_before(number: int, folder: str) -> None:
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        named = any(isinstance(part, (str, os.PathLike)) and os.fspath(part).startswith(folder) for part in arguments)
        if (named or event == "ctypes.dlsym") and not event.startswith(PASSED_OVER):
            left -= 1
            if left == 0:
                os._exit(KILLED)  # no clean-up, as by SIGKILL

    sys.addaudithook(hook)
