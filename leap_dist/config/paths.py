"""Whether paths of a config can be what they are to be, before anything is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

LONGEST_PATH, LONGEST_NAME = 4000, 200  # bytes; Linux takes 4095 and 255, and files in a folder have names of their own


def nameless(path: str) -> Optional[str]:
    """Why no file can have this name; None if one can."""
    if not path.strip():
        return "is empty"
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        return "holds a control character"
    name = max((len(os.fsencode(part)) for part in Path(path).parts), default=0)
    if len(os.fsencode(path)) > LONGEST_PATH or name > LONGEST_NAME:
        return f"is longer than a file system takes ({LONGEST_PATH} bytes, {LONGEST_NAME} between two slashes)"
    return None


def no_folder_to_write(path: str) -> Optional[str]:
    """Why `path` is no folder to write to, nor can become one; None if it is or can."""
    if fault := nameless(path):
        return fault
    folder = Path(path).absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        return "is a file, and a folder is needed" if there == folder else f"{there} is a file, not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} may not be written"
    return None


def no_file_to_read(path: str) -> Optional[str]:
    """Why `path` is no file to read; None if it is one."""
    if fault := nameless(path):
        return fault
    file = Path(path)
    if not file.exists():
        return "no such file"
    if not file.is_file():
        return "is a folder, and a file is needed" if file.is_dir() else "no such file, but a device or a pipe"
    if not file.stat().st_size:
        return "is empty"
    return None if os.access(file, os.R_OK) else "may not be read"


def short(path: str) -> str:
    """For a line: control characters spelled out, and no more of it than tells which it is."""
    shown = path if path.isprintable() else ascii(path)
    return shown if len(shown) <= 300 else f"{shown[:300]}..."
