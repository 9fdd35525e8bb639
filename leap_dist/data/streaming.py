"""MosaicML Streaming, made to fail loudly: the one module that imports it to read (3 s, so import this one late)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState

from leap_dist.config import DataConfig, is_remote
from leap_dist.data.loader import Batch
from leap_dist.data.shards import check_shards, read_index
from leap_dist.data.transforms import Transform, sample_stream
from leap_dist.distributed import World, barrier, gather_objects
from leap_dist.errors import UserError

LOCK_TIMEOUT_S = 120.0


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class ImageDataset(StreamingDataset):
    """Shards of encoded images as normalised tensors, each sample augmented by its own (seed, epoch, id) stream.

    Items are `Batch`es of one, not yet stacked: what `transform` makes, int, int. UserError for what cannot be read.
    """

    def __init__(self, *, source: str, transform: Transform, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.source = source
        self.transform = transform
        self.seed = seed
        # In shared memory: persistent workers must see it change. Streaming's own epoch counter will not do, since a
        # rank that is already in the next epoch raises it for all ranks of its node.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._failure = ""

    def __iter__(self) -> Iterator[Batch]:
        yield from super().__iter__()
        # When its shard threads fail, streaming ends the epoch as if it were complete; this event is the only trace.
        if self._event.is_set():
            raise UserError(f"{self.source}: a shard cannot be read: {self._failure or 'see the log above'}")

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and unpack a shard. One that fails is left to each waiting worker to try, and to fail, by itself."""
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            self._failure = _one_line(error)
            # Streaming leaves it 'preparing', on which all other workers and ranks of the node would wait for ever.
            self._shard_states[shard_id] = _ShardState.LOCAL
            raise

    def get_item(self, sample_id: int, retry: int = 7) -> Batch:
        """Sample `sample_id` of the whole set, decoded and transformed."""
        try:
            sample = super().get_item(sample_id, retry)
        except Exception as error:  # a damaged shard can make the reader raise anything
            reason = self._failure or _one_line(error)
            raise UserError(f"{self.source}: sample {sample_id} cannot be read: {reason}") from error
        random = sample_stream(self.seed, int(self.epoch), int(sample_id))
        try:
            pixels = self.transform.decode(sample["image"], random)
        except Exception as error:  # and PIL too: OSError, SyntaxError, struct.error, ...
            raise UserError(
                f"{self.source}: the image of sample {sample_id} does not decode: {_one_line(error)}"
            ) from error
        images = self.transform.finish(pixels, random)
        return Batch(images, int(sample.get("label", -1)), int(sample_id))

    def forget_state(self) -> None:
        """Drop the position given to `load_state_dict`, once every local worker has read it (a batch has arrived).

        Streaming would keep it for the life of the process, and open it anew in each worker at each epoch, never to be
        closed: one file descriptor each.
        """
        self._resume_shm.cleanup()


@contextmanager
def _construction_lock(world: World) -> Iterator[None]:
    """Let one job at a time construct datasets on this machine, all its local ranks together.

    Streaming's ranks each look for a free shared-memory prefix; two jobs of one user that look at the same moment
    take the same one and die or hang. A lock on one rank alone is not enough: the ranks then disagree on the prefix.
    """
    path = Path(tempfile.gettempdir()) / f"leap_dist-{os.getuid()}.lock"
    handle = None
    if world.local_rank == 0:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        _acquire(handle, path)
    barrier(world)
    try:
        yield
        barrier(world)  # not when construction failed: the other ranks may be stuck in it, and this one must go
    finally:
        if handle is not None:
            os.close(handle)


def _acquire(handle: int, path: Path) -> None:
    """Lock, but not for ever: two jobs on the same two nodes could each hold one and wait for the other."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"{path} is held by another job that is opening its data; try again later") from None
            time.sleep(0.05)


def _location(source: str, config: DataConfig) -> dict[str, Any]:
    """Streaming's `remote`, `local` and `cache_limit`: read in place, or through the cache if there is one."""
    if config.cache:
        name = source.rstrip("/").rsplit("/", 1)[-1]
        digest = hashlib.blake2s(source.encode(), digest_size=4).hexdigest()
        local = str(Path(config.cache) / f"{name}-{digest}")
        return {"remote": source, "local": local, "cache_limit": config.cache_limit}
    assert not is_remote(source), "the config refuses a remote source without data.cache"
    return {"local": source}  # without a limit: eviction deletes files, and these are the user's own


def _preflight(folder: str, validate_hash: Optional[str], world: World) -> None:
    """Check a local folder once per node; every rank raises what any of them found."""
    fault = None
    if world.local_rank == 0:
        try:
            check_shards(Path(folder), validate_hash)
        except UserError as error:
            fault = str(error)
    for found in gather_objects(fault, world):
        if found:
            raise UserError(found)


def open_dataset(
    source: str, config: DataConfig, *, world: World, transform: Transform, seed: int, batch: int, shuffle: bool
) -> ImageDataset:
    """Check `source` (a folder or a URI), then open it on all ranks together; UserError if it is not fit to be read."""
    location = _location(source, config)
    if not is_remote(source):
        _preflight(source, config.validate_hash, world)
    try:
        with _construction_lock(world):
            dataset = ImageDataset(
                source=source,
                transform=transform,
                seed=seed,
                shuffle=shuffle,
                shuffle_seed=seed,
                batch_size=batch,
                num_canonical_nodes=config.canonical_nodes,
                validate_hash=config.validate_hash,
                **location,
            )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{source} cannot be opened: {_one_line(error)}") from error
    read_index(Path(location["local"]))  # of a URI only now at hand
    return dataset
