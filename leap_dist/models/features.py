"""What a backbone, frozen or trained, gives: patch tokens and, where it has one, the class token."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch.nn.functional as F
from torch import Tensor


class Features(NamedTuple):
    """Final-normed tokens of one batch.

    patch: (B, N, D), in row-major order of the token grid; prefix tokens (CLS, registers) are cut off.
    cls:   (B, D), or None where the backbone has no class token at that depth.
    logits: (B, classes), a teacher's own, at its last block and where they are wanted.
    """

    patch: Tensor
    cls: Optional[Tensor]
    logits: Optional[Tensor] = None


def on_grid(tokens: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Patch tokens (B, N, D) of `grid` (rows, columns), resized bilinearly to `wanted`."""
    if grid == wanted:
        return tokens
    image = tokens.unflatten(1, grid).movedim(-1, 1)
    return F.interpolate(image, wanted, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
