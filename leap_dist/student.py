"""The student: a timm vision transformer that gives patch tokens and its class token, at the last or at every layer."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from leap_dist.backbone import outline
from leap_dist.config import StudentConfig
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
        # One split, whose backward is one concatenation: two slices would fill two maps with zeros and add them.
        prefix, patch = tokens.split([self.num_prefix_tokens, tokens.shape[1] - self.num_prefix_tokens], dim=1)
        return Features(patch, prefix[:, 0] if self.has_cls else None)


def student_kwargs(config: StudentConfig, image_size: int) -> dict[str, Any]:
    """Arguments with which `timm.create_model(config.model, ...)` rebuilds the backbone (also in exports)."""
    return {"num_classes": 0, "img_size": image_size, **config.kwargs}


def build_student(config: StudentConfig, image_size: int, device: torch.device | None = None) -> Student:
    """Build the randomly initialised student (its position embedding made for `image_size` pixels).

    Raises:
        UserError: unknown model, arguments it does not take, or no vision transformer.
    """
    outline(config.model, config.kwargs, image_size, side="student")
    with torch.device(device or "cpu"):
        backbone = timm.create_model(config.model, pretrained=False, **student_kwargs(config, image_size))
    return Student(backbone)
