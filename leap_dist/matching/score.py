"""What one optimizer step says about the alignment of student and teacher, gathered over micro-batches and ranks.

Two kinds with one interface. `merged` adds another micro-batch of this rank. `score` is the scalar of this rank's rows,
a 0-d tensor that never left the device. `share` is what a rank adds to one sum over ranks, 1-D, and `total` the scalar
of all ranks' rows from that sum. `linear_cka` is that of `leap_dist.matching.cka`, or what torch has compiled of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import Tensor

from leap_dist.matching import cka
from leap_dist.runtime.distributed import World
from leap_kernels import Moments

Summed = Callable[[Tensor], Tensor]  # a tensor to its sum over ranks; it may work in place
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

    def score(self, linear_cka: LinearCka = cka.linear_cka) -> Tensor:
        return linear_cka(self.moments, self.weight)

    def share(self, reduction: str, world: World, linear_cka: LinearCka = cka.linear_cka) -> Tensor:
        if reduction == "exact":
            return cka.share_of(self.moments, world.rank, world.size)
        return self.score(linear_cka)[None]

    def total(self, summed: Tensor, reduction: str, world: World, linear_cka: LinearCka = cka.linear_cka) -> Tensor:
        """Linear CKA of the global batch (`exact`), or the mean of the ranks' own CKAs (`mean`, as LEAP; biased)."""
        if reduction == "exact":
            return linear_cka(cka.merged_shares(summed, self.moments, world.size), self.weight)
        return summed[0] / world.size


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

    def score(self, linear_cka: LinearCka = cka.linear_cka) -> Tensor:
        total, count = self.totals
        return total / count

    def share(self, reduction: str, world: World, linear_cka: LinearCka = cka.linear_cka) -> Tensor:
        return self.totals

    def total(self, summed: Tensor, reduction: str, world: World, linear_cka: LinearCka = cka.linear_cka) -> Tensor:
        """Mean cosine per token; equal on every rank's share, so both reductions are the same number."""
        return CosineEvidence(summed).score()


Evidence = Union[CkaEvidence, CosineEvidence]


@torch.no_grad()
def over_ranks(
    losses: Tensor,
    evidence: Optional[Evidence],
    reduction: str,
    world: World,
    summed: Summed,
    linear_cka: LinearCka = cka.linear_cka,
) -> tuple[Tensor, Tensor]:
    """Means of a rank's losses (L,) over ranks, and the score of all, NaN without evidence, from one sum over ranks.

    reduction: `curriculum.reduction`, how ranks' scores become one.
    On the device; waits for nothing.
    """
    if world.size == 1:
        return losses, _nothing(losses) if evidence is None else evidence.score(linear_cka)
    if evidence is None:
        return summed(losses.clone()) / world.size, _nothing(losses)
    total = summed(torch.cat([losses, evidence.share(reduction, world, linear_cka)]))  # in the wider dtype of the two
    means, found = total.split([len(losses), len(total) - len(losses)])
    return (means / world.size).to(losses.dtype), evidence.total(found, reduction, world, linear_cka)


def _nothing(like: Tensor) -> Tensor:
    return like.new_full((), math.nan)
