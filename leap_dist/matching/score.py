"""What one optimizer step says about the alignment of student and teacher, gathered over micro-batches and ranks.

Two kinds with one interface: `merged` adds another micro-batch of this rank, `score` is the scalar over all ranks,
a 0-d tensor that never left the device. `summed` takes a tensor and returns its sum over ranks; `linear_cka` is that of
`leap_dist.matching.cka`, or what torch has compiled of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import Tensor

from leap_dist.matching import cka
from leap_dist.runtime.distributed import sum_over_ranks
from leap_kernels import Moments

Summed = Callable[[Tensor], Tensor]
LinearCka = Callable[[Moments, Optional[Tensor]], Tensor]


@dataclass(frozen=True)
class CkaEvidence:
    """Moments of student (M,Ds) and teacher (M,Dt) tokens, and the head's weight (Dt,Ds) they were matched with.

    weight: None where they were matched as they are.
    """

    moments: Moments
    weight: Optional[Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All it holds."""
        return tuple(self.moments) if self.weight is None else (*self.moments, self.weight)

    def merged(self, other: CkaEvidence) -> CkaEvidence:
        return CkaEvidence(cka.merge(self.moments, other.moments), self.weight)

    def score(
        self,
        reduction: str,
        ranks: int,
        summed: Summed = sum_over_ranks,
        linear_cka: LinearCka = cka.linear_cka,
    ) -> Tensor:
        """Linear CKA of the global batch (`exact`), or the mean of the ranks' own CKAs (`mean`, as LEAP; biased)."""
        if reduction == "exact" and ranks > 1:
            return linear_cka(cka.merge_over_ranks(self.moments, summed), self.weight)
        return summed(linear_cka(self.moments, self.weight)) / ranks


@dataclass(frozen=True)
class CosineEvidence:
    """Sum over patch tokens of the cosine between projected student and teacher token, and their number: (2,)."""

    totals: Tensor

    @classmethod
    def of(cls, projected: Tensor, teacher: Tensor) -> CosineEvidence:
        """From matching tokens (..., Dt)."""
        mean, count = cka.mean_cosine(projected, teacher), projected.shape[:-1].numel()
        return cls(torch.stack([mean * count, mean.new_full((), count)]))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All it holds."""
        return (self.totals,)

    def merged(self, other: CosineEvidence) -> CosineEvidence:
        return CosineEvidence(self.totals + other.totals)

    def score(
        self,
        reduction: str,
        ranks: int,
        summed: Summed = sum_over_ranks,
        linear_cka: LinearCka = cka.linear_cka,
    ) -> Tensor:
        """Mean cosine per token; equal on every rank's share, so both reductions are the same number."""
        total, count = summed(self.totals.clone())
        return total / count


Evidence = Union[CkaEvidence, CosineEvidence]
