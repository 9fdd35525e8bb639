"""Linear segmentation on frozen patch tokens: BatchNorm and one linear layer, judged at the masks' own resolution.

Masks that are shrunk before they are compared give another figure: a re-implementation lost six points by it. So logits
are enlarged to the mask, and mIoU is of one confusion matrix over the whole set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = 255


class Head(nn.Module):
    """BatchNorm and a linear layer on tokens: (B, D, H, W) -> logits (B, C, H, W)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.norm(tokens))


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(C, C) int64, pixels by true class and predicted one; pixels whose truth is IGNORED do not count."""
    known = truth != IGNORED
    cells = truth[known].long() * classes + predicted[known].long()
    return torch.bincount(cells.flatten(), minlength=classes * classes).view(classes, classes).cpu()


def miou(matrix: Tensor) -> float:
    """Mean over classes of intersection over union, 0 to 1; a class that is in neither truth nor prediction is out."""
    hits = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return (hits[union > 0] / union[union > 0]).mean().item()


def windows(length: int, side: int) -> list[int]:
    """Where windows of `side` begin that cover `length`, a third overlapping at least, the last one at the end."""
    if length <= side:
        return [0]
    count = -(-(length - side) // max(1, side * 2 // 3)) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


@torch.no_grad()
def segment(image: Tensor, size: Sequence[int], side: int, classes: int, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """Class (h, w) of every pixel of a mask of `size` (h, w), from an image (3, H, W) by windows of `side` pixels.

    logits: windows (B, 3, side, side) -> (B, C, side, side). Where windows overlap, their mean counts.
    """
    height, width = image.shape[-2:]
    total = torch.zeros(classes, height, width, device=image.device)
    count = torch.zeros(height, width, device=image.device)
    for top in windows(height, side):
        for left in windows(width, side):
            part = (slice(top, top + side), slice(left, left + side))
            total[(slice(None), *part)] += logits(image[(slice(None), *part)][None])[0]
            count[part] += 1
    whole = F.interpolate((total / count)[None], tuple(size), mode="bilinear", align_corners=False)
    return whole[0].argmax(0)
