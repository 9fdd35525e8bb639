"""A plain vision transformer as a folder that Hugging Face's transformers loads: Dinov2, with or without registers.

Tensor names and arguments are those of transformers 4.57 and 5 (`modeling_dinov2.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import GluMlp, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from leap_dist.deployment.hub_folder import is_plain
from leap_dist.deployment.loaded import WEIGHTS, Distilled
from leap_dist.errors import UserError
from leap_dist.models.records import ImageSpec
from leap_dist.runtime.files import write_json


def write_transformers_folder(model: Distilled, folder: Path) -> None:
    """Fill the empty `folder`. UserError for a student that is no plain vision transformer."""
    backbone = model.student.backbone
    _require_dinov2(model, backbone)
    save_file(dict(_tensors(backbone)), folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "config.json", _config(backbone, model.spec.image_size))
    write_json(folder / "preprocessor_config.json", _preprocessor(model.spec))


def _require_dinov2(model: Distilled, backbone: nn.Module) -> None:
    what = f"--to transformers: the student, {model.record['model']}"
    if not is_plain(model) or type(backbone) is not VisionTransformer:
        raise UserError(f"{what}, is no plain vision transformer; --to onnx, hub and pt2 take any")
    block = backbone.blocks[0]
    tied = [
        (backbone.pos_embed is None, "has no learned position embedding"),
        (backbone.cls_token is None, "has no class token"),
        (type(block) is not Block or block.attn.qkv is None, "has blocks of another kind"),
        (not isinstance(block.attn.q_norm, nn.Identity), "normalises queries and keys"),
        (not isinstance(backbone.norm_pre, nn.Identity), "has a norm before its blocks"),
        (not isinstance(backbone.fc_norm, nn.Identity), "has its norm behind the pooling"),
        (not _is_swiglu(block.mlp) and not _is_gelu(block.mlp), "has another kind of MLP"),
    ]
    for wrong, why in tied:
        if wrong:
            raise UserError(f"{what}, {why}, which the Dinov2 layout cannot say; --to onnx, hub and pt2 take it")


def _is_swiglu(mlp: nn.Module) -> bool:
    """timm's SwiGLUPacked: the first half of the channels is gated."""
    return isinstance(mlp, GluMlp) and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last


def _is_gelu(mlp: nn.Module) -> bool:
    exact = isinstance(getattr(mlp, "act", None), nn.GELU) and mlp.act.approximate == "none"
    return type(mlp) is Mlp and exact and isinstance(mlp.norm, nn.Identity)


def _config(backbone: VisionTransformer, size: int) -> dict[str, Any]:
    block, registers = backbone.blocks[0], backbone.num_reg_tokens
    kind = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    config = {
        "architectures": [kind],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": block.attn.num_heads,
        "mlp_ratio": _mlp_ratio(block, backbone.embed_dim),
        "use_swiglu_ffn": _is_swiglu(block.mlp),
        "hidden_act": "gelu",
        "layer_norm_eps": block.norm1.eps,
        "image_size": size,
        "patch_size": backbone.patch_embed.patch_size[0],
        "qkv_bias": block.attn.qkv.bias is not None,
        "layerscale_value": 1.0,
        "dtype": "float32",
    }
    return config | ({"num_register_tokens": registers} if registers else {})


def _mlp_ratio(block: nn.Module, width: int) -> float:
    """The ratio from which transformers computes the hidden width. UserError where no ratio gives it."""
    hidden = block.mlp.fc1.out_features
    if _is_swiglu(block.mlp):
        if hidden // 2 % 8:
            raise UserError(
                f"--to transformers: a SwiGLU of {hidden // 2} channels; the layout has multiples of 8 only"
            )
        hidden = 3 * hidden // 4  # two thirds of it are taken
    return hidden // width if hidden % width == 0 else hidden / width


def _tensors(backbone: VisionTransformer) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors; what a plain vision transformer does not have stands as what has no effect."""
    state = {name: tensor.detach().float().contiguous() for name, tensor in backbone.state_dict().items()}
    width = backbone.embed_dim
    positions = state["pos_embed"]
    if positions.shape[1] == backbone.patch_embed.num_patches:  # as DINOv2 with registers: no place for the class token
        positions = torch.cat([torch.zeros(1, 1, width), positions], dim=1)
    elif backbone.num_reg_tokens and positions.shape[1] > backbone.patch_embed.num_patches + 1:
        raise UserError("--to transformers: registers with positions of their own, which the layout cannot say")
    yield "embeddings.cls_token", state["cls_token"]
    yield "embeddings.mask_token", torch.zeros(1, width)
    yield "embeddings.position_embeddings", positions.contiguous()
    if backbone.num_reg_tokens:
        yield "embeddings.register_tokens", state["reg_token"]
    for part in ("weight", "bias"):
        yield f"embeddings.patch_embeddings.projection.{part}", state[f"patch_embed.proj.{part}"]
        yield f"layernorm.{part}", state[f"norm.{part}"]
    for index, block in enumerate(backbone.blocks):
        ours = {name: tensor.detach().float().contiguous() for name, tensor in block.state_dict().items()}
        for name, tensor in _block(block, ours):
            yield f"encoder.layer.{index}.{name}", tensor


def _block(block: nn.Module, ours: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    width = ours["norm1.weight"].shape[0]
    for part in ("weight", "bias"):
        yield f"norm1.{part}", ours[f"norm1.{part}"]
        yield f"norm2.{part}", ours[f"norm2.{part}"]
        yield f"attention.output.dense.{part}", ours[f"attn.proj.{part}"]
        if f"attn.qkv.{part}" in ours:
            for name, tensor in zip(("query", "key", "value"), ours[f"attn.qkv.{part}"].chunk(3), strict=True):
                yield f"attention.attention.{name}.{part}", tensor.contiguous()
        names = ("weights_in", "weights_out") if _is_swiglu(block.mlp) else ("fc1", "fc2")
        for mine, theirs in zip(("fc1", "fc2"), names, strict=True):
            yield f"mlp.{theirs}.{part}", ours[f"mlp.{mine}.{part}"]
    for number in (1, 2):
        yield f"layer_scale{number}.lambda1", ours.get(f"ls{number}.gamma", torch.ones(width))


def _preprocessor(spec: ImageSpec) -> dict[str, Any]:
    size = spec.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(size / spec.crop_pct)},
        "resample": {"bilinear": 2, "bicubic": 3}[spec.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spec.mean,
        "image_std": spec.std,
    }
