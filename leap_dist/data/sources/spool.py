"""Lists of images that are too long for memory: on a disk without a name, so that nothing is left of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from operator import eq
from pathlib import Path
from typing import IO, Any, Optional

import numpy as np
from numpy.typing import DTypeLike

from leap_dist.runtime.files import writing

AT_ONCE = 1 << 12  # names that are read back together


class Spool:
    """Numbers of one type that are appended to, then read as an array that the system pages in and out.

    folder: whose disk holds them; None: that of temporary files. UserError if the disk refuses them.
    """

    def __init__(self, dtype: DTypeLike, folder: Optional[Path] = None) -> None:
        self._dtype = np.dtype(dtype)
        self._folder = folder or Path(tempfile.gettempdir())
        with writing(self._folder):
            self._file: IO[Any] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # lives as long as its array

    def extend(self, values: Any) -> None:
        """Append an array, or what can become one."""
        with writing(self._folder):
            self._file.write(np.asarray(values, self._dtype).tobytes())

    def array(self) -> np.ndarray:
        """All that was appended, shared with processes that are forked later."""
        with writing(self._folder):
            self._file.flush()
        if self._file.tell() == 0:
            return np.empty(0, self._dtype)
        return np.memmap(self._file, self._dtype, "r")


class Names(Sequence[str]):
    """Names of files, one after the other. ends: (N,) where each ends in `text`, UTF-8 as of a file system."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start = self._ends[number - 1] if number else 0
        return self._text[start : self._ends[number]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), AT_ONCE):
            ends = self._ends[first : first + AT_ONCE].tolist()
            text = self._text[start : ends[-1]].tobytes()
            for begin, end in zip([start, *ends[:-1]], ends, strict=True):
                yield text[begin - start : end - start].decode("utf-8", "surrogateescape")
            start = ends[-1]


class Listing:
    """Names, sizes and labels of images, as they are found. folder: as of Spool."""

    def __init__(self, folder: Optional[Path] = None) -> None:
        self._text, self._ends = Spool(np.uint8, folder), Spool(np.int64, folder)
        self._sizes, self._labels = Spool(np.int64, folder), Spool(np.int64, folder)
        self._bytes = 0

    def add(self, names: Iterable[str], sizes: Sequence[int], label: int) -> None:
        """Append images of one label; as many names as sizes, in bytes."""
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        lengths = np.fromiter(map(len, encoded), np.int64, len(sizes))
        self._text.extend(np.frombuffer(b"".join(encoded), np.uint8))
        self._ends.extend(self._bytes + np.cumsum(lengths))
        self._sizes.extend(sizes)
        self._labels.extend(np.full(len(sizes), label))
        self._bytes += int(lengths.sum())

    def columns(self) -> dict[str, Any]:
        """`names`, `sizes` and `labels`, as Images has them."""
        names = Names(self._text.array(), self._ends.array())
        return {"names": names, "sizes": self._sizes.array(), "labels": self._labels.array()}
