"""Every family, at every block, against timm's own intermediates; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from families import FAMILIES, SMALL
from leap_dist.config import TeacherConfig
from leap_dist.errors import UserError
from leap_dist.models.backbone import nearest_model
from leap_dist.teacher import build_teacher, describe_teacher


def reference_model(name: str, image_size: int, kwargs: dict[str, Any], classes: int = 0) -> nn.Module:
    """timm's model as timm builds it, with weights large enough that every block matters.

    Frozen as the teacher is: torch picks another order of summation where a weight could need a gradient.
    """
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=classes, img_size=image_size, **SMALL, **kwargs).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def timm_features(model: nn.Module, images: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
    """Patch and prefix tokens of 1-indexed `block`."""
    options = {"norm": True, "stop_early": True, "output_fmt": "NLC", "intermediates_only": True}
    if not isinstance(model, timm.models.Cait) and model.num_prefix_tokens:
        options["return_prefix_tokens"] = True
    with torch.no_grad():
        (found,) = model.forward_intermediates(images, indices=[block - 1], **options)
    return found if isinstance(found, tuple) else (found, None)


@pytest.mark.parametrize(("name", "image_size", "kwargs"), FAMILIES)
def test_features_are_timms_at_every_block(name, image_size, kwargs, tmp_path):
    model = reference_model(name, image_size, kwargs)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    config = TeacherConfig(model=name, kwargs=SMALL | kwargs, weights=str(tmp_path / "weights.safetensors"))
    teacher = build_teacher(config, image_size, torch.device("cpu"))
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))

    swept = list(teacher.sweep(images))
    assert len(swept) == SMALL["depth"]
    for block in range(1, SMALL["depth"] + 1):
        teacher.retarget(block)
        patch, cls, logits = teacher.features(images)
        assert logits is None
        expected, prefix = timm_features(model, images, block)
        assert torch.equal(patch, expected)
        assert torch.equal(patch, swept[block - 1].patch)
        assert patch.shape == (2, teacher.spec.grid[0] * teacher.spec.grid[1], SMALL["embed_dim"])
        assert (cls is not None) == (prefix is not None) == teacher.spec.has_cls
        if cls is not None:
            assert torch.equal(cls, prefix[:, 0])
            assert torch.equal(cls, swept[block - 1].cls)
    assert not torch.allclose(swept[0].patch, swept[1].patch, atol=0.02)


@pytest.mark.parametrize(
    ("name", "image_size", "kwargs"),
    # BEiT and the last two add a bias of the keys that no checkpoint holds.
    [*FAMILIES, ("eva02_tiny_patch14_224", 42, {}), ("vit_small_patch16_dinov3_qkvb", 48, {})],
)
def test_bf16_is_close_to_fp32(name, image_size, kwargs, tmp_path):
    model = reference_model(name, image_size, kwargs)
    for parameter in model.parameters():
        parameter *= 0.3  # so that rounding is not amplified from block to block
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    config = TeacherConfig(model=name, kwargs=SMALL | kwargs, weights=str(tmp_path / "weights.safetensors"))
    exact, rounded = (
        build_teacher(replace(config, dtype=dtype), image_size, torch.device("cpu")) for dtype in ("fp32", "bf16")
    )
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    for block in range(1, SMALL["depth"] + 1):
        exact.retarget(block)
        rounded.retarget(block)
        truth, found = exact.features(images).patch, rounded.features(images).patch
        assert found.dtype == torch.bfloat16
        assert 1e-3 < (found.float() - truth).norm() / truth.norm() < 1e-2


@pytest.mark.parametrize(
    ("name", "image_size", "kwargs"),
    [*FAMILIES, ("vit_medium_patch16_gap_240", 48, {}), ("deit3_small_patch16_224", 48, {"global_pool": "avg"})],
)
def test_logits_are_timms_and_come_with_the_last_block_only(name, image_size, kwargs, tmp_path):
    """Pooled tokens, normed before or after, attention pooling, two heads, CaiT's class attention: all as timm's."""
    model = reference_model(name, image_size, kwargs, classes=5)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    config = TeacherConfig(model=name, kwargs=SMALL | kwargs, weights=str(tmp_path / "weights.safetensors"))
    teacher = build_teacher(config, image_size, torch.device("cpu"), classes=5)
    without = build_teacher(config, image_size, torch.device("cpu"))
    assert teacher.spec == without.spec
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    swept = list(teacher.sweep(images))
    for block in range(1, SMALL["depth"] + 1):
        teacher.retarget(block)
        without.retarget(block)
        found, bare = teacher.features(images), without.features(images)
        assert torch.equal(found.patch, bare.patch) and bare.logits is None
        assert (found.logits is not None) == (swept[block - 1].logits is not None) == (block == SMALL["depth"])
    assert torch.equal(found.logits, model(images)) and torch.equal(swept[-1].logits, found.logits)
    assert found.logits.std() > 0.1


@pytest.mark.parametrize(
    ("name", "depth", "dim", "grid", "has_cls", "mean"),
    [
        ("vit_giant_patch14_dinov2", 40, 1536, (16, 16), True, 0.485),
        ("vit_giant_patch14_reg4_dinov2", 40, 1536, (16, 16), True, 0.485),
        ("vit_7b_patch16_dinov3", 40, 4096, (14, 14), True, 0.485),
        ("eva02_large_patch14_224", 24, 1024, (16, 16), True, 0.48145466),
        ("deit_small_distilled_patch16_224", 12, 384, (14, 14), True, 0.485),
        ("cait_s24_224", 24, 384, (14, 14), False, 0.485),
        ("vit_base_patch16_siglip_224", 12, 768, (14, 14), False, 0.5),
        ("vit_medium_patch16_gap_240.sw_in12k", 12, 512, (14, 14), False, 0.5),
    ],
)
def test_registry_names_are_described_without_memory(name, depth, dim, grid, has_cls, mean):
    before = torch.random.get_rng_state()
    spec = describe_teacher(TeacherConfig(model=name), 224)
    assert (spec.depth, spec.dim, spec.grid, spec.has_cls, spec.mean[0]) == (depth, dim, grid, has_cls, mean)
    assert len(spec.mean) == len(spec.std) == 3
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("model", "kwargs", "image_size", "said"),
    [
        ("resnet50", {}, 224, "resnet50.*VisionTransformer, Eva, Cait, Beit"),
        ("swin_tiny_patch4_window7_224", {}, 224, "SwinTransformer.*VisionTransformer, Eva, Cait, Beit"),
        ("vit_gigant_patch14_dinov2", {}, 224, "vit_gigant_patch14_dinov2.*did you mean vit_giant_patch14_dinov2"),
        ("dinov2_vitg14", {}, 224, "did you mean vit_giant_patch14_dinov2"),
        ("vit_small_patch14_dinov2.nope", {}, 224, "nope"),
        ("vit_small_patch14_dinov2", {}, 225, "data.image_size=225: not a multiple of 14"),
        ("cait_s24_224", {}, 200, "data.image_size=200: not a multiple of 16"),
        ("vit_small_patch14_dinov2", {"emb_dim": 8}, 224, "emb_dim"),
        ("vit_small_patch14_dinov2", {"num_heads": 5}, 224, "divisible by num_heads"),
        ("vit_small_patch14_dinov2", {"img_size": 98}, 224, "must not set .*img_size"),
    ],
)
def test_impossible_teacher_is_one_line(model, kwargs, image_size, said):
    with pytest.raises(UserError, match=said) as caught:
        describe_teacher(TeacherConfig(model=model, kwargs=kwargs), image_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "timms"),
    [
        ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2"),
        ("dinov2_vitb14", "vit_base_patch14_dinov2"),
        ("dinov3_vit7b16", "vit_7b_patch16_dinov3"),
        ("facebook/dinov3-vits16plus-pretrain-lvd1689m", "vit_small_plus_patch16_dinov3"),
        ("dinov3_vith16plus", "vit_huge_plus_patch16_dinov3"),
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
        ("zzz", None),
    ],
)
def test_a_name_of_metas_or_a_typing_error_leads_to_timms(theirs, timms):
    assert nearest_model(theirs) == timms
