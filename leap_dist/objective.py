"""The trainable module: student and head(s), matched to teacher tokens (LEAP, section 3).

loss = MSE(head(student patch), teacher patch) + cls_weight * MSE(head(student CLS), teacher CLS)
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_dist.config import ObjectiveConfig, matching_head
from leap_dist.errors import UserError
from leap_dist.evidence import Evidence
from leap_dist.features import Features
from leap_dist.heads import build_head
from leap_dist.student import Student


class Match(NamedTuple):
    """Losses of one micro-batch (0-d, float32; the mean over targets) and, on request, evidence for each target."""

    loss: Tensor
    patch_loss: Tensor
    cls_loss: Tensor
    evidence: list[Evidence]


class Objective(nn.Module):
    """Student and head(s) as one module, so that DeepSpeed shards, clips and checkpoints them together.

    One head serves every target (LEAP keeps it through all blocks), or, with `every_layer`, head i matches student
    layer i to target i.

    Args:
        teacher_width: Dt.
        teacher_grid: (rows, columns) of the teacher's patch tokens; student tokens are resized to it.
        num_targets: teacher depth in mode all_layers, else 1.
    """

    def __init__(
        self,
        student: Student,
        teacher_width: int,
        teacher_grid: tuple[int, int],
        config: ObjectiveConfig,
        metric: Literal["cka", "cosine"] = "cka",
        num_targets: int = 1,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher_grid = teacher_grid
        self.cls_weight = config.cls_weight
        self.every_layer = num_targets > 1
        kind = matching_head(config, student.recipe.remedy)
        self.heads = nn.ModuleList(
            build_head(kind, student.width, teacher_width, config.impl, metric) for _ in range(num_targets)
        )

    def forward(self, images: Tensor, targets: list[Features], with_evidence: bool = False) -> Match:
        """Match the student's view of `images` (B,3,H,W) to each of `targets`.

        Raises:
            UserError: a target whose number of patch tokens is not that of the teacher's grid.
        """
        views = self.student.every_layer(images) if self.every_layer else [self.student(images)] * len(targets)
        patch_losses, cls_losses, evidence = [], [], []
        for index, (view, target) in enumerate(zip(views, targets, strict=True)):
            head = self.heads[index if self.every_layer else 0]
            loss, proof = head(self._on_teacher_grid(view.patch, target), target.patch, with_evidence)
            patch_losses.append(loss)
            evidence += [proof] if proof is not None else []
            if self.cls_weight:
                cls_losses.append(head(view.cls, target.cls)[0])
        patch_loss = torch.stack(patch_losses).mean()
        cls_loss = torch.stack(cls_losses).mean() if cls_losses else torch.zeros_like(patch_loss)
        loss = patch_loss + self.cls_weight * cls_loss
        return Match(loss, patch_loss.detach(), cls_loss.detach(), evidence)

    def _on_teacher_grid(self, tokens: Tensor, target: Features) -> Tensor:
        """(B, N, Ds) -> (B, Nt, Ds), bilinear. Before the head: resizing and a linear map commute, and Ds < Dt."""
        rows, columns = self.teacher_grid
        if target.patch.shape[1] != rows * columns:
            raise UserError(
                f"the teacher gave {target.patch.shape[1]} patch tokens, its grid is {rows}x{columns}: "
                "images are not of the size it was built for"
            )
        if self.student.grid == self.teacher_grid:
            return tokens
        image = tokens.unflatten(1, self.student.grid).movedim(-1, 1)
        resized = F.interpolate(image, self.teacher_grid, mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)
