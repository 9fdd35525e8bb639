"""The `replicated` placement: every rank holds the blocks up to the target and runs its own images."""

from __future__ import annotations

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
    def features(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to the final-normed tokens of block `self.block`, in the teacher's dtype."""
        return self._lazy.backbone(self._lazy.to_teacher(images), self.block)
