"""Loaders: shuffled, augmented batches to train on; every sample exactly once to evaluate on."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, get_worker_info

from leap_dist.config import DataConfig, Source
from leap_dist.data.batch import Batch, Packed, Request
from leap_dist.data.classes import UNLABELLED
from leap_dist.data.order import VERSION, EpochOrder, Share
from leap_dist.data.transforms import Whole, eval_transform, train_transform
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World
from leap_dist.runtime.files import refusal, takes_no_more
from leap_dist.runtime.signals import STOPPING

if TYPE_CHECKING:
    from leap_dist.data.streaming import ImageDataset

log = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
ASKED_AT_ONCE = 8192  # samples of the order: a call costs as much for one as for some hundreds


def _guarded(batches: Iterable[Packed | Batch], source: str) -> Iterator[Batch]:
    """Unpack batches and pass them on, and turn what a loader worker died of into one clear line."""
    try:
        for batch in batches:
            yield batch.batch() if isinstance(batch, Packed) else batch
    except UserError as error:
        # DataLoader re-raises from a frame that holds the exception: a cycle around the loader and its workers, which
        # take 10 s to end when the garbage collector finds them instead of `close`.
        traceback.clear_frames(error.__traceback__)
        # Out of a worker the message comes wrapped in a traceback, whose last line is 'module.UserError: message'.
        message = str(error).rstrip().splitlines()[-1]
        raise UserError(message.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")) from None
    except RuntimeError as error:
        if "shared memory" in str(error) and takes_no_more(error):
            raise UserError(
                f"loader workers pass images through shared memory. {refusal(error, SHARED_MEMORY, probe=False)} "
                "(fewer data.workers take less; in a container --shm-size or --ipc=host gives more)"
            ) from None
        if not str(error).startswith("DataLoader"):  # 'DataLoader timed out ...', 'DataLoader worker (pid 7) ...'
            raise
        raise UserError(f"{source}: {' '.join(str(error).split())} (data.workers, data.timeout_s)") from error


def _live_as_long_as(rank_pid: int, _worker: int) -> None:
    """Tie a loader worker to its rank, no shorter and no longer.

    The deepspeed launcher, Ctrl-C and a closed terminal signal workers too, whose rank still has to save; `close` ends
    them. And torch's watch over the parent takes whoever is the parent when the worker begins for the rank: one that
    was killed before that would leave the worker for ever (seen after kills in the first second). Nor does it look
    while a worker waits for a download, so the kernel is told: it ends the worker with the thread that forked it, the
    rank's main one.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if os.getppid() != rank_pid:
        os._exit(1)


class _Requests:
    """What a DataLoader asks its workers for: whatever was put here before an iteration began."""

    def __init__(self) -> None:
        self.pending: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.pending)


def _shared(batch: Batch) -> Batch | Packed:
    """A batch, which the dataset has collated; from a worker in one piece of the memory that it shares with the rank.

    The worker's queue would move it there by itself, but in a thread whose fault nobody hears of: without room the rank
    would wait for the batch until `data.timeout_s`.
    """
    return batch if get_worker_info() is None else Packed.of(batch)


def _data_loader(
    dataset: ImageDataset, requests: _Requests, config: DataConfig, world: World, *, persistent: bool
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=requests,
        collate_fn=_shared,
        generator=torch.Generator(),  # else every pass draws a worker seed from the trainer's global stream
        num_workers=config.workers,
        # Python 3.14 would start them by a server, whose children they then were.
        multiprocessing_context="fork" if config.workers else None,
        persistent_workers=persistent and config.workers > 0,
        worker_init_fn=functools.partial(_live_as_long_as, os.getpid()),
        pin_memory=world.device.type == "cuda",
        timeout=config.timeout_s if config.workers else 0,
    )


class TrainLoader:
    """Shuffled micro-batches of this rank, addressed by (epoch, micro-batch): whoever trains owns the position.

    The order is a function of the seed, the epoch and `data.canonical_nodes`. The global batches that it is cut into
    are the same sets, augmented alike, whatever the numbers of ranks, nodes, accumulation steps and workers. Nothing is
    shared with other ranks: each computes the order and reads its own part.
    """

    def __init__(self, dataset: ImageDataset, config: DataConfig, share: Share, *, seed: int) -> None:
        self.num_samples: int = dataset.store.size
        self.layout, self.contents, self.order = dataset.store.layout(), dataset.store.contents(), VERSION
        self._dataset = dataset
        self._config = config
        self._share = share
        self._seed = seed
        self._length = self.num_samples // share.global_batch * share.accumulation
        self._requests = _Requests()
        self._loader = _data_loader(dataset, self._requests, config, share.world, persistent=True)

    def __len__(self) -> int:
        """Micro-batches per epoch and rank; the incomplete last global batch is dropped."""
        return self._length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield micro-batches `start`, `start` + 1, ... of epoch `epoch` (both from 0), to its end.

        UserError if `start` lies behind the end, or if not all of them could be delivered.
        """
        source = self._dataset.store.source
        if start > len(self):
            raise UserError(f"{source}: no micro-batch {start} in an epoch of {len(self)}; other data?")
        if start == len(self):
            return
        self._requests.pending = self._epoch_requests(epoch, start)
        delivered = start
        for batch in _guarded(self._loader, source):
            delivered += 1
            yield batch
        if delivered != len(self):
            raise UserError(f"{source}: epoch {epoch} ended after {delivered} of {len(self)} batches")

    def _epoch_requests(self, epoch: int, start: int) -> Iterator[Request]:
        """Micro-batches from `start` on; with each, the shards of one that is `data.predownload` images ahead."""
        store, share = self._dataset.store, self._share
        distance = -(-self._config.predownload // share.micro_batch) if store.fetches else 0
        ahead: deque[tuple[NDArray[np.int64], NDArray[np.int64]]] = deque()
        coming = self._ids(self._order(epoch), start)
        for index in range(start, len(self)):
            looked_at = []
            while len(ahead) <= distance and (drawn := next(coming, None)) is not None:
                looked_at += [store.shards_of(drawn[0])] if store.fetches else []
                ahead.append(drawn)
            shards = np.concatenate([np.empty(0, np.int64), *looked_at])
            ids, passes = ahead.popleft()
            yield Request(passes, ids, share.positions(index), shards)

    def _order(self, epoch: int) -> Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """From positions of an epoch to samples, and to the pass over its source that each is of."""
        store, nodes = self._dataset.store, self._config.canonical_nodes
        if not isinstance(self._config.train, str):
            return store.order(canonical_nodes=nodes, seed=self._seed, epoch=epoch)
        order = EpochOrder(store.shard_sizes, canonical_nodes=nodes, seed=self._seed, epoch=epoch)
        return lambda positions: (order(positions), np.full(len(positions), epoch))

    def _ids(
        self, order: Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]], start: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """`order` of micro-batches `start`, `start` + 1, ... of this rank; many are asked for at once."""
        share = self._share
        many = max(1, ASKED_AT_ONCE // share.micro_batch)
        for first in range(start, len(self), many):
            numbers = range(first, min(first + many, len(self)))
            positions = [i // share.accumulation * share.global_batch + share.positions(i) for i in numbers]
            ids, passes = order(np.concatenate(positions))
            yield from zip(np.split(ids, len(numbers)), np.split(passes, len(numbers)), strict=True)

    def close(self) -> None:
        """End the workers and release the data; the loader is of no use afterwards. Safe to call twice."""
        if self._loader is not None and getattr(self._loader, "_iterator", None) is not None:
            # Dropping it would do, but a traceback or a broken-off epoch may hold it.
            self._loader._iterator._shutdown_workers()
        self._loader = self._dataset = None


def _check_fit(dataset: ImageDataset, config: DataConfig, share: Share) -> None:
    store, ranks = dataset.store, share.world.size
    if store.size < config.canonical_nodes:
        raise UserError(
            f"data.canonical_nodes: {config.canonical_nodes} is more than the {store.size} samples of {store.source}"
        )
    if store.size < share.global_batch:
        raise UserError(
            f"data.global_batch: {share.global_batch} images ({share.micro_batch} on each of {ranks} ranks, "
            f"{share.accumulation} times) are more than the {store.size} of {store.source}"
        )


def build_train_loader(
    config: DataConfig, *, seed: int, micro_batch: int, accumulation: int = 1, world: World
) -> TrainLoader:
    """Open `config.train` for training with `micro_batch` images per rank and accumulation step; all ranks together.

    UserError if the shards are not fit to be read, or fewer than one global batch.
    """
    from leap_dist.data.streaming import open_dataset

    transform = train_transform(config, world.device)
    dataset = open_dataset(config.train, config, world=world, transform=transform, seed=seed, substitutes=True)
    share = Share(micro_batch, accumulation, world)
    _check_fit(dataset, config, share)
    return TrainLoader(dataset, config, share, seed=seed)


class EvalLoader:
    """This rank's share of a set, in order, untouched by chance; the ranks' shares are disjoint and complete.

    A sample that cannot be read is left out: another in its place would falsify an accuracy. Shares may differ by one
    sample and by what is left out, so ranks may get different numbers of batches: where a collective runs inside the
    loop, as an evaluated teacher may be, `evaluation.features.in_step` gives all ranks the same number.
    What was left out is said when the loop has come to its end. num_samples: over all ranks.
    table: what labels become, -1 where it has none; None: they stay. only: the samples to be read, else all.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        config: DataConfig,
        *,
        batch: int,
        world: World,
        limit: Optional[int],
        table: Optional[Mapping[int, int]] = None,
        only: Optional[NDArray[np.int64]] = None,
    ) -> None:
        self._table = table
        self.source: str = dataset.store.source
        total = dataset.store.size
        self.num_samples = total if limit is None else min(limit, total)
        # Neighbours lie in one shard: a node that reads through a cache needs few.
        self._only, wanted = only, self.num_samples if only is None else len(only)
        each, longer = divmod(wanted, world.size)
        self._begin = world.rank * each + min(world.rank, longer)
        self._end = self._begin + each + (world.rank < longer)
        if self._begin == self._end:
            # Fewer samples than ranks: a model may be collective, so every rank has one; `merge` drops the repeats.
            self._begin, self._end = 0, min(1, wanted)
        self._batch = batch
        self._dataset = dataset
        self._most_bad = math.ceil(config.max_bad_fraction * self.num_samples)
        self._requests = _Requests()
        self._loader = _data_loader(dataset, self._requests, config, world, persistent=False)

    def __iter__(self) -> Iterator[Batch]:
        """UserError if this rank meets more than `data.max_bad_fraction` of all samples that cannot be read."""
        source, bad, read = self._dataset.store.source, [], 0
        self._requests.pending = self._pass()
        for batch in _guarded(self._loader, source):
            bad += batch.bad
            if len(bad) > self._most_bad:
                raise UserError(
                    f"data.max_bad_fraction: {len(bad)} of {self.num_samples} samples of {source} cannot be read, at "
                    f"most {self._most_bad} may be; the last is {bad[-1].id}, which {bad[-1].reason}"
                )
            read += len(batch.ids)
            if len(batch.ids):
                yield batch if self._table is None else self._renumbered(batch, self._table)
        if not read:
            raise UserError(f"{source}: none of this rank's {len(bad)} samples can be read")
        if bad:
            log.warning("%s: %d samples cannot be read and are left out: %s", source, len(bad), [b.id for b in bad])

    @staticmethod
    def _renumbered(batch: Batch, table: Mapping[int, int]) -> Batch:
        labels = [table.get(label, UNLABELLED) for label in batch.labels.tolist()]
        return batch._replace(labels=torch.tensor(labels, dtype=torch.int64))

    def _pass(self) -> Iterator[Request]:
        store = self._dataset.store
        for begin in range(self._begin, self._end, self._batch):
            end = min(begin + self._batch, self._end)
            positions = np.arange(begin, end) if self._only is None else self._only[begin:end]
            ids = positions * store.size // self.num_samples
            yield Request(0, ids, positions, store.shards_of(ids))

    def __len__(self) -> int:
        """Batches of this rank; one of which nothing can be read is not delivered."""
        return -(-(self._end - self._begin) // self._batch)


def build_eval_loader(
    source: Source,
    config: DataConfig,
    *,
    batch: int,
    world: World,
    limit: Optional[int] = None,
    numbered_as: Optional[Source] = None,
    bicubic: bool = False,
) -> EvalLoader:
    """Open `source` (a folder or URI of shards) to read each sample once over all ranks; all ranks together.

    limit: read that many samples, evenly strided over the set. numbered_as: the set whose numbers the labels are to
    be, where both name their classes; None: its own. bicubic: see `eval_transform`. UserError if the shards are not fit
    to be read, or the classes of the two sets do not go together.
    """
    from leap_dist.data.store import label_table
    from leap_dist.data.streaming import open_dataset

    transform = Whole(eval_transform(config, bicubic=bicubic))
    dataset = open_dataset(source, config, world=world, transform=transform, seed=0, substitutes=False)
    table = label_table(source, numbered_as or source, config)
    return EvalLoader(dataset, config, batch=batch, world=world, limit=limit, table=table)
