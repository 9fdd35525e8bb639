"""Write MDS shards, and check that a folder of them is whole before anything is built on it."""

from __future__ import annotations

import os
import shutil
import uuid
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

from leap_dist.data.index import INDEX, Files, key_of_name, read_index
from leap_dist.errors import UserError
from leap_dist.runtime.files import writing

COLUMNS = {"image": "bytes", "label": "int"}
HASH = "xxh64"
CHECKERS = 8  # files at a time: a network file system gives little to one reader


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `out` if the block succeeds, and is removed if not.

    UserError if `out` exists and is not empty, or the disk refuses what the block writes.
    """
    out = out.absolute()  # "." has no name to derive one from
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty: name a new folder")
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    try:
        with writing(out.parent):
            part.mkdir(parents=True)
            yield part
            os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_shards(samples: Iterable[tuple[bytes, int]], out: Path) -> None:
    """Write (encoded image, label) pairs as MDS shards to the folder `out`, which appears only when it is complete.

    UserError if `out` exists and is not empty. Shards of 64 MiB, their xxh64 in the index.
    """
    from streaming import MDSWriter  # 3 s to import

    with (
        complete_or_absent(Path(out)) as part,
        MDSWriter(out=str(part), columns=COLUMNS, hashes=[HASH]) as writer,
    ):
        for image, label in samples:
            writer.write({"image": image, "label": label})


def check_shards(folder: Path, validate_hash: Optional[str] = None) -> int:
    """Compare every shard's file with the index, sizes always, contents if `validate_hash` names a hash of the index.

    Folders are listed once each: no shard is opened for its size. Returns the number of samples; UserError at the first
    fault. Streaming itself checks neither: a missing or cut shard ends its epoch early without an exception, and it
    never hashes an uncompressed local shard.
    """
    folder = Path(folder)
    index = read_index(folder, validate_hash)
    found = listed(folder, index.parents)
    # Compressed shards are unpacked beside their archive, so the archive must be there and the rest may be.
    there = [_check_sizes(folder, index.raw, found, ~index.compressed)]
    if index.packed is not None:
        there.append(_check_sizes(folder, index.packed, found, index.compressed))
    if validate_hash:
        index.require_hash(validate_hash, str(folder))
        for files, present in zip((index.raw, index.packed), there, strict=False):
            _check_hashes(folder, files, present, validate_hash)
    return int(index.samples.sum())


class Listing(NamedTuple):
    """Regular files of some folders, by their keys (see `index.key_of_name`), which rise. keys: (N,) uint64; sizes:
    (N,) int64, bytes.
    """

    keys: NDArray[np.uint64]
    sizes: NDArray[np.int64]

    def sizes_of(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(M,) int64: the size of each file, -1 where it is not there."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.sizes[at], -1)


def listed(folder: Path, parents: Iterable[str]) -> Listing:
    """What lies in these folders below `folder`."""
    keys, sizes = array("Q"), array("q")
    for name, about in files_in(folder, parents):
        keys.append(key_of_name(name))
        sizes.append(about.st_size)
    order = np.argsort(np.frombuffer(keys, np.uint64))
    return Listing(np.frombuffer(keys, np.uint64)[order], np.frombuffer(sizes, np.int64)[order])


def files_in(folder: Path, parents: Iterable[str]) -> Iterator[tuple[bytes, os.stat_result]]:
    """The regular files in these folders below `folder`, with their names in an index. UserError if one is closed."""
    for parent in sorted(parents):
        before = os.fsencode(f"{parent}/") if parent else b""
        try:
            with os.scandir(os.fsencode(folder / parent)) as entries:
                for entry in entries:
                    try:
                        if entry.is_file():
                            yield before + entry.name, entry.stat()
                    except FileNotFoundError:  # evicted at this moment
                        continue
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{folder / parent}: cannot be listed ({error.strerror})") from None


def _check_sizes(folder: Path, files: Files, found: Listing, needed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of the files are there. UserError if one that is needed is not, or one that is there has another size."""
    sizes = found.sizes_of(files.keys)
    wrong = (needed & (sizes < 0)) | ((sizes >= 0) & (sizes != files.sizes))
    if wrong.any():
        number = int(wrong.argmax())
        path = folder / files.names[number]
        if sizes[number] < 0:
            what = "no regular file" if os.path.lexists(path) else "missing"
            raise UserError(f"{path} is {what}, though {INDEX} lists it")
        raise UserError(
            f"{path} has {sizes[number]} bytes where {INDEX} says {files.sizes[number]}: cut or overwritten"
        )
    return sizes >= 0


def _check_hashes(folder: Path, files: Files, present: NDArray[np.bool_], name: str) -> None:
    def check(number: int) -> None:
        _check_hash(folder / files.names[number], files.hashes[number], name)

    with ThreadPoolExecutor(CHECKERS) as pool:
        known = present & (
            np.diff(files.hashes.ends, prepend=0) > 0
        )  # what is unpacked beside its archive may have none
        list(pool.map(check, np.flatnonzero(known).tolist()))  # the first fault is raised


def _check_hash(path: Path, expected: str, name: str) -> None:
    from streaming.base.hashing import get_hash  # 3 s to import

    if get_hash(name, path.read_bytes()) != expected:
        raise UserError(f"{path} is corrupt: its {name} differs from the one in {INDEX}")
