"""The student as a timm vision transformer that gives patch tokens and its class token, at the last or at every layer.

A remedy (arXiv 2511.15572) gives its tokens the teacher's width, and stays in it after training: lift projects what
the last block gives, wide_last makes the last block itself that wide. Both exchange parts of timm's own model, so that
its `forward` and its classifier work on the wide tokens, and a plain timm model with the same exchange loads an export.
"""

from __future__ import annotations

from typing import Any, Optional

import timm
import torch.nn.functional as F
from timm.layers import global_pool_nlc
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from leap_dist.config import StudentConfig
from leap_dist.errors import UserError
from leap_dist.models.features import Features
from leap_dist.models.student_base import Student, StudentRecipe, widening

# timm's own words for: norm (here the lift) before the pooling, and the mean of the patch tokens to the classifier.
_LIFT_KWARGS = {"global_pool": "avg", "fc_norm": False}


class VitStudent(Student):
    """A timm ViT cut into `Features`; every map goes through the backbone's final norm.

    It takes the families of `leap_dist.models.backbone`; what else timm has is a `MapStudent`.
    """

    def __init__(self, backbone: nn.Module, recipe: StudentRecipe) -> None:
        super().__init__(backbone, recipe)
        self.width = self.cls_width = recipe.width or backbone.embed_dim
        self.depth = len(backbone.blocks)
        self.grid = tuple(backbone.patch_embed.grid_size)
        self.num_prefix_tokens: int = backbone.num_prefix_tokens
        self.has_cls = getattr(backbone, "cls_token", None) is not None

    def forward(self, images: Tensor) -> Features:
        """(B,3,H,W) -> final-normed tokens of the last block."""
        return self._split(self.backbone.forward_features(self.sized(images)))

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
            self.sized(images), norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
        return [
            Features(self._norm(patch), self._norm(prefix[:, 0]) if self.has_cls else None)
            for patch, prefix in (item if isinstance(item, tuple) else (item, None) for item in maps)
        ]

    def freeze_unreached(self, uses_cls: bool) -> None:
        """Nothing. A pooling head that nothing is asked of stays in the optimizer, as it always did here."""

    def check_runs(self) -> None:
        """Nothing: its outline has been checked."""

    def about(self) -> dict[str, Any]:
        """As the base class: what `forward_features` gives, in the words of a `MapStudent`."""
        return {
            "cls": "token" if self.has_cls else "pooled",
            "grid": list(self.grid),
            "source": "features",
            "order": "NLC",
            "prefix": self.num_prefix_tokens,
            "stage": None,
        }

    def _norm(self, tokens: Tensor) -> Tensor:
        if self.recipe.remedy == "wide_last" and tokens.shape[-1] != self.width:
            return F.layer_norm(tokens, tokens.shape[-1:])
        return self.backbone.norm(tokens)

    def _split(self, tokens: Tensor) -> Features:
        # One split, whose backward is one concatenation: two slices would fill two maps with zeros and add them.
        prefix, patch = tokens.split([self.num_prefix_tokens, tokens.shape[1] - self.num_prefix_tokens], dim=1)
        return Features(patch, prefix[:, 0] if self.has_cls else self.backbone.forward_head(tokens, pre_logits=True))


def vit_recipe(config: StudentConfig, model: nn.Module, size: int, width: Optional[int]) -> StudentRecipe:
    """The recipe of a vision transformer for images of `size` pixels. model: its outline; width: the teacher's.

    Raises:
        UserError: it cannot be widened as asked for, or has no map of that reduction.
    """
    patch = max(model.patch_embed.feat_ratio(as_scalar=False))
    if config.reduction not in (None, patch):
        raise UserError(
            f"student.reduction={config.reduction}: student.model={config.model} has one map, at {patch} pixels a token"
        )
    recipe = StudentRecipe(config.model, {"num_classes": config.num_classes, "img_size": size, **config.kwargs})
    return recipe if config.remedy == "none" else _remedied(recipe, config, model, width)


def assemble_vit(recipe: StudentRecipe) -> VitStudent:
    """Build what a recipe says."""
    model = timm.create_model(recipe.model, pretrained=False, **recipe.kwargs)
    if recipe.remedy == "lift":
        model.norm = widening(model.embed_dim, recipe.width)
        if model.num_classes:
            model.head = nn.Linear(recipe.width, model.num_classes).apply(init_weights_vit_timm)
    if recipe.remedy == "wide_last":
        wide = timm.create_model(recipe.model, pretrained=False, **recipe.kwargs | recipe.wide)
        model.blocks[-1] = nn.Sequential(*widening(model.embed_dim, recipe.width), wide.blocks[-1])
        model.norm, model.fc_norm, model.attn_pool, model.head = wide.norm, wide.fc_norm, wide.attn_pool, wide.head
    return VitStudent(model, recipe)


def _remedied(recipe: StudentRecipe, config: StudentConfig, model: nn.Module, width: Optional[int]) -> StudentRecipe:
    """The recipe with the remedy in it. model: the outline of the one without."""
    if width is None:
        raise ValueError(f"student.remedy={config.remedy}: needs the teacher's width")
    what = f"student.remedy={config.remedy}"
    if config.remedy == "lift":
        if taken := _LIFT_KWARGS.keys() & config.kwargs.keys():
            raise UserError(f"{what}: student.kwargs must not set {sorted(taken)}; the mean lifted patch is classified")
        return StudentRecipe(recipe.model, recipe.kwargs | _LIFT_KWARGS, config.remedy, width)
    head_width = model.embed_dim // heads_of(model, config)
    heads, rest = divmod(width, head_width)
    if rest:
        raise UserError(
            f"{what}: the teacher's {width} channels are no multiple of {head_width}, the width of a head of "
            f"student.model={config.model}"
        )
    # Two blocks: timm's drop-path rates rise from 0 at the first block to the configured rate at the last.
    wide = {"embed_dim": width, "num_heads": heads, "depth": 2}
    return StudentRecipe(recipe.model, recipe.kwargs, config.remedy, width, wide)


def heads_of(model: nn.Module, config: StudentConfig) -> int:
    """Attention heads of a block."""
    attention = getattr(model.blocks[-1], "attn", None)
    if attention is None:
        kind = type(model.blocks[-1]).__name__
        raise UserError(f"student.model={config.model}: a {kind} has no one attention whose heads could be widened")
    return attention.num_heads


def is_plain(config: StudentConfig, model: nn.Module) -> bool:
    """Whether a vision transformer is a `VitStudent` with this remedy and classifier; else a `MapStudent` takes it.

    model: an outline of one of the families.
    """
    single = isinstance(model, VisionTransformer) and not isinstance(model, VisionTransformerDistilled)
    return (config.remedy == "none" or single) and (not config.num_classes or _has_plain_classifier(config, model))


def _has_plain_classifier(config: StudentConfig, model: nn.Module) -> bool:
    """Whether `VitStudent.classify` is timm's own classifier."""
    if isinstance(model, VisionTransformerDistilled) or not hasattr(model, "fc_norm"):
        return False
    pool = "avg" if config.remedy == "lift" else model.global_pool
    return pool in ("token", "avg", "max", "avgmax") and not getattr(model, "pool_include_prefix", False)
