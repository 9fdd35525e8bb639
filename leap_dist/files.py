"""Files that are either whole or not there, also after a loss of power."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
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
    write_whole(path, lambda partial: partial.write_text(text))


def write_json(path: Path, content: Any) -> None:
    """Write `content` whole, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")
