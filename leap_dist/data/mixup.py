"""LEAP's mixup, with pairs that do not depend on how the global batch is spread over ranks and micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from leap_dist.errors import UserError


def check_groups(group_size: int, micro_batch: int) -> None:
    """Raise UserError unless whole groups of `group_size` images lie in every micro-batch of `micro_batch`."""
    if micro_batch % group_size:
        valid = ", ".join(str(size) for size in range(2, micro_batch + 1) if micro_batch % size == 0) or "none"
        raise UserError(
            f"data.mixup_group={group_size}: must divide the micro-batch of {micro_batch} images "
            f"(data.global_batch / ranks / engine.accumulation); valid: {valid}"
        )


def partners(groups: int, group_size: int, generator: torch.Generator) -> Tensor:
    """Whom each image of a global batch of groups x group_size is mixed with: (groups x group_size,) int64 positions.

    Group g holds the positions g, g + groups, g + 2 groups, ...: whole groups fall to one rank, whichever of the
    possible numbers of ranks and micro-batches shares the batch. The members of a group follow one another in a random
    ring, so every image meets another one: of LEAP's permutation of the whole batch one image in expectation stays
    alone, of permutations of groups it would be one per group.
    """
    ring = torch.rand(groups, group_size, generator=generator).argsort(1)
    member = torch.empty_like(ring).scatter_(1, ring, ring.roll(-1, 1))
    return (member.T * groups + torch.arange(groups)).reshape(-1)


def mixup(
    images: Tensor, positions: Tensor, *, global_batch: int, group_size: int, generator: torch.Generator
) -> Tensor:
    """lam * images + (1 - lam) * their partners, one lambda ~ U(0, 1) for the whole global batch (arXiv 2606.19483).

    images: (B, ...) on any device; positions: (B,) int64 on the host, where each stands in the global batch, whole
    groups; generator: on the host, seeded alike on all ranks, so that drawing needs neither a GPU nor a message.
    """
    lam = torch.rand((), generator=generator).item()
    row = torch.full((global_batch,), -1)
    row[positions] = torch.arange(len(positions))
    rows = row[partners(global_batch // group_size, group_size, generator)[positions]]
    assert (rows >= 0).all(), "a mixup group is split over micro-batches"
    if images.is_cuda:  # a copy from pageable memory may make the host wait for the stream
        rows = rows.pin_memory().to(images.device, non_blocking=True)
    return images.index_select(0, rows).lerp_(images, lam)
