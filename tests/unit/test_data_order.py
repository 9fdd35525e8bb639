"""Sample order, the ranks' shares of it and mixup pairs, against StreamingDataset's own and by enumeration."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import StreamingDataset
from streaming.base.partition import get_partitions
from test_data_loader import write

from leap_dist.data import check_groups, mixup
from leap_dist.data.mixup import partners
from leap_dist.data.order import Share, epoch_order
from leap_dist.data.shards import read_index
from leap_dist.distributed import World
from leap_dist.errors import UserError


def world(rank: int, size: int, nodes: int = 1) -> World:
    local = size // nodes
    return World(rank, size, rank % local, local, torch.device("cpu"))


@pytest.mark.parametrize("canonical_nodes", [1, 2, 8])
def test_the_order_is_streaming_datasets_own(tmp_path: Path, canonical_nodes: int) -> None:
    folder = write(tmp_path / "set")
    dataset = StreamingDataset(
        local=str(folder), batch_size=4, shuffle=True, shuffle_seed=5, num_canonical_nodes=canonical_nodes
    )
    sizes = np.array([shard["samples"] for shard in read_index(folder)])
    for epoch in range(3):
        theirs = [int(sample["label"]) for sample in dataset]  # the label is the id
        ours = epoch_order(sizes, canonical_nodes=canonical_nodes, seed=5, epoch=epoch)
        assert ours.tolist() == theirs


@pytest.mark.parametrize("samples", [64, 63, 61, 9, 8])
def test_every_sample_comes_once_whatever_the_canonical_nodes(samples: int) -> None:
    sizes = np.array([7] * (samples // 7) + [samples % 7])
    for canonical_nodes, epoch in itertools.product((1, 3, 8), (0, 1)):
        order = epoch_order(sizes, canonical_nodes=canonical_nodes, seed=0, epoch=epoch)
        assert sorted(order) == list(range(samples))


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


@pytest.mark.parametrize(("ranks", "accumulation", "nodes"), [(1, 1, 1), (1, 4, 1), (2, 2, 2), (4, 1, 2), (4, 2, 1)])
def test_mixup_of_a_global_batch_does_not_depend_on_who_shares_it(ranks: int, accumulation: int, nodes: int) -> None:
    images = torch.rand(64, 3, 2, 2, dtype=torch.float64)
    whole = mixup(images, torch.arange(64), global_batch=64, group_size=8, generator=torch.Generator().manual_seed(3))
    seen = []
    for rank, part in itertools.product(range(ranks), range(accumulation)):
        share = Share(64 // ranks // accumulation, accumulation, world(rank, ranks, nodes))
        positions = torch.from_numpy(share.positions(part))
        generator = torch.Generator().manual_seed(3)
        mixed = mixup(images[positions], positions, global_batch=64, group_size=8, generator=generator)
        assert torch.equal(mixed, whole[positions])
        seen += positions.tolist()
    assert sorted(seen) == list(range(64))


def test_mixup_blends_pairs_with_one_uniform_lambda() -> None:
    lams = []
    for seed in range(400):
        mixed = mixup(
            torch.eye(16, dtype=torch.float64), torch.arange(16),
            global_batch=16, group_size=4, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        lam = mixed.diagonal()
        assert torch.equal(lam, lam[:1].expand(16))
        torch.testing.assert_close(mixed.sum(1), torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-12)
        assert ((mixed > 0).sum(1) == 2).all()  # itself and one other, never itself twice
        lams.append(lam[0].item())
    assert abs(np.mean(lams) - 1 / 2) < 0.05 and abs(np.var(lams) - 1 / 12) < 0.012


def test_every_other_member_of_a_group_is_an_equally_likely_partner() -> None:
    counts = torch.zeros(12, 12)
    draws = 3000
    for seed in range(draws):
        counts[torch.arange(12), partners(3, 4, torch.Generator().manual_seed(seed))] += 1
    same_group = torch.arange(12)[:, None] % 3 == torch.arange(12) % 3
    expected = (same_group & ~torch.eye(12, dtype=torch.bool)) / 3
    assert ((counts / draws - expected).abs() < 0.05).all() and (counts[expected == 0] == 0).all()


def test_mixup_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    mixup(torch.randn(8, 3), torch.arange(8), global_batch=8, group_size=8, generator=torch.Generator())
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randn(8, 3)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_group_that_does_not_fit_a_micro_batch_is_refused() -> None:
    check_groups(8, 32)
    with pytest.raises(
        UserError, match=r"data.mixup_group=8: must divide the micro-batch of 12 .*valid: 2, 3, 4, 6, 12"
    ):
        check_groups(8, 12)
