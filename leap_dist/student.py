"""The student: a timm vision transformer that gives patch tokens and its class token, at the last or at every layer."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from leap_dist.config import StudentConfig
from leap_dist.errors import UserError
from leap_dist.features import Features


class Student(nn.Module):
    """A timm ViT cut into `Features`; every map goes through the backbone's final norm.

    width: channels Ds; depth: blocks; grid: (rows, columns) of patch tokens.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.width: int = backbone.embed_dim
        self.depth: int = len(backbone.blocks)
        self.grid: tuple[int, int] = tuple(backbone.patch_embed.grid_size)
        self.num_prefix_tokens: int = backbone.num_prefix_tokens
        self.has_cls: bool = getattr(backbone, "cls_token", None) is not None

    def forward(self, images: Tensor) -> Features:
        """(B,3,H,W) -> final-normed tokens of the last block."""
        return self._split(self.backbone.forward_features(images))

    def every_layer(self, images: Tensor) -> list[Features]:
        """(B,3,H,W) -> tokens of every block, shallowest first, each through the final norm."""
        maps = self.backbone.forward_intermediates(
            images, norm=True, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
        return [
            Features(patch, prefix[:, 0] if self.has_cls else None)
            for patch, prefix in (item if isinstance(item, tuple) else (item, None) for item in maps)
        ]

    def _split(self, tokens: Tensor) -> Features:
        cls = tokens[:, 0] if self.has_cls else None
        return Features(tokens[:, self.num_prefix_tokens :], cls)


def student_kwargs(config: StudentConfig, image_size: int) -> dict[str, Any]:
    """Arguments with which `timm.create_model(config.model, ...)` rebuilds the backbone (also in exports)."""
    return {"num_classes": 0, "img_size": image_size, **config.kwargs}


def build_student(config: StudentConfig, image_size: int, device: torch.device | None = None) -> Student:
    """Build the randomly initialised student (its position embedding made for `image_size` pixels).

    Raises:
        UserError: unknown model, arguments it does not take, or no plain ViT.
    """
    kwargs = student_kwargs(config, image_size)
    if not timm.is_model(config.model):
        raise UserError(f"student.model={config.model}: not a timm model{_suggestion(config.model)}")
    try:
        with torch.device(device or "cpu"):
            backbone = timm.create_model(config.model, pretrained=False, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"student.model={config.model} with {kwargs}: {reason or type(error).__name__}") from None
    if not all(hasattr(backbone, name) for name in ("blocks", "patch_embed", "num_prefix_tokens")):
        raise UserError(f"student.model={config.model}: not a plain vision transformer (no blocks or prefix tokens)")
    _require_divisible(config.model, backbone.patch_embed.patch_size, image_size)
    return Student(backbone)


def _require_divisible(model: str, patch_size: tuple[int, int], image_size: int) -> None:
    if any(image_size % side for side in patch_size):
        raise UserError(
            f"data.image_size={image_size}: not a multiple of the {patch_size[0]}-pixel patches of student.model={model}"
        )


def _suggestion(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, timm.list_models("*vit*") + timm.list_models("*deit*"), 1)
    return f"; did you mean {close[0]}?" if close else ""
