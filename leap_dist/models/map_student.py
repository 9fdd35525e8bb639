"""Any timm model with a spatial map as a student: its cells are the patch tokens.

timm's own outputs are the truth: the map is what `forward_features` gives, through the final norm where the model has
one there, or what `forward_intermediates` gives of an earlier stage. The class token is the model's own, or else its
pooled output, which its classifier would see (`forward_head(pre_logits=True)`). Where things lie is found out by
running the model once on the meta device, so that no model needs a line of its own here.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Optional

import timm
import torch
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from leap_dist.config import StudentConfig
from leap_dist.errors import UserError
from leap_dist.models.backbone import Unbuildable
from leap_dist.models.features import Features
from leap_dist.models.student_base import Student, StudentRecipe, widening

ADDED = ("lift.", "mean_head.")  # how the names of parts begin that `add_parts` puts in
_MOST_ON_CPU = 1024  # pixels of a side of an image that a model is run on for a look, where it needs numbers
_MOST_PREFIX = 16  # class, distillation and register tokens before the cells
# Names of the argument by which timm's constructors take the widths of all stages.
_STAGE_WIDTHS = ("dims", "embed_dims", "channels")


class Layout(NamedTuple):
    """Where a model keeps its map.

    source: forward_features gives it itself, or only `forward_intermediates` does; stage: index of an earlier map, None
    for the deepest; order: axes of the map; prefix: tokens before the cells in NLC; normed: intermediates pass the
    final norm; cls: the model's own token, its pooled output, or the mean of the cells; grid, width, cls_width: of the
    tokens; reductions: pixels of a side that a token of each map stands for, the deepest last; earlier: grids of the
    maps before the last one.
    """

    source: Literal["features", "intermediates"]
    stage: Optional[int]
    order: Literal["NCHW", "NHWC", "NLC"]
    prefix: int
    normed: bool
    cls: Literal["token", "pooled", "mean"]
    grid: tuple[int, int]
    width: int
    cls_width: int
    reductions: tuple[int, ...]
    earlier: tuple[tuple[int, int], ...]


_PROBED: dict[str, Layout] = {}  # by recipe: a run builds its student several times, and a look takes a second


class MapStudent(Student):
    """A timm model whose map is the patch tokens. What it adds to the model is in it, under `lift` and `mean_head`."""

    def __init__(self, backbone: nn.Module, recipe: StudentRecipe, layout: Layout) -> None:
        super().__init__(backbone, recipe)
        self.layout = layout
        self.grid = layout.grid
        lifted = recipe.remedy == "lift"
        self.width = recipe.width if lifted else layout.width
        self.cls_width = recipe.width if lifted else layout.cls_width
        self.classes: int = getattr(backbone, "num_classes", 0)

    def forward(self, images: Tensor) -> Features:
        """(B,3,H,W) -> cells of the map, class token, and logits if there is a classifier."""
        images, model, layout = self.sized(images), self.backbone, self.layout
        raw, cells = _run(model, images, layout)
        lift = getattr(model, "lift", nn.Identity())
        patch = lift(cells)
        if layout.cls == "token":
            cls = lift(raw[:, 0])
        elif layout.cls == "mean":
            cls = patch.mean(1)
        else:
            cls = model.forward_head(raw, pre_logits=True)
        if hasattr(model, "mean_head"):
            return Features(patch, cls, model.mean_head(patch.mean(1)))
        return Features(patch, cls, model.forward_head(raw) if self.classes else None)

    @property
    def layer_grids(self) -> tuple[tuple[int, int], ...]:
        """As the base class; each stage has its own."""
        return (*self.layout.earlier, self.grid)

    def every_layer(self, images: Tensor) -> list[Features]:
        """(B,3,H,W) -> cells of every map of timm's `forward_intermediates`, each at its own width and grid, without
        class token; the last are those of `forward`.
        """
        maps = self.backbone.forward_intermediates(self.sized(images), output_fmt="NCHW", intermediates_only=True)
        earlier = [Features(_cells(found, "NCHW", 0), None) for found in maps[: len(self.layout.earlier)]]
        return [*earlier, self(images)]

    def classify(self, features: Features) -> Tensor:
        """The logits that came with the features: a pooling may need more than the tokens."""
        return features.logits

    def about(self) -> dict[str, Any]:
        """As the base class: of the map, what loads it into plain timm."""
        layout = self.layout
        return {
            "cls": layout.cls,
            "grid": list(layout.grid),
            "source": layout.source,
            "order": layout.order,
            "prefix": layout.prefix,
            "normed": layout.normed,
            "stage": layout.stage,
        }


def _run(model: nn.Module, images: Tensor, layout: Layout) -> tuple[Any, Tensor]:
    """What `forward_features` gives (None at an earlier stage), and the cells (B, N, C) of the map."""
    if layout.stage is not None:
        maps = model.forward_intermediates(
            images, indices=[layout.stage], output_fmt="NCHW", stop_early=True, intermediates_only=True
        )
        return None, _cells(maps[-1], "NCHW", 0)
    if layout.source == "intermediates":
        raw, maps = model.forward_intermediates(images, indices=1, norm=layout.normed, output_fmt="NCHW")
        return raw, _cells(maps[-1], "NCHW", 0)
    raw = model.forward_features(images)
    return raw, _cells(raw, layout.order, layout.prefix)


def _cells(tokens: Tensor, order: str, prefix: int) -> Tensor:
    """A map in any order as (B, N, C)."""
    if order == "NCHW":
        return tokens.flatten(2).transpose(1, 2)
    return tokens.flatten(1, 2) if order == "NHWC" else tokens[:, prefix:]


def map_recipe(
    config: StudentConfig, size: int, width: Optional[int], refused: Optional[Unbuildable] = None
) -> StudentRecipe:
    """The recipe of a student with a map, for images of `size` pixels.

    width: the teacher's. refused: what timm said to `img_size`, where it did not build the model with it.

    Raises:
        UserError: it cannot be built or run at this size, it has no map, or none of that reduction, or its last stage
            cannot be widened.
    """
    kwargs = dict(config.kwargs)
    if refused is None:
        kwargs = {"img_size": size, **kwargs}
    elif "img_size" not in str(refused.__cause__):
        raise UserError(str(refused)) from refused
    recipe = StudentRecipe(config.model, {"num_classes": 0, **kwargs}, config.remedy, None, map_at=size)
    if config.remedy == "wide_last":
        recipe = _widened(recipe, width)
    layout = probe(recipe)
    if config.reduction not in (None, layout.reductions[-1]):
        if config.reduction not in layout.reductions:
            has = ", ".join(map(str, sorted(set(layout.reductions))))
            raise UserError(
                f"student.reduction={config.reduction}: student.model={config.model} at {size} pixels has maps "
                f"at {has} pixels a token"
            )
        if config.remedy == "wide_last":
            raise UserError(
                f"student.remedy=wide_last with student.reduction={config.reduction}: widens the last stage"
            )
        recipe = replace(recipe, reduction=config.reduction)
    if config.remedy == "lift":
        recipe = replace(recipe, width=width)
    if not config.num_classes:
        return recipe
    if config.remedy == "lift" or recipe.reduction or layout.cls == "mean":
        return replace(recipe, mean_head=config.num_classes)
    return replace(recipe, kwargs=recipe.kwargs | {"num_classes": config.num_classes})


def assemble_map(recipe: StudentRecipe) -> MapStudent:
    """Build what a recipe says. What lies behind an earlier stage is not built in."""
    layout = probe(recipe)
    model = timm.create_model(recipe.model, pretrained=False, **recipe.kwargs)
    if layout.stage is not None:
        model.prune_intermediate_layers([layout.stage], prune_norm=True, prune_head=True)
    add_parts(model, recipe, layout.width)
    return MapStudent(model, recipe, layout)


def add_parts(model: nn.Module, recipe: StudentRecipe, width: int) -> None:
    """Put what a recipe adds to a model into it. width: channels of its cells."""
    if recipe.remedy == "lift":
        model.lift = widening(width, recipe.width)
        width = recipe.width
    if recipe.mean_head:
        model.mean_head = nn.Linear(width, recipe.mean_head).apply(init_weights_vit_timm)


def probe(recipe: StudentRecipe) -> Layout:
    """Run the recipe's plain model once, without memory where it can. UserError where it does not run or has no map."""
    key = repr(recipe)
    if key not in _PROBED:
        _PROBED[key] = _probed(recipe)
    return _PROBED[key]


def _probed(recipe: StudentRecipe) -> Layout:
    what, size = f"student.model={recipe.model}", recipe.map_at
    for device in ("meta", "cpu"):
        if device == "cpu" and size > _MOST_ON_CPU:
            raise UserError(
                f"{what} at {size} pixels cannot be used: at more than {_MOST_ON_CPU} it would take too long"
            )
        try:
            with torch.device(device), torch.no_grad():
                model = timm.create_model(recipe.model, pretrained=False, **recipe.kwargs)
                maps, raw, pooled, normed = _looked_at(model, torch.zeros(2, 3, size, size))
            break
        except Exception as error:  # whatever a model raises at a size that it was not made for
            needs_numbers = isinstance(error, NotImplementedError) or "meta" in str(error)
            if device == "meta" and needs_numbers:
                continue
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{what} at {size} pixels cannot be used: {reason:.200}{_way_out(reason)}") from error
    if not maps or maps[-1].ndim != 4:
        raise UserError(f"{what}: has no spatial map, so there are no cells to match")
    return _layout(model, recipe, maps, raw, pooled, normed)


def _way_out(reason: str) -> str:
    """What helps where an argument is one of another model, of the config that this one builds on."""
    refused = re.search(r"unexpected keyword argument '(\w+)'", reason)
    return f"; student.kwargs.{refused[1]}=null takes it away" if refused else ""


def _looked_at(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Any, Optional[Tensor], bool]:
    """All maps, what `forward_features` gives, what the classifier sees, and whether intermediates can be normed.

    In training mode, as the student will run.
    """
    raw = model.forward_features(images)
    maps = model.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
    pooled = None
    if hasattr(model, "forward_head") and "pre_logits" in inspect.signature(model.forward_head).parameters:
        with contextlib.suppress(NotImplementedError):  # an encoder by itself
            pooled = model.forward_head(raw, pre_logits=True)
    try:
        normed = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW")[1][-1]
        keeps = normed.shape == maps[-1].shape
    except (AssertionError, TypeError, RuntimeError):
        keeps = False
    return maps, raw, pooled, keeps


def _layout(
    model: nn.Module, recipe: StudentRecipe, maps: list[Tensor], raw: Any, pooled: Optional[Tensor], normed: bool
) -> Layout:
    size = recipe.map_at
    source, order, prefix, grid, width = _final_map(model, raw, maps[-1])
    earlier = [round(size / found.shape[-2]) for found in maps]
    deepest = round(size / grid[0])
    cls, cls_width = "mean", width
    if source == "features" and prefix and getattr(model, "cls_token", None) is not None:
        cls = "token"
    elif isinstance(pooled, Tensor) and pooled.ndim == 2 and recipe.remedy != "lift":
        cls, cls_width = "pooled", pooled.shape[-1]
    if recipe.reduction in (None, deepest):
        stage = None
        is_last = (grid, width) == (tuple(maps[-1].shape[2:]), maps[-1].shape[1])
        before = maps[:-1] if is_last else maps  # there may be a convolution behind the last of them
    else:
        stage = max(index for index, found in enumerate(earlier) if found == recipe.reduction)
        grid, width = tuple(maps[stage].shape[-2:]), maps[stage].shape[1]
        source, order, prefix, cls, cls_width = "intermediates", "NCHW", 0, "mean", width
        before = maps[:stage]
    return Layout(
        source, stage, order, prefix, normed, cls, tuple(grid), width, cls_width, (*earlier, deepest),
        tuple(tuple(found.shape[2:]) for found in before),
    )  # fmt: skip


def _final_map(
    model: nn.Module, raw: Any, deepest: Tensor
) -> tuple[Literal["features", "intermediates"], Literal["NCHW", "NHWC", "NLC"], int, tuple[int, int], int]:
    """Source, order, prefix, grid and width of what a model ends in. deepest: its last intermediate map, NCHW."""
    if isinstance(raw, Tensor) and raw.ndim == 4:
        if _channels_last(model, raw, deepest):
            return "features", "NHWC", 0, tuple(raw.shape[1:3]), raw.shape[3]
        return "features", "NCHW", 0, tuple(raw.shape[2:]), raw.shape[1]
    grid = tuple(deepest.shape[2:])
    if isinstance(raw, Tensor) and raw.ndim == 3:
        prefix = raw.shape[1] - grid[0] * grid[1]
        if 0 <= prefix <= _MOST_PREFIX:
            return "features", "NLC", prefix, grid, raw.shape[2]
    return "intermediates", "NCHW", 0, grid, deepest.shape[1]


def _channels_last(model: nn.Module, raw: Tensor, deepest: Tensor) -> bool:
    """Told by the width that the model says it has, or, where both ends have it, by timm's own word."""
    first, last = raw.shape[1] == model.num_features, raw.shape[3] == model.num_features
    if first != last:
        return last
    return getattr(model, "output_fmt", "NCHW") == "NHWC" or (raw.shape[1:3] == deepest.shape[2:] and not first)


def _widened(recipe: StudentRecipe, width: Optional[int]) -> StudentRecipe:
    """The recipe with a last stage of `width` channels, by the argument in which timm takes the widths of stages."""
    refusal = UserError(
        f"student.remedy=wide_last: the last stage of student.model={recipe.model} has no width of its own to set; use "
        "student.remedy=lift"
    )
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(recipe.model, pretrained=False, **recipe.kwargs)
        names = [name for name in _STAGE_WIDTHS if name in inspect.signature(type(model).__init__).parameters]
        before = _widths(model, recipe.map_at)
        for name in names:
            kwargs = recipe.kwargs | {name: [*before[-_stages(type(model), name) : -1], width]}
            try:
                after = _widths(timm.create_model(recipe.model, pretrained=False, **kwargs), recipe.map_at)
            except (TypeError, ValueError, AssertionError, RuntimeError, IndexError):
                continue
            if after == [*before[:-1], width]:
                return replace(recipe, kwargs=kwargs, width=width)
    raise refusal


def widened_parts(recipe: StudentRecipe) -> tuple[str, ...]:
    """Names of the tensors of a model with wide_last whose shape follows from the width of its last stage."""
    (name,) = (name for name in _STAGE_WIDTHS if recipe.kwargs.get(name, [None])[-1] == recipe.width)
    wider = recipe.kwargs | {name: [*recipe.kwargs[name][:-1], 2 * recipe.width]}
    with torch.device("meta"):
        mine = timm.create_model(recipe.model, pretrained=False, **recipe.kwargs).state_dict()
        theirs = timm.create_model(recipe.model, pretrained=False, **wider).state_dict()
    return tuple(key for key, tensor in mine.items() if tensor.shape != theirs[key].shape)


def _stages(kind: type[nn.Module], name: str) -> int:
    """How many widths the argument takes by default; 4 where that does not say."""
    default = inspect.signature(kind.__init__).parameters[name].default
    return len(default) if isinstance(default, (tuple, list)) else 4


def _widths(model: nn.Module, size: int) -> list[int]:
    maps = model.forward_intermediates(torch.zeros(2, 3, size, size), output_fmt="NCHW", intermediates_only=True)
    return [found.shape[1] for found in maps]
