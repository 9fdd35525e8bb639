"""Files that are either whole or not there, also after a loss of power; and locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Optional

PROBE_BYTES = 1 << 20
MOST_JSON_BYTES = 64 << 20  # the index of 8 TB of shards
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
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


def disk_full(error: BaseException, folder: Path) -> str:
    """Words for a write that failed in `folder` because there is no room; empty if there is.

    Libraries say it in words of their own: torch's writer notices only that its file is not as long as it should be. So
    where the error does not tell, a few bytes are written.
    """
    told = getattr(error, "errno", None) in NO_ROOM or "No space left" in str(error)
    if not told and not _refuses_bytes(folder):
        return ""
    free = shutil.disk_usage(folder).free / 2**20
    return f"No space left: the disk of {folder} is full, {free:.1f} MiB are free, or a quota is; make room and resume"


def _refuses_bytes(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in NO_ROOM
    return False


def read_regular(path: Path, most: Optional[int] = None) -> bytes:
    """All bytes of a regular file: a pipe would wait for ever, and /dev/zero has no end.

    Raises:
        OSError: it cannot be read, it is none, or it has more than `most` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without waiting for a pipe's writer
    with open(descriptor, "rb", buffering=0) as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        if most is not None and about.st_size > most:
            raise OSError(errno.EFBIG, f"has {about.st_size} bytes, at most {most} are read", str(path))
        return file.read() if most is None else file.read(most)


def read_json(path: Path) -> Any:
    """What a JSON file of a run, a set or an export holds.

    Raises:
        OSError: as `read_regular`; it may have 64 MiB.
        ValueError: it is no JSON, or is nested so deep that nobody has written it.
    """
    try:
        return json.loads(read_regular(path, MOST_JSON_BYTES))
    except RecursionError:
        raise ValueError("nested too deep") from None


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
        FileNotFoundError: its folder is not there, or not any more.
    """
    deadline = time.monotonic() + patience
    while True:
        file = path.open(mode)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
            file.close()  # its holder has removed it: a lock on what has no name holds nobody off
        except BlockingIOError:
            file.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            file.close()
            raise


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
