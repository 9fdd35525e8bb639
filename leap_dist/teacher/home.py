"""What the placements of a teacher share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from leap_dist.features import Features
from leap_dist.teacher.lazy import LazyBackbone


class Home:
    """Where the blocks up to the target live. Implements `leap_dist.teacher.Teacher` but for `features`."""

    def __init__(self, lazy: LazyBackbone) -> None:
        self.spec = lazy.spec
        self.block = 0
        self.blocks = lazy.backbone.blocks
        self._lazy = lazy

    def features(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to the final-normed tokens of block `self.block`, in the teacher's dtype."""
        raise NotImplementedError

    # no_grad, not inference_mode: inference tensors cannot be saved for the student's backward.
    @torch.no_grad()
    def sweep(self, images: Tensor) -> Iterator[Features]:
        """Features of the blocks 1..depth, in order, in one pass on this rank; a block that is not here visits it."""
        backbone = self._lazy.backbone
        tokens, context = backbone.embed(self._lazy.to_teacher(images)), backbone.context()
        for index in range(self.spec.depth):
            with self._at_hand(index):
                tokens = backbone.run_block(index, tokens, context)
            yield backbone.finish(tokens)

    def retarget(self, block: int) -> None:
        """Make 1-indexed `block` the target: load what this rank newly needs of it, drop what it does not.

        When the target grows, what the next block will ask of this rank is read ahead in the background.
        """
        if not 1 <= block <= self.spec.depth:
            raise ValueError(f"target block {block} is outside 1..{self.spec.depth} of {self.spec.model}")
        self._settle(block)
        growing = self.block < block < self.spec.depth
        self._lazy.expect(self._share(block + 1) if growing else ())
        self.block = block

    def resident_bytes(self) -> int:
        """Bytes of parameters on this rank's device, between two calls."""
        return self._lazy.resident_bytes()

    def _share(self, block: int) -> range:
        """The 0-indexed blocks that this rank must load for 1-indexed target `block`."""
        return range(block)

    def _settle(self, block: int) -> None:
        self._lazy.hold(self._share(block))

    def _at_hand(self, index: int) -> AbstractContextManager[None]:
        """A block is whole on this rank inside."""
        return self._lazy.visiting(index)
