"""A module of the user's own as a student: `student.model=package.module:function`.

The function takes `student.kwargs` and returns an `nn.Module` whose forward makes of images (B,3,H,W) one of

    a map (B,C,h,w)        tokens (B,N,C), row by row of a square grid        either of them and a class token (B,D)

Without a class token the mean of the cells stands for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from math import isqrt
from typing import Any, Optional

import torch
from torch import Tensor, nn

from leap_dist.config import StudentConfig
from leap_dist.errors import UserError
from leap_dist.models.features import Features
from leap_dist.models.map_student import add_parts
from leap_dist.models.student_base import Student, StudentRecipe

_EXPECTED = "expected a map (B,C,h,w), tokens (B,N,C) of a square grid, or a pair of either and a class token (B,D)"


def is_own(model: str) -> bool:
    """Whether `student.model` names a function of the user's own."""
    return ":" in model


class OwnStudent(Student):
    """The user's module; what is added to it is in it, under `lift` and `mean_head`."""

    def __init__(self, backbone: nn.Module, recipe: StudentRecipe, seen: Features, grid: tuple[int, int]) -> None:
        super().__init__(backbone, recipe)
        self.grid = grid
        self.has_cls = seen.cls is not None
        lifted = recipe.remedy == "lift"
        self.width = recipe.width if lifted else seen.patch.shape[-1]
        self.cls_width = self.width if lifted or seen.cls is None else seen.cls.shape[-1]

    def forward(self, images: Tensor) -> Features:
        """(B,3,H,W) -> cells of the map, class token, and logits if there is a classifier."""
        patch, cls, _ = _read(self.backbone(self.sized(images)), self.recipe.model, len(images))
        if hasattr(self.backbone, "lift"):
            patch = self.backbone.lift(patch)
            cls = None  # of another width, it may be
        cls = patch.mean(1) if cls is None else cls
        return Features(patch, cls, self.backbone.mean_head(patch.mean(1)) if self.recipe.mean_head else None)

    def classify(self, features: Features) -> Tensor:
        """The logits that came with the features."""
        return features.logits

    def about(self) -> dict[str, Any]:
        """As the base class."""
        return {"cls": "token" if self.has_cls and self.recipe.remedy == "none" else "mean", "grid": list(self.grid)}


def own_recipe(config: StudentConfig, size: int, width: Optional[int]) -> StudentRecipe:
    """The recipe for images of `size` pixels. width: the teacher's.

    Raises:
        UserError: the function is not there or fails, its module gives something else, or it cannot do what is asked.
    """
    if config.remedy == "wide_last":
        raise UserError(
            f"student.remedy=wide_last: student.model={config.model} is built by its function; widen it there"
        )
    recipe = StudentRecipe(
        config.model, dict(config.kwargs), config.remedy, None, map_at=size, mean_head=config.num_classes
    )
    student = assemble_own(recipe if config.remedy == "none" else replace(recipe, width=width))
    found = round(size / student.grid[0])
    if config.reduction not in (None, found):
        raise UserError(
            f"student.reduction={config.reduction}: student.model={config.model} gives {found} pixels a token"
        )
    return student.recipe


def assemble_own(recipe: StudentRecipe) -> OwnStudent:
    """Build what a recipe says, on the host, and look at what it makes of one image."""
    what = f"student.model={recipe.model}"
    with torch.device("cpu"):
        try:
            module = _function(recipe.model)(**recipe.kwargs)
        except UserError:
            raise
        except Exception as error:  # the user's own code
            raise UserError(f"{what}: failed with {error!r:.200}") from error
        if not isinstance(module, nn.Module):
            raise UserError(f"{what}: returned a {type(module).__name__}, expected an nn.Module")
        for name in ("lift", "mean_head"):
            if hasattr(module, name):
                raise UserError(f"{what}: its module has an attribute {name}, which this package needs; rename it")
        was_training = module.training
        try:
            with torch.no_grad():
                output = module.eval()(torch.zeros(1, 3, recipe.map_at, recipe.map_at))
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.160}"
            raise UserError(f"{what}: cannot run on an image of {recipe.map_at} pixels ({reason})") from error
        patch, cls, grid = _read(output, recipe.model, 1)
        add_parts(module.train(was_training), recipe, patch.shape[-1])
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UserError(f"{what}: its module has no parameter to train")
    return OwnStudent(module, recipe, Features(patch, cls), grid)


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # the user's own code
        hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"student.model={name}: cannot import {module} ({error!r:.160}){hint}") from error
    if not callable(getattr(found, function, None)):
        raise UserError(f"student.model={name}: {module} has no function {function}")
    return getattr(found, function)


def _read(output: Any, model: str, images: int) -> tuple[Tensor, Optional[Tensor], tuple[int, int]]:
    """Cells (B,N,C), class token and grid of what the module returned. UserError if it is something else."""
    first, cls = output, None
    if isinstance(output, (tuple, list)) and len(output) == 2:
        first, cls = output
    good_cls = cls is None or (isinstance(cls, Tensor) and cls.ndim == 2 and len(cls) == images)
    if isinstance(first, Tensor) and first.ndim and len(first) == images and good_cls and first.is_floating_point():
        if first.ndim == 4:
            return first.flatten(2).transpose(1, 2), cls, tuple(first.shape[2:])
        side = isqrt(first.shape[1]) if first.ndim == 3 else 0
        if side and side**2 == first.shape[1]:
            return first, cls, (side, side)
    of = "an image" if images == 1 else f"{images} images"
    raise UserError(f"student.model={model}: its module made {_described(output)} of {of}; {_EXPECTED}")


def _described(output: Any) -> str:
    if output is None:
        return "None"
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)} of {output.dtype}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)} ({', '.join(map(_described, output[:3]))})"
    return f"a {type(output).__name__}"
