"""Files that are either whole or not there, also after a loss of power; and locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that has none


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a kill leaves the old file or the new one.

    The umask decides who may read it, whatever `write` would have: safetensors' own files are their owner's alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Wait until all that this node has written to the folder's file system is on the disk (or the file server).

    Raises:
        OSError: the disk refuses some of it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if library.syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` whole."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write `content` whole, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def lock(path: Path, patience: float, mode: str = "w") -> IO[Any]:
    """Lock `path`, opened in `mode`, against others until what is returned is closed, here and in children born since.

    Where the file system has no locks there is none.

    Raises:
        BlockingIOError: somebody else has it, and keeps it for `patience` seconds.
    """
    file = path.open(mode)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise
            time.sleep(0.1)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            file.close()
            raise
