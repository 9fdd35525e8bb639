"""What every source of images offers, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

# A source's names of its parts in small letters, and the folders of shards they become.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
WHOLE = "."  # the one split of a source that has none


def split_of(name: str) -> Optional[str]:
    """The split that something of this name is, in whatever letters; None if it is none."""
    return SPLITS.get(name.lower())


def counted(left_out: Mapping[str, int]) -> str:
    """Reasons and numbers of what was left out, in words: "7 .heic, 3 hidden"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images of one split. Image i has a name for reports, a label into `classes`, and a size known unread.

    labels, sizes: (N,) integers, sizes in bytes. windows: (N,) integers, if images should be shuffled only with those
    of the same window, because reading is cheap only in bulk. left_out: reasons why files of the source are not among
    the images, and how many.
    """

    classes: list[str]
    names: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    windows: Optional[np.ndarray] = None
    left_out: Mapping[str, int] = field(default_factory=dict)

    def reader(self, numbers: Sequence[int]) -> Callable[[int], bytes]:
        """Return a function from any of `numbers` to the image's encoded bytes; it raises OSError where it cannot."""
        raise NotImplementedError
