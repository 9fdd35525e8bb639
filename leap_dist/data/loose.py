"""Images that lie as they were downloaded, read by the loader as shards are."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from leap_dist.config import DataConfig
from leap_dist.data.loader import EvalLoader
from leap_dist.data.pixels import open_rgb
from leap_dist.data.sources import Images
from leap_dist.data.streaming import ImageDataset
from leap_dist.data.transforms import Whole, eval_transform
from leap_dist.runtime.distributed import World

Box = tuple[float, float, float, float]  # left, top, right, lower, pixels


class LooseStore:
    """The samples of `images`, with the methods of `ShardStore` that an `EvalLoader` needs.

    boxes: what to cut out of each image first; None: nothing.
    """

    fetches = False

    def __init__(self, images: Images, source: str, boxes: Optional[Sequence[Box]] = None) -> None:
        self.images, self.source, self.size = images, source, len(images.names)
        self._boxes = boxes
        self._reader: Optional[Callable[[int], bytes]] = None

    def contents(self) -> str:
        """A digest of names, sizes, labels and boxes."""
        digest = hashlib.blake2s("\0".join(self.images.names).encode("utf-8", "surrogateescape"), digest_size=8)
        digest.update(np.asarray(self.images.sizes, np.int64).tobytes())
        digest.update(np.asarray(self.images.labels, np.int64).tobytes())
        digest.update(repr(self._boxes).encode())
        return digest.hexdigest()

    def read(self, sample_id: int) -> dict[str, Any]:
        """The columns of a sample; raises anything if it cannot be read."""
        if self._reader is None:  # by the process that uses it: open files do not survive a fork
            self._reader = self.images.reader(range(self.size))
        data = self._reader(sample_id)
        if self._boxes is not None:
            cut = io.BytesIO()
            open_rgb(data).crop(tuple(round(side) for side in self._boxes[sample_id])).save(cut, "PNG")
            data = cut.getvalue()
        return {"image": data, "label": int(self.images.labels[sample_id])}

    def shard_name(self, sample_id: int) -> str:
        """The file of a sample, for messages."""
        return self.images.names[sample_id]

    def shards_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """None: nothing has to be fetched."""
        return np.empty(0, np.int64)

    def fetch_ahead(self, shard_ids: NDArray[np.int64]) -> None:
        """Nothing has to be."""


def build_loose_loader(
    store: Any,
    config: DataConfig,
    *,
    batch: int,
    world: World,
    only: Optional[NDArray[np.int64]] = None,
    table: Optional[Mapping[int, int]] = None,
    bicubic: bool = False,
) -> EvalLoader:
    """A loader of each sample of `store`, loose or of shards, once over all ranks; `only` those, if given."""
    dataset = ImageDataset(store, Whole(eval_transform(config, bicubic=bicubic)), seed=0, substitutes=False)
    return EvalLoader(dataset, config, batch=batch, world=world, limit=None, table=table, only=only)
