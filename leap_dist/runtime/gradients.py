"""A student's gradients: from the loss of each micro-batch, to their mean over ranks before the update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leap_dist.config import EngineConfig
from leap_dist.runtime.distributed import World


class Gradients:
    """Fills the gradients of an engine's module.

    At ZeRO stage 0 they are averaged here, in a flat buffer of which they are views until the update: one copy in, one
    sum over ranks, none out. DeepSpeed 0.19 would copy every one of them back, a launch for each parameter. The sum
    itself is DeepSpeed's, so whatever `engine.deepspeed` says of it holds, and so do its bits.
    """

    def __init__(self, engine: Any, config: EngineConfig, world: World) -> None:
        self._engine = engine
        self._accumulates = config.accumulation > 1
        self._groups: list[list[nn.Parameter]] = []
        if config.zero_stage == 0 and world.size > 1:
            trained = [p for p in engine.module.parameters() if p.requires_grad and p.numel()]
            dtypes = dict.fromkeys(p.dtype for p in trained)
            self._groups = [[p for p in trained if p.dtype == dtype] for dtype in dtypes]
            engine.enable_backward_allreduce = False

    def add(self, loss: Tensor) -> None:
        """Add those of a micro-batch's loss; with the last of a step all become their means over ranks. Collective."""
        self._engine.backward(loss, scale_wrt_gas=self._accumulates)  # a division by 1 is two launches
        if self._groups and self._engine.is_gradient_accumulation_boundary():
            for parameters in self._groups:
                self._average(parameters)

    def _average(self, parameters: list[nn.Parameter]) -> None:
        engine = self._engine
        # As DeepSpeed has it: every rank sums equally much, whether the loss has reached a parameter or not.
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = engine.allreduce_bucket(own, engine.seq_data_parallel_group, engine.dp_world_size)
        for parameter, mean in zip(parameters, engine.unflatten(flat, own), strict=True):
            parameter.grad = mean
