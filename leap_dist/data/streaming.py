"""From a request for samples to a batch of them: read, decode, augment, and stand in for what cannot be read."""

from __future__ import annotations

from typing import Optional, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from leap_dist.config import DataConfig, Source
from leap_dist.data.batch import Batch, Request
from leap_dist.data.classes import UNLABELLED, class_number
from leap_dist.data.colours import Crops
from leap_dist.data.faults import BadSample
from leap_dist.data.mixture import MixedStore, open_set
from leap_dist.data.store import ShardStore, one_line
from leap_dist.data.transforms import Transform, sample_stream
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World
from leap_dist.runtime.reporting import no_descriptors

STAND_INS = 20  # tried for one sample; with a tenth of the set unreadable all fail for one in 1e20


class Unreadable(Exception):
    """A sample that cannot be read or decoded."""


def stand_ins(sample_id: int, size: int) -> list[int]:
    """The samples of a set of `size` that are to stand in for `sample_id`, in turn: a function of the two alone."""
    drawn = np.random.SeedSequence(sample_id).generate_state(STAND_INS, np.uint64)
    return [int(other) for other in drawn % np.uint64(size)]


class ImageDataset(Dataset):
    """Shards of encoded images as batches of what `transform` makes of each with its (seed, epoch, id) stream.

    substitutes: let another sample stand in for one that cannot be read; else leave it out of its batch.
    """

    def __init__(
        self, store: Union[ShardStore, MixedStore], transform: Transform, *, seed: int, substitutes: bool
    ) -> None:
        self.store = store
        self.transform = transform
        self.seed = seed
        self.substitutes = substitutes

    def __getitems__(self, request: Request) -> Batch:
        """The batch asked for; DataLoader hands on whatever its sampler yields. UserError if nothing can stand in."""
        self.store.fetch_ahead(request.shards)
        rows, kept, bad = [], [], []
        epochs = np.broadcast_to(request.epoch, request.ids.shape).tolist()
        for row, (sample_id, epoch) in enumerate(zip(request.ids.tolist(), epochs, strict=True)):
            try:
                rows.append(self.get_item(sample_id, epoch))
            except Unreadable as fault:
                bad.append(BadSample(sample_id, self.store.shard_name(sample_id), str(fault)))
                if not self.substitutes:
                    continue
                rows.append(self._stand_in(sample_id, epoch, fault))
            kept.append(row)
        images, labels = _collated(rows)
        ids, positions = (torch.from_numpy(column[kept]) for column in (request.ids, request.positions))
        return Batch(images, labels, ids, positions, tuple(bad))

    def get_item(self, sample_id: int, epoch: int, content_of: Optional[int] = None) -> tuple[Tensor | Crops, int]:
        """Image and label of a sample, or of `content_of` in its place and with its random stream.

        Unreadable if it cannot be read: a damaged shard or image can make the readers raise anything.
        """
        try:
            sample = self.store.read(sample_id if content_of is None else content_of)
        except UserError:
            raise
        except Exception as error:
            if words := no_descriptors(error):  # no fault of the sample
                raise UserError(words) from error
            raise Unreadable(f"cannot be read: {one_line(error)}") from error
        random = sample_stream(self.seed, epoch, sample_id)
        try:
            pixels = self.transform.decode(sample["image"], random)
        except Exception as error:  # PIL: OSError, SyntaxError, struct.error, ...
            raise Unreadable(f"does not decode: {one_line(error)}") from error
        return self.transform.finish(pixels, random), class_number(int(sample.get("label", UNLABELLED)))

    def _stand_in(self, sample_id: int, epoch: int, fault: Unreadable) -> tuple[Tensor | Crops, int]:
        for other in stand_ins(sample_id, self.store.size):
            try:
                return self.get_item(sample_id, epoch, content_of=other)
            except Unreadable:
                continue
        raise UserError(
            f"{self.store.source}: sample {sample_id} {fault}; nor can any of {STAND_INS} others be read"
        ) from None


def _collated(rows: list[tuple[Tensor | Crops, int]]) -> tuple[Tensor | Crops, Tensor]:
    """Images and labels of a batch, in this process's own memory."""
    images, labels = [image for image, _ in rows], torch.tensor([label for _, label in rows], dtype=torch.int64)
    if not rows:
        return torch.empty(0), labels
    if isinstance(images[0], Crops):
        return Crops(*(torch.stack(parts) for parts in zip(*images, strict=True))), labels
    return torch.stack(images), labels


def open_dataset(
    source: Source, config: DataConfig, *, world: World, transform: Transform, seed: int, substitutes: bool
) -> ImageDataset:
    """Check `source`, then open it on all ranks together; UserError if it is not fit to be read.

    source: a folder or a URI, or a mapping of several to their proportions.
    """
    return ImageDataset(open_set(source, config, world), transform, seed=seed, substitutes=substitutes)
