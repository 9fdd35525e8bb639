"""What each optimizer step trains on: images and teacher features, made as they are asked for, or a step ahead.

With `teacher.prefetch=1` the teacher works on step i + 1 while the students train on step i; on CUDA it does so on a
stream of its own. Every step has one block for each student, fixed when its work begins: the curriculum's at that
moment. The teacher is aimed at the deepest of them. So

    prefetch=0    the decision after step i reaches teacher and student at step i + 1
    prefetch=1    it reaches the teacher's work on step i + 2, which begins then, and so the student one step later

Nothing is begun across the end of an epoch: the first step of the next has that moment's block in both cases.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leap_dist.data import Batch
from leap_dist.models import Features
from leap_dist.teacher import Teacher


class MicroBatch(NamedTuple):
    """What one forward of each student takes: images (B, 3, H, W) on the device, the features of every wanted block by
    its number, and soft labels (B, classes) by (classes, smoothing), for students that classify.
    """

    images: Tensor
    features: Mapping[int, Features]
    labels: Mapping[tuple[int, float], Tensor] = {}

    def targets(self, blocks: Sequence[int], *, logits: bool) -> list[Features]:
        """Features of the blocks; without `logits` not those that only another student distils."""
        found = [self.features[block] for block in blocks]
        return found if logits else [features._replace(logits=None) for features in found]


class Work(NamedTuple):
    """What one optimizer step trains on. batches: what it was made of.

    wanted: by student, the 1-indexed blocks that it matches, rising; the last is its target.
    """

    wanted: Mapping[str, Sequence[int]]
    micro_batches: Iterator[MicroBatch]
    batches: list[Batch]

    @property
    def blocks(self) -> list[int]:
        """All wanted blocks, each once, rising."""
        return _union(self.wanted)


class Lookahead:
    """Aims the teacher and has the work of steps made.

    Args:
        make: (step, blocks that are wanted, its batches) to its micro-batches, one at a time; must not wait for the
            device.
        ahead: make all micro-batches of a step as soon as it begins, beside whatever the device does.
    """

    def __init__(
        self,
        teacher: Teacher,
        make: Callable[[int, list[int], list[Batch]], Iterator[MicroBatch]],
        device: torch.device,
        *,
        ahead: bool,
    ) -> None:
        self._teacher = teacher
        self._make = make
        self._ahead = ahead
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # the first weights are still on their way

    def begin(self, step: int, wanted: Mapping[str, Sequence[int]], batches: list[Batch]) -> Work:
        """The work of optimizer step `step`. wanted: the blocks of each student. Collective where the teacher is."""
        blocks = _union(wanted)
        self._aim(blocks[-1])
        made = self._make(step, blocks, batches)
        if self._stream is not None:
            made = self._beside(made)
        elif self._ahead:
            made = iter(list(made))
        return Work(wanted, made, batches)

    def _aim(self, block: int) -> None:
        """Weights belong to the caller's stream: they come and go where no other stream reads them."""
        if self._teacher.block == block:
            return
        if self._stream is None:
            self._teacher.retarget(block)
            return
        current = torch.cuda.current_stream()
        current.wait_stream(self._stream)
        self._teacher.retarget(block)
        self._stream.wait_stream(current)

    def _beside(self, made: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Queue all of `made` on the own stream now; hand each over to the stream that asks for it."""
        queue: deque[tuple[MicroBatch, torch.cuda.Event]] = deque()
        with torch.cuda.stream(self._stream):
            for item in made:
                queue.append((item, self._stream.record_event()))
        return _handed_over(queue)


def _union(wanted: Mapping[str, Sequence[int]]) -> list[int]:
    return sorted({block for blocks in wanted.values() for block in blocks})


def _handed_over(queue: deque[tuple[MicroBatch, torch.cuda.Event]]) -> Iterator[MicroBatch]:
    current = torch.cuda.current_stream()
    while queue:
        item, done = queue.popleft()
        current.wait_event(done)
        for tensor in _tensors(item):
            tensor.record_stream(current)  # or its memory is used anew while a student still reads it
        yield item


def _tensors(item: MicroBatch) -> list[Tensor]:
    parts = (part for features in item.features.values() for part in features)
    found = [item.images, *item.labels.values(), *parts]
    return [tensor for tensor in found if tensor is not None]
