"""The shards of one set, read in place or fetched into a local folder: MosaicML Streaming's index, readers, downloads.

The one module that reads through `streaming` (3 s to import, so import this one late). Its `StreamingDataset` is not
used. That class coordinates a node's processes through shared memory under names that runs of one user contend for,
which a killed run leaves behind, and one failed shard ends its epoch early without an exception, or hangs it. Here
processes share nothing but the folder: a shard appears in it by renaming, under a lock that ends with its owner.
"""

from __future__ import annotations

import fcntl
import filecmp
import functools
import glob
import hashlib
import logging
import os
import queue
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional, TypeVar

import numpy as np
from numpy.typing import NDArray
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader
from streaming.base.util import bytes_to_int

from leap_dist.config import DataConfig, Source, is_remote
from leap_dist.data.classes import CLASSES, read_classes, translation
from leap_dist.data.columns import ShardReader
from leap_dist.data.index import INDEX, NotAnIndex, is_inside, read_index
from leap_dist.data.shards import check_shards, files_in, listed
from leap_dist.data.unpacking import unpack
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, on_first
from leap_dist.runtime.files import refusal, takes_no_more

_T = TypeVar("_T")
log = logging.getLogger(__name__)
STAGING, LOCKS = ".staging", ".locks"  # in the folder that shards are fetched into
OURS = os.O_NOFOLLOW | os.O_NONBLOCK  # to open a lock with, where a stranger may have left a link or a pipe
ROOM = ".room"  # the lock of what a cache has room for; no shard's name begins with a dot
INDEX_ATTEMPTS = 4  # to fetch the index, with pauses of 1, 2 and 4 s: somebody may be waiting to hear of a wrong name
ATTEMPTS = 7  # to fetch a shard, with pauses of 1, 2, 4 ... s: the network may be away for a minute
DOWNLOAD_TIMEOUT_S = 60.0
RETRY_AFTER_S = 300.0  # a shard that failed is left alone for so long; every process of the node would wait in turn
FETCHERS = 4  # downloads at a time in each worker
OPEN_SHARDS = 64  # files that a process keeps open of each set
READ_ATTEMPTS = 8  # a shard may be evicted between its arrival and the read


class FetchError(Exception):
    """A shard that could not be brought into the folder, now or a short while ago."""


class WrongSize(OSError):
    """A file that arrived with another size than the index says."""


def one_line(error: BaseException) -> str:
    """Type and message of `error`, without the addresses of objects."""
    return " ".join(re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}").split())


class ShardStore:
    """Random access to the samples of a set. Build it with `open_store`. Safe to use from forked workers.

    What is known of the shards lies in arrays, which workers share with the rank that forked them.

    size: samples; shard_sizes: (shards,) int64; fetches: whether shards may have to be fetched before they are read.
    """

    def __init__(self, source: str, config: DataConfig) -> None:
        self.source = source
        self.folder = _folder(source, config)
        self.index = read_index(self.folder, config.validate_hash)
        self.shard_sizes: NDArray[np.int64] = self.index.samples
        self.size = int(self.shard_sizes.sum())
        self._in_place = config.cache is None
        self.fetches = not self._in_place or self.index.packed is not None
        self._ends = self.shard_sizes.cumsum()
        self._validate_hash = config.validate_hash
        self._limit = bytes_to_int(config.cache_limit) if config.cache and config.cache_limit else None
        self._most_open = OPEN_SHARDS if self._limit is None else 1  # what is evicted gives its room back when closed
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()  # the one used last at the end
        # Built by the process that uses it: cloud clients do not survive a fork.
        self._downloader: Optional[CloudDownloader] = None
        self._wanted: Optional[queue.SimpleQueue[int]] = None

    def layout(self) -> str:
        """How the samples lie in shards, which the order of an epoch depends on: equal words, equal orders."""
        digest = hashlib.blake2s(self.shard_sizes.tobytes(), digest_size=4).hexdigest()
        return f"{self.size} samples in {len(self.index)} shards ({digest})"

    def contents(self) -> str:
        """What the index says of the samples themselves: a digest of every shard's size and hashes."""
        return self.index.contents

    def shards_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shards that hold these samples, each once."""
        return np.unique(np.searchsorted(self._ends, sample_ids, side="right"))

    def shard_name(self, sample_id: int) -> str:
        """File name of the shard that holds a sample."""
        return self.index.raw.names[self._shard_of(sample_id)]

    def read(self, sample_id: int) -> dict[str, Any]:
        """The columns of a sample; blocks while its shard is fetched, and raises anything if it cannot be read.

        UserError if the cache is too small for it to stay until then, or its disk is full.
        """
        shard_id = self._shard_of(sample_id)
        number = sample_id - int(self._ends[shard_id] - self.shard_sizes[shard_id])
        for _ in range(READ_ATTEMPTS):
            try:
                if self._limit is not None:
                    with _storing(self.folder):
                        os.utime(self._path(shard_id))  # what was read longest ago is evicted first
                return self._reader(shard_id).sample(number)
            except FileNotFoundError:
                self._fetch(shard_id)
        path = self._path(shard_id)
        raise UserError(f"data.cache_limit: too small, {path} is evicted again before it can be read")

    def _reader(self, shard_id: int) -> ShardReader:
        reader = self._readers.pop(shard_id, None)
        if reader is None:
            if len(self._readers) >= self._most_open:
                self._readers.popitem(last=False)[1].close()
            index = self.index
            reader = ShardReader(self._path(shard_id), index.columns_of(shard_id), int(index.raw.sizes[shard_id]))
        self._readers[shard_id] = reader
        return reader

    def fetch_ahead(self, shard_ids: Iterable[int]) -> None:
        """Fetch shards in the background. What fails here fails again, and is heard of, when it is read."""
        if not self.fetches:
            return
        if self._wanted is None:  # threads do not survive a fork either
            self._wanted = queue.SimpleQueue()
            for _ in range(FETCHERS):
                threading.Thread(target=self._keep_fetching, args=(self._wanted,), daemon=True).start()
        for shard_id in shard_ids:
            if not self._path(shard_id).exists():
                self._wanted.put(int(shard_id))

    def _keep_fetching(self, wanted: queue.SimpleQueue[int]) -> None:
        while True:
            with suppress(Exception):
                self._fetch(wanted.get())

    def _shard_of(self, sample_id: int) -> int:
        return int(np.searchsorted(self._ends, sample_id, side="right"))

    def _path(self, shard_id: int) -> Path:
        return self.folder / self.index.raw.names[shard_id]

    def _fetch(self, shard_id: int) -> None:
        """Bring a shard into the folder, unless another process has just done so.

        FetchError if it fails; UserError if the folder's disk is full, which no other attempt would mend.
        """
        name = self.index.raw.names[shard_id]
        target = self.folder / name
        if self._in_place and self.index.columns_of(shard_id).compression is None:
            raise FileNotFoundError(f"{target} is missing")
        with _storing(self.folder), _locked(self.folder, name) as note:
            if target.exists():
                return
            _raise_recent(note)
            try:
                self._keep(_persistently(lambda: self._download(shard_id), ATTEMPTS), target)
            except Exception as error:
                if takes_no_more(error):
                    raise
                os.pwrite(note, one_line(error).encode(), 0)
                raise FetchError(one_line(error)) from error

    def _download(self, shard_id: int) -> Path:
        """Download, check and unpack in the staging folder; call it under the shard's lock. Returns where it lies."""
        index, staging = self.index, self.folder / STAGING
        compression = index.columns_of(shard_id).compression
        files = index.raw if compression is None else index.packed
        raw, arrived = (staging / names[shard_id] for names in (index.raw.names, files.names))
        for path in {raw, arrived}:
            # Of an attempt that failed, which google's client would take for the file, or of a process that was killed:
            # amazon's writes under names of its own.
            for left in (path, *path.parent.glob(f"{glob.escape(path.name)}.*")):
                left.unlink(missing_ok=True)
        if self._downloader is None:
            self._downloader = CloudDownloader.get(self.source)
        name = files.names[shard_id]
        self._downloader.download(f"{self.source.rstrip('/')}/{name}", str(arrived), DOWNLOAD_TIMEOUT_S)
        _require_size(arrived, int(files.sizes[shard_id]))
        if self._validate_hash:
            _require_hash(arrived, self._validate_hash, files.hashes[shard_id])
        if compression is not None:
            raw.parent.mkdir(parents=True, exist_ok=True)
            unpack(arrived, raw, compression, int(index.raw.sizes[shard_id]))
            arrived.unlink()
        return raw

    def _keep(self, arrived: Path, target: Path) -> None:
        """Move a shard to its place, under one lock with its evictions: what others keep at the same moment counts."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder, ROOM):
            if self._limit is not None:
                self._evict(arrived.stat().st_size - self._limit)
            os.replace(arrived, target)

    def _evict(self, excess: int) -> None:
        """Remove what was read longest ago, until what stays and `excess` come to 0 bytes at most."""
        present = [(about.st_mtime_ns, about.st_size, name) for name, about in self._present()]
        excess += sum(size for _, size, _ in present)
        for _, size, name in sorted(present):
            if excess <= 0:
                break
            (self.folder / name).unlink(missing_ok=True)
            excess -= size

    def _present(self) -> Iterator[tuple[str, os.stat_result]]:
        """The shards in the folder: of what lies there, as far as the cache goes, all but two files are some."""
        for found, about in files_in(self.folder, self.index.parents):
            if is_inside(name := os.fsdecode(found)):
                yield name, about

    def tidy(self) -> None:
        """Drop what killed runs left in the cache: cut shards, and notes of shards that could not be fetched."""
        if not self._in_place:
            found = listed(self.folder, self.index.parents).sizes_of(self.index.raw.keys)
            for shard_id in np.flatnonzero((found >= 0) & (found != self.index.raw.sizes)):
                self._path(shard_id).unlink(missing_ok=True)
        if self.fetches:
            for name, about in files_in(self.folder / LOCKS, [""]):
                with suppress(OSError):  # gone meanwhile, or none of ours
                    if about.st_size:
                        os.close(os.open(self.folder / LOCKS / os.fsdecode(name), os.O_WRONLY | os.O_TRUNC | OURS))

    def check(self) -> None:
        """Raise UserError where the options do not go with the set."""
        if self._validate_hash:
            self.index.require_hash(self._validate_hash, self.source)
        if self.fetches:
            self._require_own_folders()
        if self._in_place and self.fetches and not os.access(self.folder, os.W_OK):
            raise UserError(
                f"{self.folder}: its shards are compressed, to be unpacked where nobody may write; set data.cache"
            )
        largest = self.index.largest()
        if self._limit is not None and self._limit < 4 * largest:
            raise UserError(
                f"data.cache_limit: {self._limit} bytes are too few for {self.source}, whose largest shard takes "
                f"{largest}; at least four must fit"
            )

    def _require_own_folders(self) -> None:
        """UserError where what is written would follow a link out of the folder that shards are fetched into."""
        parents = {self.folder / parent for parent in self.index.parents if parent}
        base = self.folder.resolve()
        for path in (*parents, self.folder / STAGING, self.folder / LOCKS):
            if path.resolve() != base / path.relative_to(self.folder):
                raise UserError(f"{path} is a link that leads elsewhere: nothing is unpacked through it; remove it")


def _require_hash(path: Path, name: str, expected: str) -> None:
    if get_hash(name, path.read_bytes()) != expected:
        raise ValueError(f"{path.name} is corrupt: its {name} differs from the one in {INDEX}")


def _require_size(path: Path, size: int) -> None:
    there = path.stat().st_size
    if there != size:
        raise WrongSize(f"{path.name} arrived with {there} bytes where {INDEX} says {size}")


def open_store(source: str, config: DataConfig, world: World) -> ShardStore:
    """Check `source` (a folder or a URI) on one rank of each node, then open it on all ranks together.

    UserError, on every rank, if it is not fit to be read.
    """
    on_first(lambda: prepare(source, config), world)
    return ShardStore(source, config)


def prepare(source: str, config: DataConfig) -> Path:
    """Check `source`, fetch its index if it is read through a cache, clear away there what killed runs left.

    Returns the folder that its index is read from. Enough on one rank of each node. UserError if it is not fit to be
    read.
    """
    if not is_remote(source):
        check_shards(Path(source))
        if config.validate_hash and config.cache is None:  # into a cache each comes checked
            _check_contents(source, config.validate_hash)
    _fetch_index(source, _folder(source, config))
    store = ShardStore(source, config)
    store.check()
    store.tidy()
    return store.folder


@functools.cache
def _check_contents(source: str, validate_hash: str) -> None:
    """Compare the shards' contents with the index: all is read, so once in a process, however often it opens them."""
    check_shards(Path(source), validate_hash)


def _folder(source: str, config: DataConfig) -> Path:
    """Where the shards of `source` are read from: in place, or its own folder of the cache if there is one."""
    if config.cache is None:
        assert not is_remote(source), "the config refuses a remote source without data.cache"
        return Path(source)
    name = source.rstrip("/").rsplit("/", 1)[-1][:100]  # a file system takes 255 bytes
    digest = hashlib.blake2s(source.encode(), digest_size=4).hexdigest()
    return Path(config.cache) / f"{name}-{digest}"


def _fetch_index(source: str, folder: Path) -> None:
    """Bring the index into the cache, unless it is there. UserError if shards of another one lie there."""
    if not is_remote(source) and folder == Path(source):
        return
    if (folder / INDEX).exists():
        if is_remote(source):
            _ask_for_changes(source.rstrip("/"), folder)
        else:
            _check_same(source, Path(source) / INDEX, folder)
        return
    staged = folder / STAGING / INDEX

    def download() -> None:
        _download_beside(source.rstrip("/"), staged)
        try:
            read_index(folder / STAGING)  # half an index, or a hostile one, does not get into the cache
        except NotAnIndex as error:
            raise ValueError(error) from None

    try:
        with _locked(folder, INDEX):
            _persistently(download, INDEX_ATTEMPTS)
            os.replace(staged, folder / INDEX)
    except UserError as error:
        raise UserError(f"{source}: {str(error).replace(str(folder / STAGING / INDEX), INDEX)}") from None
    except Exception as error:  # every cloud's package has its own, down to a missing module
        reason = refusal(error, folder, probe=False) if takes_no_more(error) else one_line(error)
        raise UserError(f"{source} cannot be opened: {reason}") from error
    if is_remote(source):
        _fetch_classes(source.rstrip("/"), folder)


@functools.cache
def _ask_for_changes(source: str, folder: Path) -> None:
    """Compare the index in the cache with that of a remote source, once in a process; say so where nobody answers."""
    staged, latest = folder / STAGING / INDEX, folder / STAGING / f"latest-{os.getpid()}.json"
    try:
        with _locked(folder, INDEX):
            _download_beside(source, staged)
            os.replace(staged, latest)
    except Exception as error:  # as of `_fetch_index`; all of it may be in the cache, and the network away
        log.warning("%s: cannot be asked whether it has changed since it was cached (%s)", source, one_line(error))
        return
    try:
        _check_same(source, latest, folder)
    finally:
        latest.unlink()
    _fetch_classes(source, folder)


def _check_same(source: str, index: Path, folder: Path) -> None:
    """UserError unless the shards in `folder` are of the `index` that `source` has now."""
    if not filecmp.cmp(index, folder / INDEX, shallow=False):
        raise UserError(
            f"{source} has changed since its shards were copied to {folder}; remove that folder, or set another "
            "data.cache, once no run reads it"
        )


def _fetch_classes(source: str, folder: Path) -> None:
    """Bring the names of the classes into the cache, if they lie beside the index or above it."""
    staged = folder / STAGING / CLASSES
    for place in (source, source.rpartition("/")[0]):
        with suppress(Exception):  # every cloud has its own way to say that there is none
            _download_beside(place, staged)
            os.replace(staged, folder / CLASSES)
            return


def _download_beside(place: str, staged: Path) -> None:
    """Download the file of `staged`'s name that lies in `place`."""
    staged.unlink(missing_ok=True)
    CloudDownloader.direct_download(f"{place}/{staged.name}", str(staged), DOWNLOAD_TIMEOUT_S)


def class_names(source: Source, config: DataConfig) -> Optional[dict[str, int]]:
    """Class name -> label of a set that `prepare` has seen; None if nothing beside it names them.

    UserError for several sources: their labels are no classes of one set.
    """
    if not isinstance(source, str):
        raise UserError("data.train: labels are needed here, and several sources have none in common; give one set")
    return read_classes(_folder(source, config) if is_remote(source) else Path(source))


def label_table(source: Source, numbered_as: Source, config: DataConfig) -> Optional[dict[int, int]]:
    """Labels of `source` -> those of the same classes in the set `numbered_as`; None: as they are.

    Labels that are no keys have no class. UserError where the sets do not go together, see `classes.translation`.
    """
    if source == numbered_as and not isinstance(source, str):
        return None
    named = (numbered_as, source)
    return translation(*(class_names(name, config) for name in named), named)


def _is_damage(error: Exception) -> bool:
    """Whether a file arrived, and was not what the index says."""
    return isinstance(error, (ValueError, WrongSize))


def _persistently(work: Callable[[], _T], attempts: int) -> _T:
    """What `work` gives, after so many attempts at most, with pauses of about 1, 2, 4 ... s between them.

    Fewer where more are no use: what is not there stays away, and what is damaged twice is so at its source.
    """
    done = 0
    while True:
        try:
            return work()
        except Exception as error:
            done += 1
            hopeless = isinstance(error, (FileNotFoundError, UserError)) or takes_no_more(error)
            worth = 1 if hopeless else 2 if _is_damage(error) else attempts
            if done >= min(worth, attempts):
                raise
        # Not from `random`, which loader workers of all ranks have seeded alike: they would come back in step.
        time.sleep(2 ** (done - 1) * random.SystemRandom().uniform(0.75, 1.25))


@contextmanager
def _storing(folder: Path) -> Iterator[None]:
    """UserError, in a line, where the disk of a cache takes no more of what this block writes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # clouds' packages have their own
        if takes_no_more(error):
            raise UserError(f"data.cache: {refusal(error, folder)}") from error
        raise


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[int]:
    """Hold the lock `name` of a folder against threads and processes; gives its open file. A kill releases it."""
    flat = name.replace("/", "-")
    if len(os.fsencode(flat)) > 200:  # each part of it may be as long as a file system allows
        flat = hashlib.blake2s(os.fsencode(name)).hexdigest()
    path = folder / LOCKS / flat
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | OURS, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _raise_recent(note: int) -> None:
    """Raise what a shard failed of a short while ago, in whichever process; forget what is older."""
    reason = os.pread(note, 4096, 0).decode(errors="replace")
    if reason and time.time() - os.fstat(note).st_mtime < RETRY_AFTER_S:
        raise FetchError(reason)
    os.ftruncate(note, 0)
