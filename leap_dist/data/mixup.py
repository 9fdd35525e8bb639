"""Mixup and CutMix, with pairs that do not depend on how the global batch is spread over ranks and micro-batches."""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor

from leap_dist.config import DataConfig
from leap_dist.data.chance import seeded
from leap_dist.errors import UserError

CUT_SHARE = 0.5  # of the steps, where both are on: timm's switch_prob


def check_groups(group_size: int, micro_batch: int) -> None:
    """Raise UserError unless whole groups of `group_size` images lie in every micro-batch of `micro_batch`."""
    if micro_batch % group_size:
        valid = ", ".join(str(size) for size in range(2, micro_batch + 1) if micro_batch % size == 0) or "none"
        raise UserError(
            f"data.mixup_group={group_size}: must divide the micro-batch of {micro_batch} images "
            f"(data.global_batch / ranks / engine.accumulation); valid: {valid}"
        )


def partners(groups: int, group_size: int, generator: torch.Generator) -> np.ndarray:
    """Whom each image of a global batch of groups x group_size is mixed with: (groups x group_size,) int64 positions.

    Group g holds the positions g, g + groups, g + 2 groups, ...: whole groups fall to one rank, whichever of the
    possible numbers of ranks and micro-batches shares the batch. The members of a group follow one another in a random
    ring, so every image meets another one: of LEAP's permutation of the whole batch one image in expectation stays
    alone, of permutations of groups it would be one per group.
    """
    ring = torch.rand(groups, group_size, generator=generator).argsort(1).numpy()
    member = np.empty_like(ring)
    np.put_along_axis(member, ring, np.roll(ring, -1, 1), 1)
    return (member.T * groups + np.arange(groups)).reshape(-1)


class Mix(NamedTuple):
    """How a micro-batch is mixed, images and labels alike.

    lam: what each sample keeps of itself; rows: (B,) int64 on the host, who gives it the rest; box: (top, bottom, left,
    right) of the pixels that it gives (CutMix), or None where the two are blended (mixup).
    """

    lam: float
    rows: Tensor
    box: Optional[tuple[int, int, int, int]] = None

    def images(self, images: Tensor) -> Tensor:
        """(B, ..., H, W) on any device, mixed."""
        if self.box is None:
            return self._blended(images)
        top, bottom, left, right = self.box
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[..., top:bottom, left:right][self._rows_on(images)]
        return mixed

    def labels(self, labels: Tensor) -> Tensor:
        """Soft labels (B, classes), mixed as the images are."""
        return self._blended(labels)

    def _blended(self, values: Tensor) -> Tensor:
        return values.index_select(0, self._rows_on(values)).lerp_(values, self.lam)

    def _rows_on(self, values: Tensor) -> Tensor:
        # A copy from pageable memory may make the host wait for the stream.
        return self.rows.pin_memory().to(values.device, non_blocking=True) if values.is_cuda else self.rows


def draw_mix(config: DataConfig, positions: Tensor, generator: torch.Generator) -> Mix:
    """One lambda for the whole global batch: ~ Beta(mixup_alpha, mixup_alpha), which LEAP has at 1 (arXiv 2606.19483).

    With `cutmix_alpha` every other batch, by chance, is cut instead, as by timm's Mixup(mode="batch"); lambda is then
    what the box leaves.

    positions: (B,) int64 on the host, where each sample stands in the global batch, whole groups; generator: on the
    host, seeded alike on all ranks, so that drawing needs neither a GPU nor a message.
    """
    uniform, box = torch.rand((), generator=generator).item(), None
    cuts = config.cutmix_alpha > 0 and torch.rand((), generator=generator).item() < CUT_SHARE
    alpha = config.cutmix_alpha if cuts else config.mixup_alpha
    from scipy.special import betaincinv  # half a second, and not for who only loads a student

    lam = float(betaincinv(alpha, alpha, uniform))  # the quantile function of Beta; at 1, the number itself
    if cuts:
        with seeded(int(torch.randint(2**62, (), generator=generator))):
            box, lam = cutmix_bbox_and_lam((config.image_size, config.image_size), lam)
    places = positions.numpy()  # few numbers: in numpy each of these takes a fraction of torch's microseconds
    row = np.full(config.global_batch, -1)
    row[places] = np.arange(len(places))
    groups = config.global_batch // config.mixup_group
    rows = row[partners(groups, config.mixup_group, generator)[places]]
    assert (rows >= 0).all(), "a mixup group is split over micro-batches"
    return Mix(lam, torch.from_numpy(rows), box)
