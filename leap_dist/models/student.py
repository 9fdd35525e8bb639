"""The student: a timm vision transformer that gives patch tokens and its class token, at the last or at every layer.

A remedy (arXiv 2511.15572) gives its tokens the teacher's width, and stays in it after training: lift projects what
the last block gives, wide_last makes the last block itself that wide. Both exchange parts of timm's own model, so that
its `forward` and its classifier work on the wide tokens, and a plain timm model with the same exchange loads an export.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import timm
import torch
import torch.nn.functional as F
from timm.layers import global_pool_nlc
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from leap_dist.config import StudentConfig
from leap_dist.errors import UserError
from leap_dist.models.backbone import outline
from leap_dist.models.features import Features

# timm's own words for: norm (here the lift) before the pooling, and the mean of the patch tokens to the classifier.
_LIFT_KWARGS = {"global_pool": "avg", "fc_norm": False}


@dataclass(frozen=True)
class StudentRecipe:
    """What a student is built from, as its export records it.

    model, kwargs: of timm.create_model. width: channels of the tokens it gives; only remedies need it.
    wide: wide_last only, the arguments in which the model differs that has the last block, norm and classifier.
    """

    model: str
    kwargs: dict[str, Any]
    remedy: str = "none"
    width: Optional[int] = None
    wide: dict[str, Any] = field(default_factory=dict)


class Student(nn.Module):
    """A timm ViT cut into `Features`; every map goes through the backbone's final norm.

    width: channels of the tokens; depth: blocks; grid: (rows, columns) of patch tokens.
    """

    def __init__(self, backbone: nn.Module, recipe: StudentRecipe) -> None:
        super().__init__()
        self.backbone = backbone
        self.recipe = recipe
        self.width: int = recipe.width or backbone.embed_dim
        self.depth: int = len(backbone.blocks)
        self.grid: tuple[int, int] = tuple(backbone.patch_embed.grid_size)
        self.num_prefix_tokens: int = backbone.num_prefix_tokens
        self.has_cls: bool = getattr(backbone, "cls_token", None) is not None

    def forward(self, images: Tensor) -> Features:
        """(B,3,H,W) -> final-normed tokens of the last block."""
        return self._split(self.backbone.forward_features(images))

    def classify(self, features: Features) -> Tensor:
        """Logits (B, classes) of the tokens that `forward` gave, as timm's own forward takes them."""
        model = self.backbone
        uses_cls = model.global_pool == "token"
        pooled = features.cls if uses_cls else global_pool_nlc(features.patch, model.global_pool, num_prefix_tokens=0)
        return model.head(model.head_drop(model.fc_norm(pooled)))

    def every_layer(self, images: Tensor) -> list[Features]:
        """(B,3,H,W) -> tokens of every block, shallowest first, each through the final norm.

        With lift that includes the lift. With wide_last the blocks before the last have their own width, for which no
        norm was trained: theirs are normalised without weights.
        """
        maps = self.backbone.forward_intermediates(
            images, norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
        return [
            Features(self._norm(patch), self._norm(prefix[:, 0]) if self.has_cls else None)
            for patch, prefix in (item if isinstance(item, tuple) else (item, None) for item in maps)
        ]

    def _norm(self, tokens: Tensor) -> Tensor:
        if self.recipe.remedy == "wide_last" and tokens.shape[-1] != self.width:
            return F.layer_norm(tokens, tokens.shape[-1:])
        return self.backbone.norm(tokens)

    def _split(self, tokens: Tensor) -> Features:
        # One split, whose backward is one concatenation: two slices would fill two maps with zeros and add them.
        prefix, patch = tokens.split([self.num_prefix_tokens, tokens.shape[1] - self.num_prefix_tokens], dim=1)
        return Features(patch, prefix[:, 0] if self.has_cls else None)


def build_student(
    config: StudentConfig, image_size: int, width: Optional[int] = None, device: Optional[torch.device] = None
) -> Student:
    """Build the randomly initialised student (its position embedding made for `image_size` pixels).

    width: the teacher's, to which a remedy brings the tokens; unused without one.

    Raises:
        UserError: unknown model, arguments it does not take, no vision transformer, or one that cannot be widened or
            given a classifier.
    """
    model = outline(config.model, config.kwargs, image_size, side="student")
    _check_classifier(config, model)
    recipe = StudentRecipe(config.model, {"num_classes": config.num_classes, "img_size": image_size, **config.kwargs})
    if config.remedy != "none":
        recipe = _remedied(recipe, config, model, width)
    with torch.device(device or "cpu"):
        return assemble(recipe)


def assemble(recipe: StudentRecipe) -> Student:
    """Build what a recipe says."""
    model = timm.create_model(recipe.model, pretrained=False, **recipe.kwargs)
    if recipe.remedy == "lift":
        model.norm = _widening(model.embed_dim, recipe.width)
        if model.num_classes:
            model.head = nn.Linear(recipe.width, model.num_classes).apply(init_weights_vit_timm)
    if recipe.remedy == "wide_last":
        wide = timm.create_model(recipe.model, pretrained=False, **recipe.kwargs | recipe.wide)
        model.blocks[-1] = nn.Sequential(*_widening(model.embed_dim, recipe.width), wide.blocks[-1])
        model.norm, model.fc_norm, model.attn_pool, model.head = wide.norm, wide.fc_norm, wide.attn_pool, wide.head
    return Student(model, recipe)


def uniform_control(config: StudentConfig, image_size: int, width: int) -> StudentConfig:
    """A student without the remedy and with as many parameters: every block a little wider (arXiv 2511.15572).

    It has the number of heads of the configured student, the width is the multiple of it that comes nearest.
    """
    meta = torch.device("meta")

    def parameters(student: StudentConfig) -> int:
        return sum(parameter.numel() for parameter in build_student(student, image_size, width, meta).parameters())

    def uniform(embed_dim: int) -> StudentConfig:
        return replace(config, remedy="none", kwargs={**config.kwargs, "embed_dim": embed_dim})

    heads = _heads(outline(config.model, config.kwargs, image_size, side="student"), config)
    wanted, widths = parameters(config), range(heads, width + heads, heads)
    above = bisect_left(widths, wanted, key=lambda embed_dim: parameters(uniform(embed_dim)))
    nearest = min(widths[max(0, above - 1) : above + 1], key=lambda w: abs(parameters(uniform(w)) - wanted))
    return uniform(nearest)


def _widening(width: int, wider: int) -> nn.Sequential:
    """Linear without bias, and LayerNorm: tokens (..., width) to (..., wider), in both remedies."""
    return nn.Sequential(nn.Linear(width, wider, bias=False), nn.LayerNorm(wider)).apply(init_weights_vit_timm)


def _remedied(recipe: StudentRecipe, config: StudentConfig, model: nn.Module, width: Optional[int]) -> StudentRecipe:
    """The recipe with the remedy in it. model: the outline of the one without."""
    if width is None:
        raise ValueError(f"student.remedy={config.remedy}: needs the teacher's width")
    what = f"student.remedy={config.remedy}"
    if not isinstance(model, VisionTransformer) or isinstance(model, VisionTransformerDistilled):
        raise UserError(
            f"{what}: student.model={config.model} is a {type(model).__name__}; remedies take timm's VisionTransformer "
            "(vit_*, deit_* without distillation token)"
        )
    if config.remedy == "lift":
        if taken := _LIFT_KWARGS.keys() & config.kwargs.keys():
            raise UserError(f"{what}: student.kwargs must not set {sorted(taken)}; the mean lifted patch is classified")
        return StudentRecipe(recipe.model, recipe.kwargs | _LIFT_KWARGS, config.remedy, width)
    head_width = model.embed_dim // _heads(model, config)
    heads, rest = divmod(width, head_width)
    if rest:
        raise UserError(
            f"{what}: the teacher's {width} channels are no multiple of {head_width}, the width of a head of "
            f"student.model={config.model}"
        )
    # Two blocks: timm's drop-path rates rise from 0 at the first block to the configured rate at the last.
    wide = {"embed_dim": width, "num_heads": heads, "depth": 2}
    return StudentRecipe(recipe.model, recipe.kwargs, config.remedy, width, wide)


def _heads(model: nn.Module, config: StudentConfig) -> int:
    """Attention heads of a block."""
    attention = getattr(model.blocks[-1], "attn", None)
    if attention is None:
        kind = type(model.blocks[-1]).__name__
        raise UserError(f"student.model={config.model}: a {kind} has no one attention whose heads could be widened")
    return attention.num_heads


def _check_classifier(config: StudentConfig, model: nn.Module) -> None:
    """UserError where `Student.classify` would not be timm's own classifier."""
    if not config.num_classes:
        return
    what = f"student.num_classes={config.num_classes}: student.model={config.model}"
    if isinstance(model, VisionTransformerDistilled) or not hasattr(model, "fc_norm"):
        raise UserError(f"{what}, a {type(model).__name__}, has no single classifier on its class or patch tokens")
    pool = "avg" if config.remedy == "lift" else model.global_pool
    if pool not in ("token", "avg", "max", "avgmax") or getattr(model, "pool_include_prefix", False):
        way = "global_pool=avg, fc_norm=false" if model.cls_token is None else "global_pool=token"
        raise UserError(f"{what} pools by {pool!r}; set in student.kwargs: {way}")
