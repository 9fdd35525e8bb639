"""Several sources with proportions as one set: which source each position is of, and which of its samples.

    position -> source  by halving the list of sources until one is left; which half is a fixed, even rhythm
             -> place   how many earlier positions were of that source: its own running position
             -> sample  that place in the source's own order, whose epochs are the passes over it so far

All of it is closed arithmetic on integers, so any position can be asked at once. A set of one source stands in
`order.EpochOrder` itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Union

import numpy as np
from numpy.typing import NDArray

from leap_dist.config import DataConfig, Source
from leap_dist.data.order import EpochOrder
from leap_dist.data.store import ShardStore, open_store
from leap_dist.runtime.distributed import World

ONE = 1 << 32  # a share in fixed point
Places = NDArray[np.int64]


def turns(places: Places, share: int) -> Places:
    """How many of the first `places` turns are given to the side whose share is share / ONE: rounded down. (N,)"""
    low = (places & (ONE - 1)).astype(np.uint64) * np.uint64(share)  # to 64 bits, one more than int64 has
    return (places >> 32) * share + (low >> np.uint64(32)).astype(np.int64)


def dealt(positions: Places, proportions: Sequence[float]) -> tuple[Places, Places]:
    """The number of the source of each position from the start of a run, and its place among those of that source.

    Of any positions in a row a source has its share within one sample for each halving: one of two sources, two of
    four. proportions: positive, of any sum. Both results (N,) int64.
    """
    if len(proportions) == 1:
        return np.zeros_like(positions), positions
    half = len(proportions) // 2
    exact = [Fraction(proportion) for proportion in proportions]
    share = min(max(round(sum(exact[:half]) / sum(exact) * ONE), 1), ONE - 1)
    before = turns(positions, share)
    first = turns(positions + 1, share) > before
    source, place = np.empty_like(positions), np.empty_like(positions)
    source[first], place[first] = dealt(before[first], proportions[:half])
    source[~first], place[~first] = dealt((positions - before)[~first], proportions[half:])
    source[~first] += half
    return source, place


class MixedOrder:
    """The samples at positions of epoch `epoch` of several sources, and the pass over its source that each is of.

    An epoch is as many positions as all sources have samples together.

    Args:
        shard_sizes: of each source, (shards,) int64.
        proportions: of each source, positive.
        canonical_nodes: as of `EpochOrder`; a source of fewer samples has one for each.
    """

    def __init__(
        self, shard_sizes: Sequence[Places], proportions: Sequence[float], *, canonical_nodes: int, seed: int,
        epoch: int,
    ) -> None:  # fmt: skip
        self._shard_sizes, self._proportions = shard_sizes, proportions
        self._nodes, self._seed = canonical_nodes, seed
        self._sizes = [int(sizes.sum()) for sizes in shard_sizes]
        self.size = sum(self._sizes)
        self._begin = epoch * self.size
        self._latest: dict[int, tuple[int, EpochOrder]] = {}  # source -> pass and its order

    def __call__(self, positions: Places) -> tuple[Places, Places]:
        """Sample ids, each in range(size), sources one behind the other, and passes from 0. Both (N,) int64."""
        source, place = dealt(positions + self._begin, self._proportions)
        ids, passes = np.empty_like(place), np.empty_like(place)
        offset = 0
        for number, size in enumerate(self._sizes):
            ours = source == number
            passes[ours] = place[ours] // size
            for turn in np.unique(passes[ours]).tolist():
                here = ours & (passes == turn)
                ids[here] = offset + self._order(number, turn)(place[here] % size)
            offset += size
        return ids, passes

    def _order(self, number: int, turn: int) -> EpochOrder:
        known = self._latest.get(number)
        if known is None or known[0] != turn:
            nodes = min(self._nodes, self._sizes[number])
            order = EpochOrder(self._shard_sizes[number], canonical_nodes=nodes, seed=self._seed, epoch=turn)
            known = self._latest[number] = (turn, order)
        return known[1]


class _Part(NamedTuple):
    store: ShardStore
    first_sample: int
    first_shard: int


class MixedStore:
    """The samples of several sources, one behind the other, as `ShardStore` has those of one.

    proportions: source -> its part of a batch, in the order of `stores`.
    """

    def __init__(self, stores: Sequence[ShardStore], proportions: Mapping[str, float]) -> None:
        self.stores, self.proportions = list(stores), list(proportions.values())
        self.source = " + ".join(store.source for store in stores)
        self._sample_ends = np.concatenate([store.shard_sizes for store in stores]).cumsum()  # of each shard
        self.size = sum(store.size for store in stores)
        self.fetches = any(store.fetches for store in stores)
        self._ends = np.cumsum([store.size for store in stores])
        self._shard_ends = np.cumsum([len(store.shard_sizes) for store in stores])

    def _part(self, number: int) -> _Part:
        store = self.stores[number]
        return _Part(store, int(self._ends[number]) - store.size, int(self._shard_ends[number]) - len(store.index))

    def _of_sample(self, sample_id: int) -> _Part:
        return self._part(int(np.searchsorted(self._ends, sample_id, side="right")))

    def order(self, *, canonical_nodes: int, seed: int, epoch: int) -> MixedOrder:
        """The order of an epoch."""
        sizes = [store.shard_sizes for store in self.stores]
        return MixedOrder(sizes, self.proportions, canonical_nodes=canonical_nodes, seed=seed, epoch=epoch)

    def layout(self) -> str:
        """What the order of an epoch depends on: equal words, equal orders."""
        whole = sum(map(Fraction, self.proportions))
        shares = [float(Fraction(proportion) / whole) for proportion in self.proportions]
        return " + ".join(f"{share!r} of {store.layout()}" for share, store in zip(shares, self.stores, strict=True))

    def contents(self) -> str:
        """As of `ShardStore`, of all sources."""
        return "+".join(store.contents() for store in self.stores)

    def shards_of(self, sample_ids: Places) -> Places:
        """The shards that hold these samples, each once; those of all sources are numbered one behind the other."""
        return np.unique(np.searchsorted(self._sample_ends, sample_ids, side="right"))

    def shard_name(self, sample_id: int) -> str:
        """Source and file name of the shard that holds a sample."""
        part = self._of_sample(sample_id)
        return f"{part.store.source.rstrip('/')}/{part.store.shard_name(sample_id - part.first_sample)}"

    def read(self, sample_id: int) -> dict[str, Any]:
        """As `ShardStore.read`."""
        part = self._of_sample(sample_id)
        return part.store.read(sample_id - part.first_sample)

    def fetch_ahead(self, shard_ids: Places) -> None:
        """As `ShardStore.fetch_ahead`."""
        whose = np.searchsorted(self._shard_ends, shard_ids, side="right")
        for number in np.unique(whose).tolist():
            part = self._part(number)
            part.store.fetch_ahead((shard_ids[whose == number] - part.first_shard).tolist())


def open_set(source: Source, config: DataConfig, world: World) -> Union[ShardStore, MixedStore]:
    """`store.open_store` of one source or of several. Collective; UserError likewise."""
    if isinstance(source, str):
        return open_store(source, config, world)
    return MixedStore([open_store(one, config, world) for one in source], source)
