"""The device feed: what it gives on a CPU, and the order of its copies. The copies themselves need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from leap_dist.config import DataConfig
from leap_dist.data import Batch, Feed
from leap_dist.data.colours import Crops, draw_colours, normalise_, recolour

CONFIG = DataConfig(train="unused")


def batches(count: int, log: list[str]) -> Iterator[Batch]:
    for i in range(count):
        log.append(f"load {i}")
        yield Batch(
            torch.full((2, 3, 4, 4), float(i)), torch.zeros(2, dtype=torch.int64), torch.arange(2), torch.arange(2)
        )


def test_on_a_cpu_batches_pass_through_one_by_one() -> None:
    log: list[str] = []
    feed = Feed(CONFIG, torch.device("cpu"))
    stream = feed.ahead(batches(3, log))
    assert next(stream).images.unique() == 0 and log == ["load 0"]
    assert [feed.images(batch).unique().item() for batch in stream] == [1, 2]


def test_crops_become_normalised_images() -> None:
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=generator)
    crops = Crops(pixels, torch.from_numpy(np.stack([draw_colours(random) for _ in pixels])))
    batch = Batch(crops, torch.zeros(6), torch.arange(6), torch.arange(6))
    images = Feed(CONFIG, torch.device("cpu")).images(batch)
    assert images.dtype == torch.float32 and torch.equal(images, normalise_(recolour(crops), CONFIG.mean, CONFIG.std))


class Watched(Feed):
    """A feed to a device, without the device."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(CONFIG, torch.device("cpu"))
        self._copies, self.log = object(), log

    def _send(self, batch: Batch) -> Batch:
        self.log.append(f"send {int(batch.images.mean())}")
        return batch


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_next_batch_is_on_its_way_before_one_is_worked_on(count: int) -> None:
    log: list[str] = []
    for batch in Watched(log).ahead(batches(count, log)):
        log.append(f"work {int(batch.images.mean())}")
    first = ["load 0", "send 0"]
    middle = [f"{what} {i + n}" for i in range(count - 1) for what, n in (("load", 1), ("send", 1), ("work", 0))]
    assert log == ([*first, *middle, f"work {count - 1}"] if count else [])
