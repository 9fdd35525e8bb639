"""The order of samples: a function of (seed, epoch, canonical nodes, position), and each rank's share of a batch.

    position -> canonical node    in turn, so that every node takes part in every batch
             -> lane of the node  the node's shards, in an order of the epoch, laid end to end and cut into equal lanes
             -> sample            the next one of the lane; within a shard they come in an order of the epoch

A node reads one sample of each of its lanes, in an order that is drawn anew each time, before it reads a second one of
any. So two samples that follow each other come from different shards but for one in (number of lanes), and at any
moment there is one open shard for each lane. Which shards are whose is fixed for a run.

Nothing is shuffled in memory. What is kept are two integers for every shard, so any position can be asked at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leap_dist.data.shuffling import key_of, permuted, scrambled
from leap_dist.runtime.distributed import World

VERSION = 2  # of the order; 1 was streaming's py1e. Checkpoints know it: a position means nothing in another order
LEAST_SPREAD = 1 << 18  # samples of a node over which a shard is spread at least, as by streaming
SPREAD = 4_000_000  # the same, of all nodes together
LEAST_LANES = 64  # where shards have so many samples that the spread would be a few shards
DEAL, SHARDS, LANES, SAMPLES, PHASES = range(5)  # what is drawn: first part of each key


def _node_sizes(samples: int, nodes: int) -> NDArray[np.int64]:
    """How many positions each node has: every `nodes`-th."""
    return (samples + nodes - 1 - np.arange(nodes, dtype=np.int64)) // nodes


class EpochOrder:
    """Every sample id of a set once, by its position in epoch `epoch` (from 0).

    Costs 16 bytes for every shard, and four times as much in passing while it is built.

    Args:
        shard_sizes: (shards,) int64, samples of each.
        canonical_nodes: at most as many as there are samples.
    """

    def __init__(self, shard_sizes: NDArray[np.int64], *, canonical_nodes: int, seed: int, epoch: int) -> None:
        self.size = int(shard_sizes.sum())
        self._key = key_of(seed, epoch)
        self._sizes = _node_sizes(self.size, canonical_nodes)
        self._begins = self._sizes.cumsum() - self._sizes
        spread = max(SPREAD // canonical_nodes, LEAST_SPREAD)
        lanes = max(spread * np.count_nonzero(shard_sizes) // self.size, LEAST_LANES)
        self._lanes = np.where(self._sizes <= spread, self._sizes, np.minimum(self._sizes, lanes))
        self._mean_shard = max(self.size // max(np.count_nonzero(shard_sizes), 1), 1)
        self._ends, self._firsts = self._pieces(shard_sizes, seed)

    @property
    def nbytes(self) -> int:
        """Of what is kept for every shard."""
        return self._ends.nbytes + self._firsts.nbytes

    def _pieces(self, shard_sizes: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The nodes' pieces of shards in this epoch's order, end to end: where each ends, and its first sample id."""
        cuts, firsts = _dealt(shard_sizes, self._begins, seed)
        node = np.searchsorted(self._begins, cuts, side="right").astype(np.uint64)  # 16 bits
        lengths = np.diff(cuts, append=self.size)
        drawn = scrambled(key_of(SHARDS) + self._key + scrambled(firsts.astype(np.uint64)))
        order = np.argsort((node << np.uint64(47)) | (drawn >> np.uint64(17)), kind="stable")
        return lengths[order].cumsum(), firsts[order]

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample ids at these positions, each in range(size). (N,) int64."""
        node, turn = positions % len(self._sizes), positions // len(self._sizes)
        place = self._begins[node] + self._place(node, turn)
        piece = np.searchsorted(self._ends, place, side="right")
        length = self._ends[piece] - np.where(piece, self._ends[piece - 1], 0)
        within = place - (self._ends[piece] - length)
        keys = scrambled(self._key + key_of(SAMPLES, piece))
        return self._firsts[piece] + permuted(within, length, keys)

    def _place(self, node: NDArray[np.int64], turn: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in a node's shards, laid end to end, its sample number `turn` lies."""
        lanes, size = self._lanes[node], self._sizes[node]
        row, column = turn // lanes, turn % lanes
        length, longer = size // lanes, size % lanes  # the first `longer` lanes have a sample more than the others
        open_lanes = np.where(row < length, lanes, longer)
        lane = permuted(column, open_lanes, scrambled(self._key + key_of(LANES, node, row)))
        length_here = length + (lane < longer)
        # Shards of one size would else all end at once, and as many would have to arrive at that moment.
        phase = (key_of(PHASES, node, lane) % np.uint64(self._mean_shard)).astype(np.int64)
        return lane * length + np.minimum(lane, longer) + (row + phase) % length_here


def _dealt(
    shard_sizes: NDArray[np.int64], begins: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All shards in an order of the run, cut where a node's part begins: where pieces begin, and their first ids."""
    drawn = scrambled(key_of(DEAL, seed) + scrambled(np.arange(len(shard_sizes), dtype=np.uint64)))
    order = np.argsort(drawn, kind="stable")
    sizes = shard_sizes[order]
    starts = sizes.cumsum() - sizes
    ids = (shard_sizes.cumsum() - shard_sizes)[order]
    holds = sizes > 0
    starts, ids = starts[holds], ids[holds]
    cuts = np.union1d(starts, begins)
    shard = np.searchsorted(starts, cuts, side="right") - 1
    return cuts, ids[shard] + cuts - starts[shard]


@dataclass(frozen=True)
class Share:
    """Which images of a global batch a rank takes: every `shares`-th, so that the batch itself is everybody's same.

    micro_batch: images per rank and accumulation step. The ranks of a node take the samples of the same canonical nodes
    in every step, hence of the same shards. Nodes must pass `distributed.check_nodes`.
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
