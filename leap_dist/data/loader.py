"""Loaders: shuffled, augmented batches to train on; every sample exactly once to evaluate on."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from leap_dist.config import DataConfig
from leap_dist.data.colours import Crops
from leap_dist.data.transforms import Whole, eval_transform, train_transform
from leap_dist.distributed import World, barrier
from leap_dist.errors import UserError

if TYPE_CHECKING:
    from leap_dist.data.streaming import ImageDataset


class Batch(NamedTuple):
    """One rank's micro-batch, on the host.

    images: (B, 3, S, S) float32, normalised; on the way to a GPU `Crops`, whose colours it will do (`Feed`);
    labels: (B,) int64, -1 where the shards have none; ids: (B,) int64, index of the sample in the whole set.
    """

    images: Tensor | Crops
    labels: Tensor
    ids: Tensor


def _guarded(batches: Iterable[Batch], source: str) -> Iterator[Batch]:
    """Pass batches on, and turn what a loader worker died of into one clear line."""
    try:
        yield from batches
    except UserError as error:
        # DataLoader re-raises from a frame that holds the exception: a cycle around the loader and its workers, which
        # take 10 s to end when the garbage collector finds them instead of `close`.
        traceback.clear_frames(error.__traceback__)
        # Out of a worker the message comes wrapped in a traceback, whose last line is 'module.UserError: message'.
        message = str(error).rstrip().splitlines()[-1]
        raise UserError(message.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # 'DataLoader timed out ...', 'DataLoader worker (pid 7) ...'
            raise
        raise UserError(f"{source}: {' '.join(str(error).split())} (data.workers, data.timeout_s)") from error


def _outlive_sigterm(_worker: int) -> None:
    """The deepspeed launcher signals loader workers before their rank, which still has to save; `close` ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _loader_options(config: DataConfig, world: World) -> dict[str, Any]:
    return {
        "generator": torch.Generator(),  # else every pass draws a worker seed from the trainer's global stream
        "num_workers": config.workers,
        "worker_init_fn": _outlive_sigterm,
        "pin_memory": world.device.type == "cuda",
        "timeout": config.timeout_s if config.workers else 0,
    }


class TrainLoader:
    """Shuffled micro-batches of this rank, addressed by (epoch, micro-batch): whoever trains owns the position.

    The order is a function of the seed, the epoch and `data.canonical_nodes`. Micro-batch i of all ranks together holds
    the same samples whatever the number of ranks, as long as micro_batch x ranks stays the same. All ranks must
    iterate together, over the same epochs, one at a time.
    """

    def __init__(self, dataset: ImageDataset, config: DataConfig, *, micro_batch: int, world: World) -> None:
        from streaming import StreamingDataLoader

        self._dataset = dataset
        self._world = world
        self._stride = micro_batch * world.size
        self._length = dataset.size // self._stride
        self.num_samples: int = dataset.size
        self._loader = StreamingDataLoader(
            dataset,
            batch_size=micro_batch,
            drop_last=True,
            persistent_workers=config.workers > 0,
            **_loader_options(config, world),
        )

    def __len__(self) -> int:
        """Micro-batches per epoch and rank; the incomplete last one is dropped."""
        return self._length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield micro-batches `start`, `start` + 1, ... of epoch `epoch` (both from 0), to its end.

        UserError if `start` lies behind the end, or if not all of them could be delivered.
        """
        if start > len(self):
            raise UserError(f"{self._dataset.source}: no micro-batch {start} in an epoch of {len(self)}; other data?")
        if start == len(self):
            return
        self._seek(epoch, start)
        delivered = start
        for batch in islice(_guarded(self._loader, self._dataset.source), len(self) - start):
            if start and delivered == start:
                self._dataset.forget_state()
            delivered += 1
            yield batch
        if delivered != len(self):
            raise UserError(f"{self._dataset.source}: epoch {epoch} ended after {delivered} of {len(self)} batches")

    def _seek(self, epoch: int, start: int) -> None:
        """Place every rank's dataset; a rank may only start to read when all have done so."""
        self._dataset.epoch.fill_(epoch)
        if self._world.local_rank == 0:
            self._dataset.next_epoch = epoch  # else streaming goes on counting, and ignores a state of an older epoch
        if start:
            self._dataset.load_state_dict(
                {
                    "epoch": epoch,
                    "sample_in_epoch": start * self._stride,
                    "num_canonical_nodes": self._dataset.num_canonical_nodes,
                    "shuffle_seed": self._dataset.shuffle_seed,
                    "initial_physical_nodes": self._world.size // self._world.local_size,
                }
            )
        barrier(self._world)

    def close(self) -> None:
        """End the workers and release the data; the loader is of no use afterwards. Safe to call twice."""
        if self._loader is not None:
            self._loader.__del__()  # ends the workers even while a traceback or a broken-off epoch holds the loader
        self._loader = self._dataset = None


def _check_fit(dataset: ImageDataset, config: DataConfig, micro_batch: int, world: World) -> None:
    nodes, canonical, total = world.size // world.local_size, config.canonical_nodes, dataset.size
    if canonical < 1 or (canonical % nodes and nodes % canonical):
        raise UserError(f"data.canonical_nodes: {canonical} must divide the number of nodes, {nodes}, or be a multiple")
    if total < canonical:
        raise UserError(f"data.canonical_nodes: {canonical} is more than the {total} samples of {dataset.source}")
    if total < micro_batch * world.size:
        raise UserError(
            f"data.global_batch: a micro-batch of {micro_batch} on each of {world.size} ranks takes "
            f"{micro_batch * world.size} images, {dataset.source} has {total}"
        )


def build_train_loader(config: DataConfig, *, seed: int, micro_batch: int, world: World) -> TrainLoader:
    """Open `config.train` for training with `micro_batch` images per rank and step; all ranks together.

    UserError if the shards are not fit to be read, fewer than one micro-batch for all ranks, or cannot be split over
    the nodes.
    """
    from leap_dist.data.streaming import open_dataset

    transform = train_transform(config, world.device)
    dataset = open_dataset(
        config.train, config, world=world, transform=transform, seed=seed, batch=micro_batch, shuffle=True
    )
    _check_fit(dataset, config, micro_batch, world)
    return TrainLoader(dataset, config, micro_batch=micro_batch, world=world)


class EvalLoader:
    """This rank's share of a set, in order, untouched by chance; the ranks' shares are disjoint and complete.

    Shares may differ by one sample, so ranks may get different numbers of batches: no collectives inside the loop.
    num_samples: over all ranks.
    """

    def __init__(
        self, dataset: ImageDataset, config: DataConfig, *, batch: int, world: World, limit: Optional[int]
    ) -> None:
        total = dataset.size
        self.num_samples = total if limit is None else min(limit, total)
        chosen = [i * total // self.num_samples for i in range(world.rank, self.num_samples, world.size)]
        # Fewer samples than ranks: a model may be collective, so every rank has one; `merge` drops the repeats.
        chosen = chosen or [0]
        self._source = dataset.source
        self._loader = DataLoader(Subset(dataset, chosen), batch_size=batch, **_loader_options(config, world))

    def __iter__(self) -> Iterator[Batch]:
        return _guarded(self._loader, self._source)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._loader)


def build_eval_loader(
    source: str, config: DataConfig, *, batch: int, world: World, limit: Optional[int] = None
) -> EvalLoader:
    """Open `source` (a folder or URI of shards) to read each sample once over all ranks; all ranks together.

    limit: read that many samples, evenly strided over the set. UserError if the shards are not fit to be read. Close a
    `TrainLoader` on the same remote source first: streaming lets one dataset at a time use a cache folder.
    """
    from leap_dist.data.streaming import open_dataset

    transform = Whole(eval_transform(config))
    dataset = open_dataset(source, config, world=world, transform=transform, seed=0, batch=batch, shuffle=False)
    return EvalLoader(dataset, config, batch=batch, world=world, limit=limit)
