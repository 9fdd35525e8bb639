"""FLOPs of a training step, part by part, before anything has run.

A FLOP is one multiplication or one addition (two per multiply-accumulate). Matrix products, convolutions and
attention count; norms, activations and additions, together well under 1 %, do not.

Backbones are counted by torch's own formula for each operation, on models without memory (`FlopCounterMode` on the
meta device): it holds for every architecture, and the tests hold it to a closed form for every family. The counter is
blind to in-place products and to custom ops, which is what the matching op is made of: matching and score have closed
forms here, and the tests hold those to the counter on the plain definitions. They are the FLOPs of the definition; an
implementation that gets by with fewer shows as a higher utilisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Optional, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from leap_dist.config import Config, StudentConfig, TeacherConfig, matching_head
from leap_dist.models.backbone import DTYPES, Backbone, build_model, split
from leap_dist.models.placement_plan import TeacherCosts
from leap_dist.models.student import build_student

_T = TypeVar("_T")
_META = torch.device("meta")
_COUNTED = 2  # images; batch norm cannot train on one


@dataclass(frozen=True)
class TeacherFlops:
    """Forward FLOPs per image: of the embedding, of each block from the shallowest on, of the final norm, and of the
    classifier, which follows the last block.

    attention: what of each block is its attention (projections and scores); the rest is its MLP. 0 where a block runs
    both as one product (timm's parallel blocks).
    """

    embed: int
    blocks: tuple[int, ...]
    norm: int
    attention: tuple[int, ...] = ()
    classifier: int = 0

    def upto(self, block: int) -> int:
        """FLOPs of the features of 1-indexed `block`."""
        return self.embed + sum(self.blocks[:block]) + self.norm + (block == len(self.blocks)) * self.classifier


class StudentFlops(NamedTuple):
    """FLOPs per image of a training step of the student's backbone, without its heads."""

    forward: int
    backward: int


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of an optimizer step: per image, but for `cka`, which is per step.

    match: heads, forward and backward. evidence: what a scored step adds per image; cka: and once.
    """

    teacher: TeacherFlops
    student: StudentFlops
    match: int
    evidence: int
    cka: int

    def student_step(self) -> int:
        """Of the student's backbone, per image, forward and backward."""
        return sum(self.student)


def step_flops(config: Config) -> StepFlops:
    """Count a step of the configured run; loads no weights."""
    size, every_layer = config.data.image_size, config.curriculum.mode == "all_layers"
    backbone = _backbone(config.teacher, size, config.teacher_classes)
    spec, student = backbone.spec, build_student(config.student, size, backbone.spec.dim, _META)
    width, cls_width = student.width, student.cls_width
    has_cls_term = config.objective.cls_weight > 0
    tokens, heads = spec.grid[0] * spec.grid[1], spec.depth if every_layer else 1
    head = matching_head(config.objective, config.student.remedy)
    linear, target_width = head == "linear", width if head == "pooled" else spec.dim
    if config.curriculum.metric == "cosine":
        evidence, cka = 2 * tokens * width * spec.dim * linear, 0
    else:
        evidence, cka = moments_flops(tokens, width, target_width), cka_flops(width, spec.dim) * linear
    return StepFlops(
        teacher=_count(backbone, size),
        student=student_step_flops(config.student, size, spec.dim, every_layer),
        match=linear * heads * (match_flops(tokens, width, spec.dim) + match_flops(has_cls_term, cls_width, spec.dim)),
        evidence=heads * evidence,
        cka=cka,
    )


def match_flops(rows: int, width: int, teacher_width: int) -> int:
    """Head and MSE on `rows` tokens: the projection, and its gradients for tokens and weight."""
    return 6 * rows * width * teacher_width


def moments_flops(rows: int, width: int, teacher_width: int) -> int:
    """Second moments of `rows` student and teacher tokens: SᵀS, TᵀS and TᵀT."""
    return 2 * rows * (width**2 + width * teacher_width + teacher_width**2)


def cka_flops(width: int, teacher_width: int) -> int:
    """Linear CKA from the moments, as `leap_dist.matching.cka.linear_cka` takes it: WᵀW, Css A and Cts A."""
    return 4 * teacher_width * width**2 + 2 * width**3


def teacher_flops(config: TeacherConfig, image_size: int, classes: int = 0) -> TeacherFlops:
    """Count the configured teacher at square images of `image_size` pixels; loads no weights.

    classes: with a classifier of so many after the last block.
    """
    return _count(_backbone(config, image_size, classes), image_size)


def student_step_flops(
    config: StudentConfig, image_size: int, width: Optional[int] = None, every_layer: bool = False
) -> StudentFlops:
    """Count the configured student, forward and backward, remedy and classifier included.

    width: see `build_student`. every_layer: with the tokens of all its blocks, not the last one's only.
    """
    student = build_student(config, image_size, width, _META)
    device = next(student.parameters()).device  # the host, for a module of the user's own
    images = torch.zeros(_COUNTED, 3, image_size, image_size, device=device)

    def run() -> list[torch.Tensor]:
        views = student.every_layer(images) if every_layer else [student(images)]
        logits = [student.classify(views[-1])] if config.num_classes else []
        return logits + [tokens for view in views for tokens in view[:2] if tokens is not None]

    forward, outputs = _counted(run)
    total = torch.stack([output.sum() for output in outputs]).sum()
    return StudentFlops(forward // _COUNTED, _counted(total.backward)[0] // _COUNTED)


def teacher_costs(config: TeacherConfig, image_size: int, flops: TeacherFlops, classes: int = 0) -> TeacherCosts:
    """What planning knows of a teacher: its FLOPs, as counted, and bytes in its dtype. Loads no weights."""
    backbone, images = _backbone(config, image_size, classes), _images(image_size)
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


def _backbone(config: TeacherConfig, image_size: int, classes: int = 0) -> Backbone:
    return split(build_model(config.model, config.kwargs, image_size, classes=classes, device=_META))


def _images(image_size: int) -> torch.Tensor:
    return torch.empty(1, 3, image_size, image_size, device=_META)


@torch.no_grad()
def _count(backbone: Backbone, image_size: int) -> TeacherFlops:
    embed, tokens = _counted(lambda: backbone.embed(_images(image_size)))
    context = backbone.context()
    blocks, attention = [], []
    for index in range(len(backbone.blocks)):
        with FlopCounterMode(display=False) as counter:
            tokens = backbone.run_block(index, tokens, context)
        blocks.append(counter.get_total_flops())
        attention.append(_attention(counter))
    norm, _ = _counted(lambda: backbone.stem.norm(tokens))
    classifier = _counted(lambda: backbone.classify(tokens))[0] if backbone.classes else 0
    return TeacherFlops(embed, tuple(blocks), norm, tuple(attention), classifier)


def _attention(counter: FlopCounterMode) -> int:
    """What a block's own child `attn` (or `attns`) took; names are Block, Block.attn, Block.attn.qkv, ..."""
    counts = counter.get_flop_counts().items()
    return sum(sum(ops.values()) for name, ops in counts if name.split(".")[1:] in (["attn"], ["attns"]))


def _counted(run: Callable[[], _T]) -> tuple[int, _T]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result
