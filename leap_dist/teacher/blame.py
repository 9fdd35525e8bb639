"""Whose fault a non-finite loss is: the teacher is asked when there is one, so that looking costs a step nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Optional

import torch
from torch import Tensor

from leap_dist.config import TeacherConfig
from leap_dist.runtime.distributed import World, gather_objects
from leap_dist.teacher import Teacher


def teacher_fault(
    teacher: Teacher, images: Iterable[Tensor], until: int, config: TeacherConfig, world: World
) -> Optional[str]:
    """Which of the blocks 1..until gives non-finite features of `images`, micro-batches (B, 3, H, W); None: none does.

    In words, the same on every rank. Collective: all ranks have equally many micro-batches of one size.
    """
    first = until + 1
    for batch in images:
        for block, features in enumerate(teacher.sweep(batch, until), 1):
            if not all(bool(part.isfinite().all()) for part in features if part is not None):
                first = min(first, block)  # no break: a sweep may be collective
    first = min(gather_objects(first, world))
    if first > until:
        return None
    teacher.retarget(first)  # a sweep may have let it go; the run ends here anyway
    names = sorted({name for found in gather_objects(_unsound(teacher, first), world) for name in found})
    if names:
        why = f"its weights are not finite in {config.dtype}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    else:
        why = f"its weights are finite, so they overflow in teacher.dtype={config.dtype}"
    return f"block {first} of teacher.weights={config.weights} gives non-finite features ({why})"


def _unsound(teacher: Teacher, block: int) -> list[str]:
    """Parameters, of a block or of the stem with norm and classifier, that this rank holds and that are not finite."""
    named = [*teacher.blocks[block - 1].named_parameters(), *teacher.stem.named_parameters()]
    here = ((name, parameter) for name, parameter in named if not parameter.is_meta)
    return [name for name, parameter in here if not bool(torch.isfinite(parameter).all())]
