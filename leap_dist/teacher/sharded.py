"""The `sharded` placement: every rank holds a share of every block up to the target, and runs its own images.

Blocks are split by DeepSpeed's ZeRO-3, each on its own: a block is gathered while the one before it runs and let go
once it has run. There is no engine around them: its trace of an earlier, deeper pass makes it gather blocks that a
shorter one never reaches (measured, DeepSpeed 0.19.8). Here nothing past the target can be gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leap_dist.models import Features
from leap_dist.runtime.distributed import World
from leap_dist.teacher.base import PlacedTeacher
from leap_dist.teacher.lazy_backbone import LazyBackbone

_ZERO = {
    "train_micro_batch_size_per_gpu": 1,  # DeepSpeed insists on it; nothing reads it here
    # Its memory-efficient linear would replace `F.linear` for the whole process, the student's too.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False},
}


class ShardedTeacher(PlacedTeacher):
    """Collective: all ranks call `features_of`, `sweep` and `retarget` equally often, in the same order.

    The stem (embedding, final norm) is whole on every rank. group: of all ranks, for the blocks alone: in one that the
    student shares, its backward pass would wait for every block that the teacher, working ahead, has asked for.
    """

    def __init__(self, lazy: LazyBackbone, world: World, group: Any) -> None:
        super().__init__(lazy, world)
        self._group = group
        self.retarget(1)

    @torch.no_grad()
    def features_of(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Features]:
        """Images (B, 3, H, W) to the final-normed tokens of `blocks`, which rise to `self.block` at most."""
        self._agree_on_pass(images, blocks)
        backbone, run, found = self._lazy.backbone, self._lazy.backbone.blocks[: self.block], {}
        coming = _start_gather(run[0])
        tokens, context = backbone.embed(self._lazy.to_teacher(images)), backbone.context()
        for index, block in enumerate(run):
            coming.wait()
            coming = None  # its buffer is the block's own from here on
            if index + 1 < self.block:
                coming = _start_gather(run[index + 1])
            tokens = backbone.run_block(index, tokens, context)
            _release(block)
            if index + 1 in blocks:
                found[index + 1] = backbone.finish(tokens, index + 1)
        return found

    def _settle(self, block: int) -> None:
        """Load and split what is new, a block at a time; DeepSpeed takes rank 0's values."""
        self._lazy.hold(range(min(self.block, block)))
        for index in range(self.block, block):
            self._lazy.load(index)
            _split(self._lazy.backbone.blocks[index], self._group)

    def _share(self, block: int) -> range:
        return range(self.block, block)

    def _at_hand(self, index: int) -> AbstractContextManager[None]:
        return _gathered(self._lazy.backbone.blocks[index]) if index < self.block else super()._at_hand(index)


def _split(module: nn.Module, group: Any) -> None:
    import deepspeed  # seconds to import

    deepspeed.zero.Init(module=module, config_dict_or_path=_ZERO, data_parallel_group=group)


def _start_gather(module: nn.Module) -> Any:
    """Begin to gather a split module; it is whole after `wait()` on what is returned."""
    parameters = list(module.parameters())
    return parameters[0].all_gather_coalesced(parameters)


def _release(module: nn.Module) -> None:
    parameters = list(module.parameters())
    parameters[0].partition(param_list=parameters)


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    _start_gather(module).wait()
    yield
    _release(module)
