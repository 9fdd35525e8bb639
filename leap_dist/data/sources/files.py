"""Images that are files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from leap_dist.data.sources.images import Images
from leap_dist.runtime.files import read_regular


@dataclass(frozen=True, kw_only=True)
class Files(Images):
    """Files under `root`, which `names` are relative to."""

    root: Path

    def reader(self, numbers: Sequence[int]) -> Callable[[int], bytes]:
        """See Images."""
        return lambda number: read_regular(self.root / self.names[number])
