"""What loader workers are asked for, and what they answer."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leap_dist.data.colours import Crops
from leap_dist.data.faults import BadSample


class Request(NamedTuple):
    """What a worker is to read: the samples of one micro-batch, and shards that later ones will need.

    epoch: of the random numbers, one or (B,) int64; ids, positions: (B,) int64; shards: int64.
    """

    epoch: Union[int, NDArray[np.int64]]
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    shards: NDArray[np.int64]


class Batch(NamedTuple):
    """One rank's micro-batch, on the host.

    images: (B, 3, S, S), float32 and normalised, or uint8, which `Feed` normalises (a quarter of the memory for workers
    to fill and hand over); on the way to a GPU `Crops`, which gets its colours there too;
    labels: (B,) int64, -1 where the shards have none that can be the number of a class;
    ids: (B,) int64, index of the sample in the whole set;
    positions: (B,) int64, place in the global batch;
    bad: samples that could not be read. When training, others stand in for them under their ids.
    ready: set by `Feed` where the images are on their way to a GPU.
    """

    images: Tensor | Crops
    labels: Tensor
    ids: Tensor
    positions: Tensor
    bad: tuple[BadSample, ...] = ()
    ready: Optional[torch.cuda.Event] = None


class Packed(NamedTuple):
    """A batch as one block of bytes, to be handed from a loader worker to its rank: each tensor that travels by itself
    takes a file descriptor, a mapping and a pinned copy of its own.

    memory: uint8. parts: dtype and shape of the tensors that lie in it one after another, as `_parts` has them.
    """

    memory: Tensor
    parts: list[tuple[torch.dtype, tuple[int, ...]]]
    bad: tuple[BadSample, ...]

    @classmethod
    def of(cls, batch: Batch) -> Packed:
        """In memory that a worker shares with its rank."""
        tensors = _parts(batch)
        sizes = [tensor.nbytes for tensor in tensors]
        memory = torch.empty(sum(sizes), dtype=torch.uint8).share_memory_()
        for part, tensor in zip(memory.split(sizes), tensors, strict=True):
            part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return cls(memory, [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors], batch.bad)

    def batch(self) -> Batch:
        """What was packed; its tensors are views."""
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in self.parts]
        labels, ids, positions, *colours, images = (
            part.view(dtype).view(shape)
            for part, (dtype, shape) in zip(self.memory.split(sizes), self.parts, strict=True)
        )
        return Batch(Crops(images, *colours) if colours else images, labels, ids, positions, tuple(self.bad))


def _parts(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, those of the widest numbers first, so that all lie aligned."""
    images = (batch.images.colours, batch.images.pixels) if isinstance(batch.images, Crops) else (batch.images,)
    return [batch.labels, batch.ids, batch.positions, *images]
