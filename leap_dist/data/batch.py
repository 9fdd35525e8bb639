"""What loader workers are asked for, and what they answer."""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leap_dist.data.colours import Crops
from leap_dist.data.faults import BadSample


class Request(NamedTuple):
    """What a worker is to read: the samples of one micro-batch, and shards that later ones will need.

    ids, positions: (B,) int64; shards: int64.
    """

    epoch: int
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
