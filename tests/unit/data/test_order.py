"""Sample order and the ranks' shares of it, against StreamingDataset's own and by enumeration."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import StreamingDataset
from streaming.base.partition import get_partitions

from leap_dist.data.order import EpochOrder, Share
from leap_dist.data.shards import read_index
from leap_dist.runtime.distributed import World
from small_sets import write


def world(rank: int, size: int, nodes: int = 1) -> World:
    local = size // nodes
    return World(rank, size, rank % local, local, torch.device("cpu"))


@pytest.mark.parametrize("samples", [64, 63, 61, 9, 8])
def test_every_sample_comes_once_whatever_the_canonical_nodes(samples: int) -> None:
    sizes = np.array([7] * (samples // 7) + [samples % 7])
    for canonical_nodes, epoch in itertools.product((1, 3, 8), (0, 1)):
        order = EpochOrder(sizes, canonical_nodes=canonical_nodes, seed=0, epoch=epoch)
        assert sorted(order(np.arange(samples))) == list(range(samples))


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_shares_are_what_streaming_gives_the_ranks_of_several_nodes(nodes: int, accumulation: int) -> None:
    """All micro-batches of a rank in a step together are streaming's batch of that rank; shards stay on their nodes."""
    size, batch = 4, 24
    theirs = get_partitions("relaxed", 96, 4, nodes, size // nodes, 1, batch // size)
    order = get_partitions("relaxed", 96, 4, 1, 1, 1, 1).ravel()
    for rank in range(size):
        place = world(rank, size, nodes)
        share = Share(batch // size // accumulation, accumulation, place)
        assert share.global_batch == batch
        for step in range(4):
            parts = [share.positions(step * accumulation + part) for part in range(accumulation)]
            mine = order[step * batch + np.concatenate(parts)]
            assert sorted(mine) == sorted(theirs[rank // place.local_size, place.local_rank, 0, step])
