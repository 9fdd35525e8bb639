"""FLOPs of a backbone, piece by piece, counted by torch on a model without memory.

A FLOP is one multiplication or one addition (two per multiply-accumulate). Matrix products, convolutions and
attention count; norms, activations and additions, together well under 1 %, do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from leap_dist.backbone import DTYPES, build_model, split
from leap_dist.config import StudentConfig, TeacherConfig
from leap_dist.planning import TeacherCosts

_T = TypeVar("_T")


@dataclass(frozen=True)
class TeacherFlops:
    """Forward FLOPs per image: of the embedding, of each block from the shallowest on, and of the final norm."""

    embed: int
    blocks: tuple[int, ...]
    norm: int

    def upto(self, block: int) -> int:
        """FLOPs of the features of 1-indexed `block`."""
        return self.embed + sum(self.blocks[:block]) + self.norm

    def saved_fraction(self, block: int) -> float:
        """Share of the whole teacher that is not run when `block` is the target: 0 at the last one."""
        return 1.0 - self.upto(block) / self.upto(len(self.blocks))


def teacher_flops(config: TeacherConfig, image_size: int) -> TeacherFlops:
    """Count the configured teacher at square images of `image_size` pixels; loads no weights."""
    return _count(config, image_size, "teacher")


def teacher_costs(config: TeacherConfig, image_size: int, flops: TeacherFlops) -> TeacherCosts:
    """What planning knows of a teacher: its FLOPs, as counted, and bytes in its dtype. Loads no weights."""
    backbone = split(build_model(config.model, config.kwargs, image_size, device="meta"))
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    size = DTYPES[config.dtype].itemsize
    return TeacherCosts(
        embed_flops=flops.embed,
        block_flops=flops.blocks,
        stem_bytes=size * _parameters(backbone.stem),
        block_bytes=tuple(size * _parameters(block) for block in backbone.blocks),
        token_bytes=size * backbone.embed(images).numel(),
        pixel_bytes=size * images.numel(),
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def student_flops(config: StudentConfig, image_size: int) -> int:
    """Forward FLOPs per image of the student's backbone, without its head; a training step costs three times that."""
    flops = _count(config, image_size, "student")
    return flops.upto(len(flops.blocks))


@torch.no_grad()
def _count(config: TeacherConfig | StudentConfig, image_size: int, side: str) -> TeacherFlops:
    backbone = split(build_model(config.model, config.kwargs, image_size, device="meta", side=side))
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    embed, tokens = _counted(lambda: backbone.embed(images))
    context = backbone.context()
    blocks = []
    for index in range(len(backbone.blocks)):
        flops, tokens = _counted(lambda i=index, x=tokens: backbone.run_block(i, x, context))
        blocks.append(flops)
    norm, _ = _counted(lambda: backbone.finish(tokens))
    return TeacherFlops(embed, tuple(blocks), norm)


def _counted(run: Callable[[], _T]) -> tuple[int, _T]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result
