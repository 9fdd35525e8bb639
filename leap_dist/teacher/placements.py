"""From `teacher.placement` to a teacher placed so, and the one whose placement changes as the curriculum advances."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Optional

from torch import Tensor

from leap_dist.config import TeacherConfig
from leap_dist.models import Features, TeacherFlops, teacher_costs
from leap_dist.models.placement_plan import GIB, Choice, choose, pipeline_size
from leap_dist.runtime.allocator import return_freed_memory
from leap_dist.runtime.distributed import World, build_pipeline, own_group
from leap_dist.teacher.base import PlacedTeacher
from leap_dist.teacher.lazy_backbone import LazyBackbone
from leap_dist.teacher.pipelined import PipelinedTeacher
from leap_dist.teacher.replicated import ReplicatedTeacher
from leap_dist.teacher.sharded import ShardedTeacher

log = logging.getLogger(__name__)


def build_placed(
    config: TeacherConfig, image_size: int, lazy: LazyBackbone, world: World, flops: TeacherFlops
) -> PlacedTeacher | AutoTeacher:
    """The teacher in its configured placement, its target block 1. Collective over all ranks."""
    return_freed_memory()
    costs = teacher_costs(config, image_size, flops, lazy.backbone.classes)
    stages = pipeline_size(config, world.local_size)
    makers: dict[str, Callable[[], PlacedTeacher]] = {"replicated": lambda: ReplicatedTeacher(lazy)}
    if config.placement in ("sharded", "auto"):
        group = own_group(world)
        makers["sharded"] = lambda: ShardedTeacher(lazy, world, group)
    if config.placement != "sharded" and stages > 1:
        pipeline = build_pipeline(world, stages)
        makers["pipelined"] = lambda: PipelinedTeacher(
            lazy, world, costs, pipeline, microbatches=config.microbatches, rebalance=config.rebalance
        )
    if config.placement != "auto":
        return makers[config.placement]()
    budget = (config.memory_budget or 0) * GIB

    def chosen(block: int) -> Choice:
        return choose(costs, block, budget=budget, stages=stages, ranks=world.size)

    return AutoTeacher(lazy, makers, chosen)


class AutoTeacher:
    """Lives where `choose` says, decided anew at every target. All ranks decide alike, from the same numbers."""

    def __init__(
        self, lazy: LazyBackbone, makers: Mapping[str, Callable[[], PlacedTeacher]], chosen: Callable[[int], Choice]
    ) -> None:
        self.spec = lazy.spec
        self.blocks = lazy.backbone.blocks
        self.fingerprint = lazy.fingerprint
        self.marks = lazy.marks
        self.stem = lazy.backbone.stem
        self._lazy = lazy
        self._makers = makers
        self._chosen = chosen
        chosen(self.spec.depth)  # a budget too small for the last block is said now, not after days
        self.placement = self._placement_for(1)
        self._placed = makers[self.placement]()

    @property
    def block(self) -> int:
        """Current target, 1-indexed."""
        return self._placed.block

    def features(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to the final-normed tokens of block `self.block`, in the teacher's dtype."""
        return self._placed.features(images)

    def features_of(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Features]:
        """Images (B, 3, H, W) to the final-normed tokens of `blocks`, which rise to `self.block` at most."""
        return self._placed.features_of(images, blocks)

    def sweep(self, images: Tensor, until: Optional[int] = None) -> Iterator[Features]:
        """Features of the blocks 1..until (None: the last), in order, in one pass."""
        return self._placed.sweep(images, until)

    def retarget(self, block: int) -> None:
        """Make 1-indexed `block` the target, wherever it fits. A move starts from empty memory."""
        placement = self._placement_for(block)
        if placement != self.placement:
            self._lazy.hold(())
            self.placement, self._placed = placement, self._makers[placement]()
        self._placed.retarget(block)

    def resident_bytes(self) -> int:
        """Bytes of parameters on this rank's device, between two calls."""
        return self._placed.resident_bytes()

    def _placement_for(self, block: int) -> str:
        placement, reason = self._chosen(block)
        log.info("teacher block %d of %d: %s (%s)", block, self.spec.depth, placement, reason)
        return placement
