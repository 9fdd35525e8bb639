"""What the placements of a teacher share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Optional

import torch
from torch import Tensor

from leap_dist.models import Features
from leap_dist.runtime.distributed import World, checked_gather
from leap_dist.teacher.lazy_backbone import LazyBackbone


class PlacedTeacher:
    """Where the blocks up to the target live. Implements `leap_dist.teacher.Teacher` but for `features_of`.

    world: given where calls are collective; its ranks then make sure of each other on the host before they begin one.
    """

    def __init__(self, lazy: LazyBackbone, world: Optional[World] = None) -> None:
        self.spec = lazy.spec
        self.block = 0
        self.blocks = lazy.backbone.blocks
        self.fingerprint = lazy.fingerprint
        self.marks = lazy.marks
        self.stem = lazy.backbone.stem
        self._lazy = lazy
        self._world = world
        self._calls = 0

    def features(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to the final-normed tokens of block `self.block`, in the teacher's dtype."""
        return self.features_of(images, [self.block])[self.block]

    def features_of(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Features]:
        """Images (B, 3, H, W) to the final-normed tokens of several blocks, in one pass that ends at the target.

        blocks: 1-indexed, rising, none past the target `self.block`. Of other blocks no tokens are kept.
        """
        raise NotImplementedError

    # no_grad, not inference_mode: inference tensors cannot be saved for the student's backward.
    @torch.no_grad()
    def sweep(self, images: Tensor, until: Optional[int] = None) -> Iterator[Features]:
        """Features of the blocks 1..until (None: the last), in order, in one pass; a block that is not here visits."""
        until = until or self.spec.depth
        self._agree(f"{len(images)} images through the blocks 1 to {until}")
        self._lazy.judge(until)
        backbone = self._lazy.backbone
        tokens, context = backbone.embed(self._lazy.to_teacher(images)), backbone.context()
        for index in range(until):
            with self._at_hand(index):
                tokens = backbone.run_block(index, tokens, context)
            yield backbone.finish(tokens, index + 1)

    def retarget(self, block: int) -> None:
        """Make 1-indexed `block` the target: load what this rank newly needs of it, drop what it does not.

        When the target grows, what the next block will ask of this rank is read ahead in the background.
        """
        if not 1 <= block <= self.spec.depth:
            raise ValueError(f"target block {block} is outside 1..{self.spec.depth} of {self.spec.model}")
        self._agree(f"its move to block {block}")
        self._lazy.judge(block)
        self._settle(block)
        growing = self.block < block < self.spec.depth
        self._lazy.expect(self._share(block + 1) if growing else ())
        self.block = block

    def resident_bytes(self) -> int:
        """Bytes of parameters on this rank's device, between two calls."""
        return self._lazy.resident_bytes()

    def _agree_on_pass(self, images: Tensor, blocks: Sequence[int]) -> None:
        """`_agree` on a pass that gives the tokens of `blocks`."""
        on_the_way = f" by way of {', '.join(map(str, blocks[:-1]))}" if len(blocks) > 1 else ""
        self._agree(f"{len(images)} images to block {self.block}{on_the_way}")

    def _agree(self, call: str) -> None:
        """Raise UserError, naming a rank, unless all ranks have come to the same call in the same order."""
        if self._world is not None:
            self._calls += 1
            checked_gather(f"teacher call {self._calls}: {call}", [], self._world)

    def _share(self, block: int) -> range:
        """The 0-indexed blocks that this rank must load for 1-indexed target `block`."""
        return range(block)

    def _settle(self, block: int) -> None:
        self._lazy.hold(self._share(block))

    def _at_hand(self, index: int) -> AbstractContextManager[None]:
        """A block is whole on this rank inside."""
        return self._lazy.visiting(index)
