"""Frozen features of a labelled set, on the host, in an order that does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Optional

import torch
from torch import Tensor


class FeatureSet(NamedTuple):
    """Features (N, D) float32, labels (N,) int64 and sample ids (N,) int64, all on the host."""

    features: Tensor
    labels: Tensor
    ids: Tensor


@torch.no_grad()
def extract(
    model_fn: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],
    device: torch.device,
    limit: Optional[int] = None,
) -> FeatureSet:
    """Run `model_fn`, images (B, 3, H, W) -> features (B, D), over the (images, labels, ids) batches of `loader`.

    Stops after `limit` images, if given. `model_fn` answers for its own eval mode and autocast.
    """
    columns: tuple[list[Tensor], ...] = ([], [], [])
    count = 0
    for images, labels, ids in loader:
        keep = len(ids) if limit is None else min(len(ids), limit - count)
        features = model_fn(images[:keep].to(device, non_blocking=True)).float().cpu()
        for column, rows in zip(columns, (features, labels, ids), strict=True):
            column.append(rows[:keep])
        count += keep
        if count == limit:
            break
    if not columns[0]:  # fewer samples than ranks
        return FeatureSet(torch.empty(0, 0), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    return FeatureSet(*map(torch.cat, columns))


def merge(parts: list[FeatureSet]) -> FeatureSet:
    """One set of the ranks' shares, ordered by id, each sample once: streaming repeats some to fill the last batch."""
    whole = FeatureSet(*map(torch.cat, zip(*(part for part in parts if len(part.ids)), strict=True)))
    order = torch.argsort(whole.ids, stable=True)
    ids = whole.ids[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    return FeatureSet(*(column[order[first]] for column in whole))
