"""A small model of every family of timm's that a teacher can be of."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2}
SHARED_BIAS = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}
FAMILIES = [  # model, image size, further kwargs
    ("vit_small_patch14_dinov2", 42, {}),
    ("vit_giant_patch14_dinov2", 42, {}),  # SwiGLU
    ("vit_giant_patch14_reg4_dinov2", 42, {}),  # registers; position embedding without the prefix
    ("vit_base_patch16_clip_224", 48, {}),  # a norm before the first block
    ("vit_base_patch16_siglip_224", 48, {}),  # no class token
    ("deit_small_patch16_224", 48, {}),
    ("deit_small_distilled_patch16_224", 48, {}),  # class and distillation token
    ("eva02_base_patch14_224", 42, {}),
    ("eva02_base_patch14_224", 42, {"use_rot_pos_emb": False}),
    ("eva02_base_patch14_224", 42, {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3)}),
    ("vit_small_patch16_rope_mixed_224", 48, {}),  # a rotary table per block
    ("vit_small_patch16_dinov3", 48, {}),
    ("vit_7b_patch16_dinov3", 48, {}),
    ("cait_s24_224", 48, {}),
    ("beit_base_patch16_224", 48, {}),
    ("beit_base_patch16_224", 48, SHARED_BIAS),
]
