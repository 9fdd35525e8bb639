"""The `replicated` home of a teacher: every rank holds the blocks up to the target and runs its own images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from leap_dist.backbone import Backbone
from leap_dist.features import Features


class ReplicatedTeacher:
    """No communication. Blocks past the target wait on the host and move over when the curriculum gets there."""

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self.spec = backbone.spec
        self.block = 0
        self._backbone = backbone
        self._device = device
        self._dtype = next(backbone.parameters()).dtype
        backbone.stem.to(device)
        self.retarget(1)

    # no_grad, not inference_mode: inference tensors cannot be saved for the student's backward.
    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to the final-normed tokens of block `self.block`, in the teacher's dtype."""
        return self._backbone(self._to_teacher(images), self.block)

    @torch.no_grad()
    def sweep(self, images: Tensor) -> Iterator[Features]:
        """Features of the blocks 1..depth, in order, in one pass; a block past the target visits the device."""
        backbone = self._backbone
        tokens, context = backbone.embed(self._to_teacher(images)), backbone.context()
        for index, block in enumerate(backbone.blocks):
            block.to(self._device)
            tokens = backbone.run_block(index, tokens, context)
            if index >= self.block:
                block.to("cpu")
            yield backbone.finish(tokens)

    def retarget(self, block: int) -> None:
        """Make 1-indexed `block` the target: what it newly needs moves to the device, what it does not leaves."""
        if not 1 <= block <= self.spec.depth:
            raise ValueError(f"target block {block} is outside 1..{self.spec.depth} of {self.spec.model}")
        for index, module in enumerate(self._backbone.blocks):
            module.to(self._device if index < block else "cpu")
        self.block = block

    def resident_bytes(self) -> int:
        """Bytes of parameters on the device (on a CPU, where device and host are one: all of them)."""
        here = (p for p in self._backbone.parameters() if p.device.type == self._device.type)
        return sum(p.numel() * p.element_size() for p in here)

    def _to_teacher(self, images: Tensor) -> Tensor:
        return images.to(self._device, self._dtype)
