"""Frozen features of a labelled set, on the host, in an order that does not depend on the number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from leap_dist.errors import UserError

_T = TypeVar("_T")


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
) -> FeatureSet:
    """Run `model_fn`, images (B, 3, H, W) -> features (B, D), over the (images, labels, ids) batches of `loader`.

    `model_fn` answers for its own eval mode and autocast.
    """
    batches = [
        FeatureSet(model_fn(images.to(device, non_blocking=True)).float().cpu(), labels, ids)
        for images, labels, ids in loader
    ]
    return FeatureSet(*map(torch.cat, zip(*batches, strict=True)))


def check_finite(*sets: FeatureSet, whose: str = "the judged model") -> None:
    """Raise UserError if a feature is infinite or no number: every distance to it is too, and any class might win.

    whose: they are, for the message.
    """
    for found in sets:
        bad = ~found.features.isfinite().all(1)
        if bad.any():
            raise UserError(
                f"evaluation: features of {len(found.ids[bad].unique())} of {len(found.ids.unique())} images are not "
                f"finite; the weights of {whose} hold NaN, or its precision overflows"
            )


def in_step(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]], size: int, count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Exactly `count` batches of `size` rows, so that ranks with unequal shares can run a collective model together.

    What is short or missing repeats rows, with their ids, which `merge` drops again. `batches`, of which there are at
    most `count`, are run to their end: there a loader tells what it left out.
    """
    # The range second: only so is a batch asked for after the last one, and the loader resumed behind its loop.
    for batch, _ in zip(_repeating_last(batches), range(count), strict=False):
        rows = torch.arange(size) % len(batch[2])
        yield batch[0][rows], batch[1][rows], batch[2][rows]


def _repeating_last(items: Iterable[_T]) -> Iterator[_T]:
    for item in items:
        yield item
    yield from itertools.repeat(item)


def labelled(found: FeatureSet) -> FeatureSet:
    """The rows that have a label; the set itself if all have."""
    known = found.labels >= 0
    return found if known.all() else FeatureSet(*(column[known] for column in found))


def merge(parts: list[FeatureSet]) -> FeatureSet:
    """One set of the ranks' shares, ordered by id, each sample once: short shares repeat some."""
    whole = FeatureSet(*map(torch.cat, zip(*parts, strict=True)))
    order = torch.argsort(whole.ids, stable=True)
    ids = whole.ids[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    return FeatureSet(*(column[order[first]] for column in whole))
