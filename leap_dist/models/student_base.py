"""What every student is, whatever its backbone: images to patch tokens and a class token, and what rebuilds it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from leap_dist.errors import UserError
from leap_dist.models.features import Features


@dataclass(frozen=True)
class StudentRecipe:
    """What a student is built from, as its export records it.

    model, kwargs: of timm.create_model, or of a function of the user's own (`package.module:function`).
    width: channels of the tokens it gives; only remedies need it.
    wide: wide_last of a vision transformer only, the arguments in which the model differs that has the last block, norm
        and classifier.
    reduction: pixels of a side that one token stands for, where the map is not the deepest; None = the deepest.
    resized_to: side in pixels to which it resizes the images it is given; None = it takes them as they are.
    map_at: side in pixels of the images for which a `MapStudent` is made of the model; None = it is a `VitStudent`.
    mean_head: classes of a classifier on the mean token, where the model's own cannot be used; 0 = there is none.
    """

    model: str
    kwargs: dict[str, Any]
    remedy: str = "none"
    width: Optional[int] = None
    wide: dict[str, Any] = field(default_factory=dict)
    reduction: Optional[int] = None
    resized_to: Optional[int] = None
    map_at: Optional[int] = None
    mean_head: int = 0


class Student(nn.Module):
    """A backbone cut into `Features`. Subclasses set the attributes and give `forward` and `classify`.

    width, cls_width: channels of the patch tokens and of the class token; grid: (rows, columns) of patch tokens;
    depth: blocks of one width and grid, 0 where there is no such thing; has_cls: whether the class token is the
    model's own.
    """

    width: int
    cls_width: int
    grid: tuple[int, int]
    depth: int = 0
    has_cls: bool = True

    def __init__(self, backbone: nn.Module, recipe: StudentRecipe) -> None:
        super().__init__()
        self.backbone = backbone
        self.recipe = recipe

    @property
    def side(self) -> int:
        """Of the images that its backbone sees, in pixels."""
        return self.recipe.map_at or self.recipe.kwargs["img_size"]

    @property
    def layer_grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the tokens of each layer of `every_layer`."""
        return (self.grid,) * max(1, self.depth)

    def forward(self, images: Tensor) -> Features:
        """(B,3,H,W) -> final-normed tokens."""
        raise NotImplementedError

    def classify(self, features: Features) -> Tensor:
        """Logits (B, classes) of the tokens that `forward` gave."""
        raise NotImplementedError

    def every_layer(self, images: Tensor) -> list[Features]:
        """(B,3,H,W) -> tokens of every layer, shallowest first; the last are those of `forward`."""
        return [self(images)]

    def freeze_unreached(self, uses_cls: bool) -> None:
        """Take parameters that no loss reaches out of training: without a gradient weight decay alone would move them.

        They stay as they were made, and are exported. uses_cls: whether the class token is matched.
        """
        what, size = f"student.model={self.recipe.model}", self.side
        for device in ("meta", "cpu"):
            try:
                twin = copy.deepcopy(self).to(device).train()
                found = twin(torch.zeros(2, 3, size, size, device=device))
                cls, logits = found.cls if uses_cls else None, found.logits
                total = sum(output.float().sum() for output in (found.patch, cls, logits) if output is not None)
                total.backward()
                break
            except (
                Exception
            ) as error:  # on the meta device an operation that needs numbers, else whatever a model raises
                if device == "cpu":
                    raise UserError(f"{what}: cannot be trained ({_in_short(error)})") from error
        reached = [parameter.grad is not None for parameter in twin.parameters()]
        if not any(reached):
            raise UserError(f"{what}: its tokens do not depend on any parameter that trains")
        for mine, is_reached in zip(self.parameters(), reached, strict=True):
            mine.requires_grad_(is_reached)

    def check_runs(self) -> None:
        """UserError where it cannot run on an image: the meta device, on which it was looked at, has no numbers."""
        self._tried(1, training=False)

    def check_trains(self, images: int) -> None:
        """UserError where it cannot train on so many images at a time, or then gives other tokens than it is said to.

        A normalisation may need more than one value a channel, and a model may drop tokens in training.
        """
        found, cells = self._tried(images, training=True).patch, self.grid[0] * self.grid[1]
        if found.shape[1:] != (cells, self.width):
            raise UserError(
                f"student.model={self.recipe.model}: gives {found.shape[1]} patch tokens of {found.shape[2]} channels "
                f"in training, {cells} of {self.width} else; they must be the same"
            )

    def _tried(self, count: int, training: bool) -> Features:
        """What a copy of it makes of empty images."""
        size, device = self.side, next(self.parameters()).device
        try:
            with torch.no_grad():
                return copy.deepcopy(self).train(training)(torch.zeros(count, 3, size, size, device=device))
        except UserError:
            raise
        except Exception as error:  # whatever a model raises at a size that it was not made for
            does, images = "train" if training else "run", "an image" if count == 1 else f"{count} images"
            raise UserError(
                f"student.model={self.recipe.model}: cannot {does} on {images} of {size} pixels ({_in_short(error)})"
            ) from error

    def about(self) -> dict[str, Any]:
        """For `student.json`: what the recipe does not say. cls: how the class token was made."""
        raise NotImplementedError

    def sized(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) at the student's own size, by antialiased bicubic resizing, if it has one."""
        size = self.recipe.resized_to
        if size is None or images.shape[-2:] == (size, size):
            return images
        return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)


def widening(width: int, wider: int) -> nn.Sequential:
    """Linear without bias, and LayerNorm: tokens (..., width) to (..., wider), in both remedies."""
    return nn.Sequential(nn.Linear(width, wider, bias=False), nn.LayerNorm(wider)).apply(init_weights_vit_timm)


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.160}"
