"""What a backbone, frozen or trained, gives: patch tokens and, where it has one, the class token."""

from __future__ import annotations

from typing import NamedTuple, Optional

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
