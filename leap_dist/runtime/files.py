"""Files that are either whole or not there, also after a loss of power; what a disk refuses, in words; and locks."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, Optional

from leap_dist.errors import UserError

PROBE_BYTES = 1 << 20
SCRATCH = ".leap-scratch-"
MOST_JSON_BYTES = 64 << 20  # the index of 8 TB of shards
# What a disk answers where it takes no more, or nothing at all.
REFUSALS = {
    errno.ENOSPC: "No space left: the disk of {folder} is full, {free} are free; make room and start again",
    errno.EDQUOT: "No space left: a quota on the disk of {folder} is used up, {free} of the disk are free; make room "
    "and start again",
    errno.EFBIG: "{folder}: a file would grow beyond what this process may write (ulimit -f); {free} are free",
    errno.EROFS: "{folder}: its disk is read-only; {free} are free",
    errno.EACCES: "{folder}: this user may not write there; {free} are free",
    errno.EPERM: "{folder}: this user may not write there; {free} are free",
}
# Libraries also tell these by the system's words alone.
IN_WORDS = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EROFS: "read-only file system"}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that has none


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a kill leaves the old file or the new one.

    The umask decides who may read it, whatever `write` would have: safetensors' own files are their owner's alone.

    Raises:
        UserError: the disk refuses it, see `refusal`; or `path` is a folder or a device.
    """
    require_replaceable(path)
    with writing(path.parent):
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


def require_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of what is none: a rename onto /dev/null, as root, takes the device away.

    Raises:
        UserError: there is a folder, a device or a pipe at `path`.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: there is {'a folder' if path.is_dir() else 'no regular file'}; name a file")


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Give an empty folder in the folder `beside`, and remove it afterwards, with those that killed processes left.

    Raises:
        UserError: the disk refuses what the block writes, see `refusal`.
    """
    with writing(beside):
        beside.mkdir(parents=True, exist_ok=True)
        for left in beside.glob(f"{SCRATCH}*"):
            if (held := _held(left)) is not None:  # nobody's any more
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)
        folder = Path(tempfile.mkdtemp(dir=beside, prefix=SCRATCH))
        held = _held(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if held is not None:
                os.close(held)


def _held(folder: Path) -> Optional[int]:
    """A descriptor that locks the folder until it is closed; None where somebody has it, or nobody can tell."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def take_place(new: Path, at: Path) -> None:
    """Let the folder `new` take the place of `at`, on the same file system. What was there is called `new` then.

    A kill leaves the one or the other. Where the file system cannot exchange two names, as NFS, a kill may come between
    two steps.
    """
    if not at.exists():
        new.rename(at)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if exchange is not None and exchange(here, os.fsencode(new), here, os.fsencode(at), swap) == 0:
        return
    old = new.with_name(f"{new.name}.old")
    at.rename(old)
    new.rename(at)
    old.rename(new)


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


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Write to `folder` in this block.

    Raises:
        UserError: the disk refuses it, see `refusal`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch and safetensors have their own for a full disk
        if words := refusal(error, folder):
            raise UserError(words) from error
        raise


def refusal(error: BaseException, folder: Path, probe: bool = True) -> str:
    """Why a write to `folder` failed, in a line with the folder and what is free; empty if the disk did not refuse it.

    An error that names its file counts for that file's folder: libraries also write elsewhere, to /tmp.
    probe: libraries say it in words of their own. torch's writer notices only that its file is not as long as it should
        be. So where the error does not tell, a few bytes are written.
    """
    code, place = _told(error)
    folder = folder if place is None else place
    if code is None and probe and not isinstance(error, UserError):
        code = _answer(folder)
    return "" if code is None else REFUSALS[code].format(folder=folder, free=free_space(folder))


def takes_no_more(error: BaseException) -> bool:
    """Whether an error tells that a disk is full or read-only, so that another attempt is of no use."""
    return _told(error)[0] in (*IN_WORDS, errno.EFBIG)


def free_space(folder: Path) -> str:
    """Of the disk that `folder` is or would be on, in words."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return f"{shutil.disk_usage(there).free / 2**20:.1f} MiB"


def _told(error: Optional[BaseException]) -> tuple[Optional[int], Optional[Path]]:
    """The disk's answer that an error, or one that led to it, tells; and the folder of the file that it names."""
    while error is not None:
        named = getattr(error, "errno", None)
        code = named if named in REFUSALS else _in_words(str(error).lower())
        if code is not None:
            file = getattr(error, "filename2", None) or getattr(error, "filename", None)
            is_path = isinstance(file, (str, os.PathLike)) and os.fspath(file)
            return code, Path(file).absolute().parent if is_path else None
        error = error.__cause__ or error.__context__
    return None, None


def _in_words(text: str) -> Optional[int]:
    return next((code for code, words in IN_WORDS.items() if words in text), None)


def _answer(folder: Path) -> Optional[int]:
    """What the disk of `folder` says to a few bytes; None if it takes them."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno if error.errno in REFUSALS else None
    return None


def open_regular(path: Path) -> BinaryIO:
    """A regular file, unbuffered, to be read: a pipe would wait for ever, and /dev/zero has no end.

    Raises:
        OSError: it cannot be opened, or is none.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without waiting for a pipe's writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return open(descriptor, "rb", buffering=0)


def read_regular(path: Path, most: Optional[int] = None) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: as `open_regular`, or it has more than `most` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"has {size} bytes, at most {most} are read", str(path))
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
            if is_at(file, path):
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


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file is the one that lies at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
