"""The frozen teacher: a timm vision transformer that is run only as deep as the target block.

Deeper blocks are skipped here. Weights and placements are here too, and what is made ahead of a step. Which block is
the target is decided in curriculum/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Optional, Protocol

import torch
from torch import Tensor, nn

from leap_dist.config import TeacherConfig
from leap_dist.models import Features, TeacherFlops, TeacherSpec, split, teacher_flops
from leap_dist.runtime.allocator import keep_freed_memory
from leap_dist.runtime.distributed import World
from leap_dist.runtime.marks import Marks
from leap_dist.teacher.lazy_backbone import LazyBackbone
from leap_dist.teacher.replicated import ReplicatedTeacher
from leap_dist.teacher.weights import build_skeleton

__all__ = ["Teacher", "TeacherSpec", "build_teacher", "describe_teacher"]


class Teacher(Protocol):
    """What the trainer knows of a teacher, wherever its blocks live.

    On several ranks the methods may communicate: all ranks call them equally often, in the same order, `features` and
    `features_of` with equally many images.
    """

    spec: TeacherSpec
    block: int  # current target, 1-indexed
    stem: nn.Module  # embedding and final norm, on every rank
    blocks: nn.ModuleList  # all of them, whether loaded or not
    fingerprint: str  # differs where the stem's weights do: embedding and final norm
    marks: Marks  # differ where any weights do

    def features(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to final-normed tokens of block `self.block`; no grad; deeper blocks are not run."""

    def features_of(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Features]:
        """The same of several blocks, in one pass: 1-indexed, rising, none past the target."""

    def sweep(self, images: Tensor, until: Optional[int] = None) -> Iterator[Features]:
        """Features of the blocks 1..until (None: the last), in order, in one pass over the teacher."""

    def retarget(self, block: int) -> None:
        """Make 1-indexed `block` the target of `features`."""

    def resident_bytes(self) -> int:
        """Bytes of parameters on this rank's device."""


def build_teacher(
    config: TeacherConfig,
    image_size: int,
    device: torch.device,
    world: Optional[World] = None,
    flops: Optional[TeacherFlops] = None,
    classes: int = 0,
) -> Teacher:
    """Load the configured teacher for square images of `image_size` pixels; its target is block 1.

    world: needed by every placement but `replicated`; all ranks build at the same time.
    flops: the teacher's, where they have been counted already.
    classes: give logits at the last block, by a classifier of so many classes; 0 = do not.
    Raises `UserError` for a model, an image size or weights that do not fit together, or a dtype the device has not.
    """
    if config.dtype == "fp8":
        from leap_dist.teacher.float8 import check_device

        check_device(device)
    lazy = LazyBackbone(config, image_size, device, classes, world)
    lazy.mark_samples()
    if config.placement == "replicated":
        if device.type == "cpu":
            keep_freed_memory()
        return ReplicatedTeacher(lazy)
    from leap_dist.teacher.placements import build_placed  # torch's pipelining: a second to import

    assert world is not None
    return build_placed(config, image_size, lazy, world, flops or teacher_flops(config, image_size, classes))


def describe_teacher(config: TeacherConfig, image_size: int) -> TeacherSpec:
    """What `build_teacher` would give, from a model without weights or memory; the same errors but for weights."""
    return split(build_skeleton(config, image_size)).spec
