"""The order of samples: a function of (seed, epoch, canonical nodes), and each rank's share of a global batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leap_dist.runtime.distributed import World


def epoch_order(shard_sizes: NDArray[np.int64], *, canonical_nodes: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Every sample id once, in the order in which epoch `epoch` (from 0) visits them. (samples,) int64.

    It is the order of a `StreamingDataset` (algorithm py1e) on one rank. Where `canonical_nodes` does not divide the
    number of samples, that one repeats some near its end; the repeats are left out here.
    """
    from streaming.base.partition import get_partitions  # 3 s to import
    from streaming.base.shuffle import get_shuffle

    ids = get_partitions("relaxed", int(shard_sizes.sum()), canonical_nodes, 1, 1, 1, 1).ravel()
    _, first = np.unique(ids, return_index=True)
    block = max(4_000_000 // canonical_nodes, 1 << 18)
    shuffle = get_shuffle("py1e", shard_sizes, canonical_nodes, seed, epoch, block)
    return shuffle[ids[np.sort(first)]]


@dataclass(frozen=True)
class Share:
    """Which images of a global batch a rank takes: every `shares`-th, so that the batch itself is everybody's same.

    micro_batch: images per rank and accumulation step. The ranks of a node take what a `StreamingDataset` would give
    them: the samples of the same canonical nodes in every step, hence of the same shards. Nodes must pass
    `distributed.check_nodes`.
    """

    micro_batch: int
    accumulation: int
    world: World

    @property
    def shares(self) -> int:
        """Micro-batches in a global batch."""
        return self.world.size * self.accumulation

    @property
    def global_batch(self) -> int:
        """Images per optimizer step."""
        return self.micro_batch * self.shares

    def positions(self, index: int) -> NDArray[np.int64]:
        """Positions in its global batch of this rank's micro-batch `index` of the epoch. (micro_batch,) int64."""
        nodes = self.world.size // self.world.local_size
        place = self.world.rank // self.world.local_size + nodes * self.world.local_rank
        first = index % self.accumulation * self.world.size + place
        return np.arange(first, self.global_batch, self.shares)
