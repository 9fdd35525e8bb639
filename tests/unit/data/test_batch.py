"""A batch on its way from a worker to its rank: one block of shared memory, and the same batch out of it."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from leap_dist.data.batch import Batch, Packed
from leap_dist.data.colours import Crops
from leap_dist.data.faults import BadSample

PIXELS = torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IMAGES = {
    "uint8": PIXELS,
    "float32": PIXELS.float() / 7,
    "crops": Crops(PIXELS, torch.arange(30).view(3, 10) / 3),
    "none": torch.empty(0),
}


def batch(images: torch.Tensor | Crops) -> Batch:
    ids = torch.tensor([7, 2**40, 5] if len(images) else [], dtype=torch.int64)
    return Batch(images, ids % 3 - 1, ids, torch.arange(len(ids)), (BadSample(7, "shard.0", "no JPEG"),))


def tensors(of: Batch) -> list[torch.Tensor]:
    images = list(of.images) if isinstance(of.images, Crops) else [of.images]
    return [*images, of.labels, of.ids, of.positions]


@pytest.mark.parametrize("kind", IMAGES)
def test_what_comes_out_is_what_went_in(kind: str) -> None:
    sent = batch(IMAGES[kind])
    packed = Packed.of(sent)
    assert packed.memory.is_shared() or not packed.memory.numel()
    got = packed.batch()
    assert type(got.images) is type(sent.images) and got.bad == sent.bad
    for mine, theirs in zip(tensors(got), tensors(sent), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        assert mine.data_ptr() % mine.itemsize == 0
        assert mine.untyped_storage().data_ptr() == packed.memory.untyped_storage().data_ptr()


def _send(queue: torch.multiprocessing.Queue, packed: Packed) -> None:
    queue.put(packed)
    queue.get()  # until it is there


def test_it_survives_another_process_and_a_pinning_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DataLoader does it: a queue between processes; then whatever is in a tuple is pinned, and tuples become
    lists."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor.clone())
    sent, queue = batch(IMAGES["crops"]), torch.multiprocessing.get_context("fork").Queue()
    process = multiprocessing.get_context("fork").Process(target=_send, args=(queue, Packed.of(sent)))
    process.start()
    got = pin_memory(queue.get()).batch()
    queue.put("done")
    process.join()
    for mine, theirs in zip(tensors(got), tensors(sent), strict=True):
        assert torch.equal(mine, theirs)
    assert list(got.bad) == list(sent.bad)
