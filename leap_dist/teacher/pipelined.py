"""The `pipelined` placement: neighbouring ranks form a pipeline, and each runs some of the blocks.

The images of all ranks of a pipeline travel through it in micro-batches; each rank gets the tokens of its own back and
applies the final norm to them. The embedding and the norm are small and on every rank; blocks are on one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from leap_dist.models import Features
from leap_dist.models.placement_plan import TeacherCosts
from leap_dist.runtime.distributed import Pipeline, World, build_pipeline, gather_on_first, scatter_from
from leap_dist.teacher.base import PlacedTeacher
from leap_dist.teacher.lazy_backbone import LazyBackbone


class PipelinedTeacher(PlacedTeacher):
    """Collective over the pipeline: its ranks call `features_of` equally often, with equally many images.

    With `rebalance` the blocks up to the target are spread over all stages anew at every advance; without, each stage
    keeps its part of the whole teacher. Each stage hands out the tokens of those of its blocks that are wanted, the
    last with a block always: stages past the target only give their images and take their tokens; a stage before it
    without a block passes on what it gets.
    """

    def __init__(
        self,
        lazy: LazyBackbone,
        world: World,
        costs: TeacherCosts,
        pipeline: Pipeline,
        *,
        microbatches: int,
        rebalance: bool,
    ) -> None:
        super().__init__(lazy, world)
        self._costs = costs
        self._pipeline = pipeline
        self._microbatches = microbatches
        self._rebalance = rebalance
        self._active = pipeline
        self._shortened = {pipeline.size: pipeline}
        self._schedules: dict[int, ScheduleGPipe] = {}
        self._wanted: Sequence[int] = ()
        self._kept: dict[int, list[Tensor]] = defaultdict(list)  # tokens of wanted blocks of this stage, by micro-batch
        self.retarget(1)

    @torch.no_grad()
    def features_of(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Features]:
        """Images (B, 3, H, W) to the final-normed tokens of `blocks`, which rise to `self.block` at most.

        B x stages must be a multiple of the micro-batches.
        """
        self._agree_on_pass(images, blocks)
        images = self._lazy.to_teacher(images)
        parts = gather_on_first(images, self._pipeline)
        if self._pipeline.rank < self._active.size:
            schedule = self._schedule(images)
            self._wanted = blocks
            self._kept.clear()
            schedule.eval(torch.cat(parts)) if parts else schedule.eval()
        return {block: self._handed_out(block, images) for block in blocks}

    def _handed_out(self, block: int, images: Tensor) -> Features:
        """This rank's images at a block, from the stage that has run it."""
        stage = bisect_left(self.bounds(self.block), block) - 1  # the block is 1-indexed, bounds are ends
        by_rank: list[Tensor] = []
        if stage == self._pipeline.rank:
            by_rank = list(torch.cat(self._kept.pop(block)).chunk(self._pipeline.size))
        mine = images.new_empty(len(images), *self._lazy.token_shape)
        return self._lazy.backbone.finish(scatter_from(stage, by_rank, mine, self._pipeline), block)

    def bounds(self, block: int) -> list[int]:
        """First block of each stage, 0-indexed, and the end, when 1-indexed `block` is the target."""
        planned = block if self._rebalance else self.spec.depth
        cuts = self._costs.bounds(planned, self._pipeline.size)
        return [min(cut, block) for cut in cuts]

    def _share(self, block: int) -> range:
        bounds = self.bounds(block)
        return range(bounds[self._pipeline.rank], bounds[self._pipeline.rank + 1])

    def _settle(self, block: int) -> None:
        super()._settle(block)
        self._schedules.clear()
        bounds = self.bounds(block)
        active = 1 + max(stage for stage, (low, high) in enumerate(pairwise(bounds)) if low < high)
        if active not in self._shortened:
            assert self._world is not None
            self._shortened[active] = build_pipeline(self._world, self._pipeline.size, active)
        self._active = self._shortened[active]

    def _schedule(self, images: Tensor) -> ScheduleGPipe:
        """The pipeline for batches of this size; its shapes are fixed, so that ranks need not tell each other."""
        if len(images) not in self._schedules:
            self._schedules[len(images)] = self._build(images)
        return self._schedules[len(images)]

    def _build(self, images: Tensor) -> ScheduleGPipe:
        rank, size = self._pipeline.rank, self._pipeline.size
        rows, rest = divmod(len(images) * size, self._microbatches)
        assert not rest, "torch.distributed.pipelining gives junk rows where micro-batches do not divide the batch"
        tokens = images.new_empty(rows, *self._lazy.token_shape)
        entering = images.new_empty(rows, *images.shape[1:]) if rank == 0 else tokens
        stage = PipelineStage(
            _Stage(self._stage_function()),
            rank, self._active.size, images.device, input_args=(entering,), output_args=(tokens,),
            group=self._active.handle,
        )  # fmt: skip
        return ScheduleGPipe(stage, n_microbatches=self._microbatches)

    def _stage_function(self) -> Callable[[Tensor], Tensor]:
        backbone, first, blocks = self._lazy.backbone, self._pipeline.rank == 0, self._share(self.block)

        def run(entering: Tensor) -> Tensor:
            tokens, context = backbone.embed(entering) if first else entering, backbone.context()
            for index in blocks:
                tokens = backbone.run_block(index, tokens, context)
                if index + 1 in self._wanted:
                    self._kept[index + 1].append(tokens)
            return tokens.contiguous()  # the sends insist on it; CaiT's embedding is a transposed view

        return run


class _Stage(nn.Module):
    """A function as the module that `PipelineStage` wants; it owns no parameters."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, entering: Tensor) -> Tensor:
        return self._run(entering)
