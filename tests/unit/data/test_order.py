"""The order of an epoch: by exhaustion on small sets, by its parts on large ones; how well it mixes; shares of it."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle

from leap_dist.data import order
from leap_dist.data.order import EpochOrder, Share
from leap_dist.data.shuffling import key_of, permuted
from leap_dist.runtime.distributed import World

EVEN, UNEVEN = np.full(2000, 100), np.random.RandomState(0).randint(5, 400, 1000)
SKEWED, LARGE = np.r_[np.full(20, 5000), np.full(1000, 100)], np.full(30, 5000)


def world(rank: int, size: int, nodes: int = 1) -> World:
    local = size // nodes
    return World(rank, size, rank % local, local, torch.device("cpu"))


def whole(sizes: NDArray[np.int64], canonical_nodes: int, seed: int = 0, epoch: int = 0) -> NDArray[np.int64]:
    return EpochOrder(sizes, canonical_nodes=canonical_nodes, seed=seed, epoch=epoch)(np.arange(sizes.sum()))


@pytest.fixture
def small_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spread that small sets exceed, so that their nodes have lanes."""
    for name, value in {"SPREAD": 40, "LEAST_SPREAD": 30, "LEAST_LANES": 3}.items():
        monkeypatch.setattr(order, name, value)


# ---- every sample once


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 10, 63, 64, 65, 1000])
def test_a_permutation_is_one_for_every_key_and_reaches_all_places_alike(size: int) -> None:
    keys = np.repeat(key_of(np.arange(600)), size)
    found = permuted(np.tile(np.arange(size), 600), np.full(600 * size, size), keys).reshape(600, size)
    assert (np.sort(found) == np.arange(size)).all()
    for place in {0, size // 2, size - 1}:
        counts = np.bincount(found[:, place], minlength=size)
        assert ((counts - 600 / size) ** 2 / (600 / size)).sum() <= chi2.isf(1e-6, max(size - 1, 1))


def test_permutations_of_all_sizes_are_asked_together() -> None:
    sizes = np.repeat([3, 1, 100, 2**31 + 1], [3, 1, 100, 5])
    places = np.concatenate([np.arange(3), [0], np.arange(100), [0, 1, 2**30, 2**31 - 1, 2**31]])
    found = permuted(places, sizes, np.broadcast_to(key_of(9), sizes.shape))
    assert sorted(found[:3]) == [0, 1, 2] and found[3] == 0 and sorted(found[4:104]) == list(range(100))
    assert len(set(found[104:])) == 5 and (found >= 0).all() and (found < sizes).all()


@pytest.mark.parametrize("samples", [64, 63, 61, 9, 8])
@pytest.mark.usefixtures("small_spread")
def test_every_sample_comes_once_whatever_the_canonical_nodes(samples: int) -> None:
    sizes = np.array([7] * (samples // 7) + [samples % 7])
    for canonical_nodes, epoch in itertools.product((1, 3, 8, samples), (0, 1)):
        assert sorted(whole(sizes, min(canonical_nodes, samples), epoch=epoch)) == list(range(samples))


@pytest.mark.parametrize("sizes", [(0, 3, 0, 5, 1, 0), (300, 1, 1, 5), (1,) * 50, tuple(range(40)), (10,) * 40])
@pytest.mark.parametrize("small", [True, False])
def test_every_sample_comes_once_whatever_the_shards(
    sizes: tuple[int, ...], small: bool, request: pytest.FixtureRequest
) -> None:
    if small:
        request.getfixturevalue("small_spread")
    for canonical_nodes, epoch in itertools.product((1, 2, 7), (0, 1, 2)):
        assert sorted(whole(np.array(sizes), canonical_nodes, epoch=epoch)) == list(range(sum(sizes)))


@pytest.mark.parametrize("shards", [100_000, pytest.param(2_000_000, marks=pytest.mark.slow)])  # 64 M, 1.28 B samples
def test_a_large_set_is_asked_for_its_middle(shards: int) -> None:
    """Its pieces are all of the set, once each. So no sample comes twice, as none does of a piece or of a node."""
    sizes = np.random.RandomState(1).randint(0, 1281, shards)
    asked = EpochOrder(sizes, canonical_nodes=8, seed=3, epoch=7)
    middle = asked.size // 2 + np.arange(20_000)
    ids = asked(middle)
    assert len(set(ids)) == len(ids) and ids.min() >= 0 and ids.max() < asked.size == sizes.sum()
    assert np.array_equal(asked(middle[777:779]), ids[777:779])
    assert (asked(middle + 8 * asked._lanes[0]) != ids).all(), "the next sample of each lane"
    assert int(np.diff(asked._ends, prepend=0).sum()) == asked.size and len(np.unique(asked._firsts)) == len(
        asked._ends
    )
    starts = sizes.cumsum() - sizes
    covered = np.sort(asked._firsts)
    assert np.array_equal(np.diff(covered, append=asked.size), np.diff(asked._ends, prepend=0)[asked._firsts.argsort()])
    assert len(np.setdiff1d(starts[sizes > 0], covered)) == 0, "a shard without a piece that begins it"


def test_a_nodes_places_are_its_part_of_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "LEAST_SPREAD", 1000)
    monkeypatch.setattr(order, "SPREAD", 1000)
    asked = EpochOrder(UNEVEN, canonical_nodes=3, seed=0, epoch=0)
    for node in range(3):
        size, begin = int(asked._sizes[node]), int(asked._begins[node])
        assert size > 20 * asked._lanes[node]
        places = asked._place(np.full(size, node), np.arange(size))
        assert np.array_equal(np.sort(places), np.arange(size)) and begin == asked._sizes[:node].sum()


# ---- the same for ever


def test_the_order_is_the_one_that_checkpoints_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change `order.VERSION` with these: an older checkpoint's position then means nothing."""
    assert order.VERSION == 2
    assert whole(np.array([3, 4, 5]), 2, seed=5, epoch=1).tolist() == GOLDEN_SMALL
    monkeypatch.setattr(order, "LEAST_SPREAD", 1000)
    monkeypatch.setattr(order, "SPREAD", 1000)
    asked = EpochOrder(UNEVEN, canonical_nodes=4, seed=2**31, epoch=10**6)
    assert asked(np.array([0, 1, 2, 3, 99_999, 150_000])).tolist() == GOLDEN_LANES


GOLDEN_SMALL = [7, 5, 8, 10, 0, 3, 2, 11, 1, 6, 9, 4]
GOLDEN_LANES = [19841, 13409, 44073, 85734, 115664, 36233]


def test_seed_and_epoch_give_orders_that_have_nothing_in_common() -> None:
    first = whole(EVEN, 4)
    for other in (whole(EVEN, 4, seed=1), whole(EVEN, 4, epoch=1), whole(EVEN, 8)):
        assert np.count_nonzero(first == other) < 30  # about one in a random pair


# ---- how well it mixes


class Mix(NamedTuple):
    """Of an order of a set whose samples are sorted by class. Smaller is better mixed.

    run: mean length of runs of one class; shard: how often a sample and one of those that follow it (1, 2, 4, 16, 64
    places on) are of one shard; correlation: of their ids, likewise; batches: by how much the classes of 256 that
    follow each other are off an even draw, whose value is 1.
    """

    run: float
    shard: float
    correlation: float
    batches: float


def mix_of(ids: NDArray[np.int64], sizes: NDArray[np.int64], canonical_nodes: int) -> Mix:
    shards, classes = np.searchsorted(sizes.cumsum(), ids, side="right"), ids * 100 // len(ids)
    lags = [canonical_nodes * lag for lag in (1, 2, 4, 16, 64)]  # those of one canonical node
    shard = np.mean([np.mean(shards[lag:] == shards[:-lag]) for lag in lags])
    correlation = max(np.corrcoef(ids[lag:], ids[:-lag])[0, 1] for lag in (1, *lags))
    counts = np.stack(
        [np.bincount(batch, minlength=100) for batch in classes[: len(ids) // 256 * 256].reshape(-1, 256)]
    )
    return Mix(
        len(ids) / (1 + np.count_nonzero(np.diff(classes))), float(shard), float(correlation),
        float(((counts - 2.56) ** 2 / 2.56).sum(1).mean() / 99),
    )  # fmt: skip


def py1e(sizes: NDArray[np.int64], canonical_nodes: int, spread: int) -> NDArray[np.int64]:
    """streaming's own order, without its repeats."""
    ids = get_partitions("relaxed", int(sizes.sum()), canonical_nodes, 1, 1, 1, 1).ravel()
    _, first = np.unique(ids, return_index=True)
    return get_shuffle("py1e", sizes, canonical_nodes, 0, 1, spread)[ids[np.sort(first)]]


def no_worse(sizes: NDArray[np.int64], canonical_nodes: int, spread: int) -> tuple[Mix, Mix]:
    """Both orders' figures; ours are no worse but for what chance does to figures of so many samples."""
    chance = 4 / np.sqrt(sizes.sum())
    ours, theirs = (
        mix_of(ids, sizes, canonical_nodes)
        for ids in (whole(sizes, canonical_nodes, epoch=1), py1e(sizes, canonical_nodes, spread))
    )
    assert ours.run <= theirs.run + chance
    assert ours.shard <= theirs.shard + chance / 10
    assert ours.correlation <= max(theirs.correlation, chance)
    assert ours.batches <= max(theirs.batches, 1.02)
    return ours, theirs


@pytest.mark.parametrize(
    ("sizes", "canonical_nodes", "spread"),
    [(EVEN, 1, 1 << 14), (EVEN, 4, 1 << 13), (UNEVEN, 4, 1 << 13), (SKEWED, 2, 1 << 14), (LARGE, 1, 1 << 14),
     (EVEN, 3, 1 << 18)],
)  # fmt: skip
def test_a_set_sorted_by_class_is_mixed_no_worse_than_by_streaming(
    sizes: NDArray[np.int64], canonical_nodes: int, spread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a window that is to the set as the default one is to some hundred million samples."""
    monkeypatch.setattr(order, "SPREAD", spread)
    monkeypatch.setattr(order, "LEAST_SPREAD", spread)
    no_worse(sizes, canonical_nodes, spread)


@pytest.mark.slow
def test_so_are_eight_million_samples_at_the_default_window() -> None:
    print(*no_worse(np.full(8_000, 1_000), 8, max(4_000_000 // 8, 1 << 18)), sep="\n")


def test_an_order_that_hardly_mixes_would_be_seen() -> None:
    """What the figures above are worth: shards in random order, samples as they lie."""
    shards = np.random.RandomState(0).permutation(2000)
    unmixed = mix_of((shards[:, None] * 100 + np.arange(100)).ravel(), EVEN, 1)
    assert unmixed.run > 10 and unmixed.shard > 0.5 and unmixed.correlation > 0.5 and unmixed.batches > 20


@pytest.mark.usefixtures("small_spread")
@pytest.mark.parametrize("canonical_nodes", [1, 4])
def test_shards_are_begun_evenly(canonical_nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all have one size, which divides the lanes': else all lanes would need a new one at one moment."""
    monkeypatch.setattr(order, "LEAST_LANES", 64)
    sizes = np.full(64 * 40 * canonical_nodes, 100)
    ids = whole(sizes, canonical_nodes)
    _, begun = np.unique(ids // 100, return_index=True)
    by_stretch = np.bincount(begun * 100 // len(ids), minlength=100)
    usual = len(sizes) / 100
    assert by_stretch[3:].max() < 2 * usual and by_stretch[:3].sum() < 3 * usual + 64 * canonical_nodes
    still_needed = np.mean([len(np.unique(part // 100)) for part in np.array_split(ids, 40)])
    assert still_needed <= 3 * 64 * canonical_nodes


# ---- shards stay on their nodes


@pytest.mark.parametrize("sizes", [UNEVEN])
def test_a_canonical_node_keeps_its_shards_in_every_epoch(sizes: NDArray[np.int64]) -> None:
    ends = sizes.cumsum()
    met = [
        [set(np.searchsorted(ends, whole(sizes, 4, epoch=epoch)[node::4], side="right")) for node in range(4)]
        for epoch in range(2)
    ]
    assert met[0] == met[1]
    assert sum(map(len, met[0])) <= len(sizes) + 3  # the borders of four parts cut three shards


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_ranks_of_a_node_take_its_own_canonical_nodes(nodes: int, accumulation: int) -> None:
    size, batch = 4, 24
    for rank in range(size):
        share = Share(batch // size // accumulation, accumulation, world(rank, size, nodes))
        assert share.global_batch == batch
        places = np.concatenate([share.positions(part) for part in range(accumulation)])
        assert {int(place) % nodes for place in places} == {rank // (size // nodes)}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_shares_make_up_the_global_batch_whatever_the_ranks(size: int, accumulation: int) -> None:
    shares = [Share(504 // size // accumulation, accumulation, world(rank, size)) for rank in range(size)]
    taken = [share.positions(part) for share in shares for part in range(accumulation)]
    assert sorted(np.concatenate(taken)) == list(range(504))
