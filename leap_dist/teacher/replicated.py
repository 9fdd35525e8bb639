"""The `replicated` placement: every rank holds the blocks up to the target and runs its own images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leap_dist.models import Features
from leap_dist.teacher.base import PlacedTeacher
from leap_dist.teacher.lazy_backbone import LazyBackbone


class ReplicatedTeacher(PlacedTeacher):
    """No communication."""

    def __init__(self, lazy: LazyBackbone) -> None:
        super().__init__(lazy)
        self.retarget(1)

    @torch.no_grad()
    def features_of(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Features]:
        """Images (B, 3, H, W) to the final-normed tokens of `blocks`, which rise to `self.block` at most."""
        return self._lazy.backbone.several(self._lazy.to_teacher(images), blocks, self.block)
