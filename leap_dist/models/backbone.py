"""A timm vision transformer split into embed | block i | finish, so that it can be run only as deep as needed.

`timm`'s own `forward_intermediates` fixes what the pieces must add up to: the tests hold every family to it, bitwise.
Legend: B images, P prefix tokens (CLS, distillation, registers), N patch tokens, D width.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import timm
import torch
from timm.models import beit, cait, eva, vision_transformer
from torch import Tensor, nn

from leap_dist.errors import UserError
from leap_dist.models.features import Features

# fp8: of tokens, and of all weights that meet no product in FP8 (`leap_dist.teacher.float8`).
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
# Arguments of timm.create_model that lead to files, to downloads or to another kind of model.
LOADERS = {
    "cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cfg", "features_only", "kwargs_filter",
    "model_name", "no_jit", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn",
    "pretrained_strict", "scriptable",
}  # fmt: skip
# Those, and what follows from the rest of the configuration.
_MANAGED = LOADERS | {"dynamic_img_size", "img_size", "in_chans", "num_classes"}

# As torch.hub and Hugging Face have them: dinov2_vitg14_reg, facebook/dinov3-vits16plus-pretrain-lvd1689m.
_META_NAME = re.compile(r"(?:facebook/)?(dinov[23])_vit(7b|[sblgh])(\d+)(plus)?(_reg)?")
_META_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant", "h": "huge", "7b": "7b"}


@dataclass(frozen=True)
class TeacherSpec:
    """What a teacher is, known before any weight is loaded.

    depth: number of blocks; dim: width of a token; grid: (rows, columns) of patch tokens; has_cls: whether there is a
    class token at every depth; has_norm: whether its tokens pass a final norm (else the model's only one belongs to its
    pooling head); mean, std: the normalisation of RGB in [0, 1] that its pretrained weights expect.
    """

    model: str
    depth: int
    dim: int
    grid: tuple[int, int]
    has_cls: bool
    has_norm: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Backbone(nn.Module):
    """What the families share. `stem` is the timm model without its blocks: patch embedding, prefix tokens,
    position embedding and final norm, which every target block needs, and the classifier, if it was kept; `blocks` are
    the rest.

    classes: of the classifier, 0 without one.
    """

    # Arguments of timm.create_model that fix the grid at construction, where a family would else allow any.
    build_kwargs: ClassVar[dict[str, Any]] = {}
    # timm's converter from a published checkpoint's names, grid and layout to the model's.
    checkpoint_filter: ClassVar[Callable[..., dict[str, Tensor]]]
    # Leading parts of checkpoint keys that belong to heads and pre-training: not in a model without its head.
    unused_keys: ClassVar[tuple[str, ...]] = ("head", "head_dist", "fc_norm", "attn_pool", "mask_token", "lm_head")

    # Whether the class token joins after the last block only.
    late_cls: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.spec = _spec(model, self.late_cls)
        self.classes: int = model.num_classes
        self.blocks = nn.ModuleList(model.blocks)
        model.blocks = nn.ModuleList()  # so that moving the stem moves no block
        self.stem = model
        self.eval().requires_grad_(False)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, P+N, D) that enter the first block."""
        raise NotImplementedError

    def context(self) -> Any:
        """What blocks need besides the tokens; it depends on the grid only, not on the images."""
        return None

    def run_block(self, index: int, tokens: Tensor, context: Any) -> Tensor:
        """Tokens (B, P+N, D) through block `index`, counted from 0."""
        return self.blocks[index](tokens)

    def finish(self, tokens: Tensor, block: int) -> Features:
        """Apply the teacher's final norm (LEAP, section 3: at every target block) and cut the prefix tokens off.

        Where a model's only norm belongs to its pooling head (timm's `fc_norm`) the tokens stay as they are,
        as in `forward_intermediates(norm=True)`.

        block: the 1-indexed one that `tokens` come from. The last one's are classified, if there is a classifier.
        """
        logits = self.classify(tokens) if self.classes and block == self.spec.depth else None
        tokens = self.stem.norm(tokens)
        cls = tokens[:, 0] if self.spec.has_cls else None
        return Features(tokens[:, 0 if self.late_cls else self.stem.num_prefix_tokens :], cls, logits)

    def classify(self, tokens: Tensor) -> Tensor:
        """Tokens (B, P+N, D) of the last block to logits (B, classes): the rest of timm's own forward."""
        return self.stem.forward_head(self.stem.norm(tokens))

    def forward(self, images: Tensor, block: int) -> Features:
        """Features of 1-indexed `block`; the blocks after it are not run."""
        return self.several(images, [block], block)[block]

    def several(self, images: Tensor, blocks: Collection[int], until: int) -> dict[int, Features]:
        """Features of 1-indexed `blocks`, by block; the last block that is run is `until`."""
        tokens, context = self.embed(images), self.context()
        found = {}
        for index in range(until):
            tokens = self.run_block(index, tokens, context)
            if index + 1 in blocks:
                found[index + 1] = self.finish(tokens, index + 1)
        return found


def vit_checkpoint_filter(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """timm's for the family, with DeiT-3's names; FlexiViT and RADIO are resampled in ways of their own, as by timm."""
    name, how = model.pretrained_cfg["architecture"], {}
    if "flexi" in name or "radio" in name:
        how = {"interpolation": "bilinear", "antialias": False}
    if any(part in name for part in getattr(vision_transformer, "_RADIO_ALIGN_CORNERS", ())):
        how["align_corners"] = True
    return vision_transformer.checkpoint_filter_fn(state, model, adapt_layer_scale=True, **how)


class VitBackbone(Backbone):
    """VisionTransformer: ViT, DINOv2 (SwiGLU, registers), DeiT with and without distillation, SigLIP, MAE, CLIP."""

    build_kwargs: ClassVar[dict[str, Any]] = {"dynamic_img_size": False}
    checkpoint_filter = staticmethod(vit_checkpoint_filter)

    def embed(self, images: Tensor) -> Tensor:
        stem = self.stem
        return stem.norm_pre(stem.patch_drop(stem._pos_embed(stem.patch_embed(images))))


class EvaBackbone(Backbone):
    """Eva: EVA-02, DINOv3, Perception Encoder and the RoPE ViTs. The context is the rotary table of all blocks."""

    build_kwargs: ClassVar[dict[str, Any]] = {"dynamic_img_size": False}
    checkpoint_filter = staticmethod(eva.checkpoint_filter_fn)

    def embed(self, images: Tensor) -> Tensor:
        tokens, _ = self.stem._pos_embed(self.stem.patch_embed(images))
        return self.stem.norm_pre(tokens)

    def context(self) -> Optional[Tensor]:
        if self.stem.rope is None:
            return None
        if hasattr(self.stem.rope, "feat_shape"):
            return self.stem.rope.get_embed()
        return self.stem.rope.get_embed(shape=self.spec.grid)

    def run_block(self, index: int, tokens: Tensor, context: Optional[Tensor]) -> Tensor:
        per_block = self.stem.rope_mixed and context is not None
        return self.blocks[index](tokens, rope=context[index] if per_block else context)


class CaitBackbone(Backbone):
    """CaiT's trunk. Its class token joins after the last of these blocks, so there is none to imitate."""

    checkpoint_filter = staticmethod(cait.checkpoint_filter_fn)
    unused_keys = (*Backbone.unused_keys, "cls_token", "blocks_token_only")
    late_cls = True

    def embed(self, images: Tensor) -> Tensor:
        return self.stem.pos_drop(self.stem.patch_embed(images) + self.stem.pos_embed)

    def classify(self, tokens: Tensor) -> Tensor:
        return super().classify(self.stem.forward_cls(tokens))


class BeitBackbone(Backbone):
    """Beit and BEiT-2. The context is the relative position bias where all blocks share one."""

    checkpoint_filter = staticmethod(beit.checkpoint_filter_fn)

    def embed(self, images: Tensor) -> Tensor:
        stem = self.stem
        tokens = stem.patch_embed(images)
        tokens = torch.cat((stem.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        return stem.pos_drop(tokens if stem.pos_embed is None else tokens + stem.pos_embed)

    def context(self) -> Optional[Tensor]:
        return None if self.stem.rel_pos_bias is None else self.stem.rel_pos_bias()

    def run_block(self, index: int, tokens: Tensor, context: Optional[Tensor]) -> Tensor:
        return self.blocks[index](tokens, shared_rel_pos_bias=context)


FAMILIES: dict[type[nn.Module], type[Backbone]] = {
    vision_transformer.VisionTransformer: VitBackbone,
    eva.Eva: EvaBackbone,
    cait.Cait: CaitBackbone,
    beit.Beit: BeitBackbone,
}


def build_model(
    name: str,
    kwargs: Mapping[str, Any],
    image_size: int,
    *,
    classes: int = 0,
    device: torch.device | str = "cpu",
    pretrained: bool = False,
    side: str = "teacher",
) -> nn.Module:
    """Build timm's `name` for square images of `image_size` pixels, without its head and pooling, or for `classes`.

    The position embedding has the grid of that size from the start, so no forward resamples it.
    Raises `UserError` as `outline` does.
    """
    fixed = family(outline(name, kwargs, image_size, side=side)).build_kwargs
    fixed = fixed | {"img_size": image_size, "num_classes": classes}
    model = timm.create_model(name, pretrained=pretrained, device=device, **kwargs, **fixed)
    if not classes:
        model.prune_intermediate_layers(len(model.blocks), prune_head=True)
    return model


def split(model: nn.Module) -> Backbone:
    """Wrap a model of `build_model`; the model belongs to the `Backbone` from then on."""
    return family(model)(model)


def family(model: nn.Module) -> type[Backbone]:
    """The adapter for a timm model of a supported family."""
    return next(backbone for timm_class, backbone in FAMILIES.items() if isinstance(model, timm_class))


def outline(name: str, kwargs: Mapping[str, Any], image_size: int, *, side: str) -> nn.Module:
    """The model without memory or weights: tells its family, and all that is wrong with the request.

    side: "teacher" or "student", for the messages. Raises `UserError` for an unknown name, arguments the model does not
    take, a family that cannot be split, and an image size that is no multiple of the patch size.
    """
    try:
        model = sketch(name, kwargs, image_size, side=side)
    except Unbuildable as error:
        raise UserError(f"{error} ({_supported()})") from error
    if not is_family(model):
        raise UserError(f"{side}.model={name}: a {type(model).__name__} cannot be split into blocks ({_supported()})")
    check_patches(model, image_size, "data.image_size", f"{side}.model={name}")
    return model


class Unbuildable(UserError):
    """timm has the model, and does not build it so."""


def sketch(name: str, kwargs: Mapping[str, Any], image_size: int, *, side: str) -> nn.Module:
    """Any timm model for images of `image_size` pixels, on the meta device and without its classifier.

    Raises `UserError` for an unknown name or arguments that belong elsewhere, `Unbuildable` for those it refuses.
    """
    if taken := _MANAGED & kwargs.keys():
        raise UserError(f"{side}.kwargs must not set {sorted(taken)}; they follow from the rest of the config")
    if not timm.is_model(name):
        near = nearest_model(name)
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"{side}.model={name}: unknown to timm {timm.__version__}{hint}")
    try:
        return timm.create_model(name, num_classes=0, img_size=image_size, device="meta", **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Unbuildable(f"{side}.model={name} at {image_size} pixels cannot be built: {reason}") from error


def is_family(model: nn.Module) -> bool:
    """Whether a timm model is of a family that can be split into blocks."""
    return isinstance(model, tuple(FAMILIES))


def check_patches(model: nn.Module, image_size: int, key: str, what: str) -> None:
    """UserError where images of `image_size` pixels, the option `key`, are no whole number of patches."""
    patch = max(model.patch_embed.feat_ratio(as_scalar=False))
    if image_size % patch:
        raise UserError(f"{key}={image_size}: not a multiple of {patch}, the patch size of {what}")


def nearest_model(name: str) -> Optional[str]:
    """timm's name of the model that `name` may mean: a typing error, or Meta's own name (dinov2_vitg14)."""
    meta = _META_NAME.match(name.lower().replace("-", "_"))
    if meta:
        family_name, size, patch, plus, registers = meta.groups()
        parts = [_META_SIZES[size], plus and "plus", f"patch{patch}", registers and "reg4", family_name]
        theirs = "_".join(["vit", *filter(None, parts)])
        if timm.is_model(theirs):
            return theirs
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=1)
    return near[0] if near else None


def _supported() -> str:
    return "supported families: " + ", ".join(timm_class.__name__ for timm_class in FAMILIES)


def _spec(model: nn.Module, late_cls: bool) -> TeacherSpec:
    pretrained = model.pretrained_cfg
    return TeacherSpec(
        model=pretrained["architecture"],
        depth=len(model.blocks),
        dim=model.embed_dim,
        grid=tuple(model.patch_embed.grid_size),
        has_cls=model.cls_token is not None and not late_cls,
        has_norm=not isinstance(model.norm, nn.Identity),
        mean=tuple(pretrained["mean"]),
        std=tuple(pretrained["std"]),
    )
