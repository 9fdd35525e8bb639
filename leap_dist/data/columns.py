"""What is read of an MDS shard: the columns `image` and `label`, as bytes and as a number. Nothing else is decoded.

streaming's own reader decodes every column by what the index names, and one of its encodings, `pkl`, runs code. This
one takes the bytes of the columns that are wanted and steps over the others.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.data.index import INTEGERS, Columns


class ShardReader:
    """The samples of one shard's file, which is kept open. Safe in forked processes: nobody moves a place in the file.

    size: bytes of it, by the index. Raises OSError if it cannot be opened.
    """

    def __init__(self, path: Path, columns: Columns, size: int) -> None:
        self._columns, self._size = columns, size
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._file)  # called, or when nobody needs the reader any more

    def sample(self, number: int) -> dict[str, Any]:
        """`image`: bytes; `label`: int, if there is one. ValueError where the shard's own tables lead out of it."""
        return self._wanted(self._bytes_of(number))

    def _bytes_of(self, number: int) -> bytes:
        begin, end = np.frombuffer(os.pread(self._file, 8, (1 + number) * 4), "<u4").tolist()
        if not 0 < begin < end <= self._size:
            raise ValueError(f"sample {number} is said to lie at bytes {begin} to {end} of {self._size}")
        return os.pread(self._file, end - begin, begin)

    def _wanted(self, data: bytes) -> dict[str, Any]:
        sizes, at = [], 0
        for fixed in self._columns.sizes:
            if fixed:
                sizes.append(fixed)
            else:
                sizes += np.frombuffer(data[at : at + 4], "<u4", 1).tolist()
                at += 4
        if at + sum(sizes) != len(data):
            raise ValueError(f"a sample of {len(data)} bytes is said to have columns of {at + sum(sizes)}")
        sample: dict[str, Any] = {}
        for name, encoding, size in zip(self._columns.names, self._columns.encodings, sizes, strict=True):
            if name == "image":
                sample[name] = data[at : at + size]
            elif name == "label":
                sample[name] = int(np.frombuffer(data[at : at + size], INTEGERS[encoding])[0])
            at += size
        return sample
