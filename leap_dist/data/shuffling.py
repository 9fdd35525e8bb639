"""Permutations that can be asked at one place: numbers that a key scrambles, without a table of them.

Own arithmetic on 64-bit integers rather than a generator of NumPy's, whose streams may change with its version: an
order that a checkpoint stands in must be the same for ever.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
ROUNDS = 6  # of the Feistel network; three make its output look random, four so even to who may choose the input
_STEP = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's: 2**64 over the golden ratio


def scrambled(words: Words) -> Words:
    """splitmix64's finaliser: a bijection of 64-bit words under which each bit depends on all (Steele et al., 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def key_of(*parts: int | NDArray[np.int64]) -> Words:
    """A key for each row of the parts, which are integers or arrays of one shape; other parts, unrelated keys."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = scrambled((key + _STEP) ^ scrambled(np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64)))
    return key


def permuted(places: NDArray[np.int64], sizes: NDArray[np.int64], keys: Words) -> NDArray[np.int64]:
    """Where a permutation of range(size), chosen by its key, puts each place. All (N,); 0 <= place < size.

    A Feistel network on pairs of digits, of which there are just enough, walked on until it leads back into the range.
    """
    sides = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    sides += sides * sides < sizes.astype(np.uint64)  # the root of a large number may be rounded down
    found = places.astype(np.uint64)
    left = np.arange(len(found))
    while len(left):
        found[left] = _feistel(found[left], sides[left], keys[left])
        left = left[found[left] >= sizes[left].astype(np.uint64)]
    return found.astype(np.int64)


def _feistel(words: Words, sides: Words, keys: Words) -> Words:
    high, low = words // sides, words % sides
    for _ in range(ROUNDS):
        keys = keys + _STEP
        high, low = low, (high + scrambled(keys ^ scrambled(low)) % sides) % sides
    return high * sides + low
