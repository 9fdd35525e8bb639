"""What every source of images offers, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

# A source's names of its parts, and the folders of shards they become.
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
WHOLE = "."  # the one split of a source that has none


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images of one split. Image i has a name for reports, a label into `classes`, and a size known unread.

    labels, sizes: (N,) integers, sizes in bytes. windows: (N,) integers, if images should be shuffled only with those
    of the same window, because reading is cheap only in bulk.
    """

    classes: list[str]
    names: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    windows: Optional[np.ndarray] = None

    def reader(self, numbers: Sequence[int]) -> Callable[[int], bytes]:
        """Return a function from any of `numbers` to the image's encoded bytes; it raises OSError where it cannot."""
        raise NotImplementedError
