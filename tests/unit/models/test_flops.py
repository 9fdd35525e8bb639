"""FLOP counts against closed forms and published figures, and closed forms against torch's counter."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn.functional import linear, mse_loss
from torch.utils.flop_counter import FlopCounterMode

from families import FAMILIES, SMALL
from leap_dist.config import StudentConfig, TeacherConfig, load
from leap_dist.matching import cka
from leap_dist.models.backbone import build_model
from leap_dist.models.flops import (
    TeacherFlops,
    cka_flops,
    match_flops,
    moments_flops,
    step_flops,
    student_step_flops,
    teacher_flops,
)
from leap_kernels import Moments
from leap_kernels.feature_match import reference


def attention_flops(tokens: int, dim: int) -> int:
    """qkv and projection 8 N D^2, scores and their use 4 N^2 D."""
    return 8 * tokens * dim**2 + 4 * tokens**2 * dim


def mlp_flops(tokens: int, dim: int, hidden: int, matrices: int = 2) -> int:
    """`matrices` D x hidden products: 2, or 3 for SwiGLU."""
    return 2 * matrices * tokens * dim * hidden


# Talking heads: two more products that mix the 8 heads of every score.
CAIT_HEADS = 2 * 2 * 196**2 * 8 * 8


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("model", "embed", "attention", "mlp", "depth"),
    [
        ("vit_small_patch14_dinov2", 2 * 256 * 588 * 384, attention_flops(257, 384), mlp_flops(257, 384, 1536), 12),
        (
            "vit_giant_patch14_dinov2",
            2 * 256 * 588 * 1536,
            attention_flops(257, 1536),
            mlp_flops(257, 1536, 4096, matrices=3),
            40,
        ),
        (
            "vit_giant_patch14_reg4_dinov2",
            2 * 256 * 588 * 1536,
            attention_flops(261, 1536),
            mlp_flops(261, 1536, 4096, matrices=3),
            40,
        ),
        (
            "vit_7b_patch16_dinov3",
            2 * 196 * 768 * 4096,
            attention_flops(201, 4096),
            mlp_flops(201, 4096, 8192, matrices=3),
            40,
        ),
        ("cait_s24_224", 2 * 196 * 768 * 384, attention_flops(196, 384) + CAIT_HEADS, mlp_flops(196, 384, 1536), 24),
    ],
)
def test_published_teachers_equal_the_closed_form(model: str, embed: int, attention: int, mlp: int, depth: int) -> None:
    flops = teacher_flops(TeacherConfig(model=model), 224)
    assert flops.embed == embed
    assert flops.attention == (attention,) * depth
    assert flops.blocks == (attention + mlp,) * depth
    assert flops.norm == 0


@pytest.mark.parametrize(("name", "image_size", "kwargs"), FAMILIES)
def test_every_family_equals_the_closed_form(name: str, image_size: int, kwargs: dict) -> None:
    """From the widths of the built model's weights, not from running it."""
    flops = teacher_flops(TeacherConfig(model=name, kwargs=SMALL | kwargs), image_size)
    model = build_model(name, SMALL | kwargs, image_size, device="meta")
    patches, dim = model.patch_embed.num_patches, model.embed_dim
    prefix = 0 if name.startswith("cait") else model.num_prefix_tokens  # CaiT's class token joins after these blocks
    tokens, heads = patches + prefix, SMALL["num_heads"]
    mixing = 2 * 2 * tokens**2 * heads * heads if name.startswith("cait") else 0
    matrices = [p.numel() for n, p in model.blocks[0].mlp.named_parameters() if p.ndim == 2]
    assert flops.embed == pytest.approx(2 * patches * model.patch_embed.proj.weight.numel(), rel=0.01)
    assert flops.attention == pytest.approx((attention_flops(tokens, dim) + mixing,) * 3, rel=0.01)
    assert flops.blocks == pytest.approx((flops.attention[0] + 2 * tokens * sum(matrices),) * 3, rel=0.01)


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "deit_small_distilled_patch16_224", "cait_s24_224"])
def test_the_whole_teacher_with_its_classifier_is_timms_forward(name: str) -> None:
    flops = teacher_flops(TeacherConfig(model=name, kwargs=SMALL), 48, classes=10)
    model = timm.create_model(name, img_size=48, num_classes=10, device="meta", **SMALL).eval().requires_grad_(False)
    with torch.no_grad():
        assert flops.upto(3) == counted(lambda: model(torch.empty(1, 3, 48, 48, device="meta")))
    assert flops.classifier > 0
    assert flops.upto(2) == teacher_flops(TeacherConfig(model=name, kwargs=SMALL), 48).upto(2)


def test_vit_g_has_the_published_cost() -> None:
    """299 GMAC an image at 224 pixels, 7.48 a block; a block is about 2.5 % of the teacher."""
    flops = teacher_flops(TeacherConfig(model="vit_giant_patch14_dinov2"), 224)
    assert flops.upto(40) / 2e9 == pytest.approx(299, abs=0.5)
    assert flops.blocks[0] / 2e9 == pytest.approx(7.48, abs=0.005)
    assert 1 - flops.upto(39) / flops.upto(40) == pytest.approx(0.025, abs=0.0005)


@pytest.mark.parametrize(("kwargs", "gmac"), [({}, 6.1), ({"embed_dim": 192, "num_heads": 3}, 1.7)])
def test_students_have_the_published_cost(kwargs: dict, gmac: float) -> None:
    flops = student_step_flops(StudentConfig(model="vit_small_patch14_dinov2", kwargs=kwargs), 224)
    assert flops.forward / 2e9 == pytest.approx(gmac, abs=0.05)


def test_backward_is_twice_forward_but_for_the_images() -> None:
    """Every product has two gradients; only the patch embedding's input, the image, needs none."""
    flops = student_step_flops(StudentConfig(model="vit_small_patch14_dinov2"), 224)
    assert flops.backward == 2 * flops.forward - 2 * 256 * 588 * 384
    layered = student_step_flops(StudentConfig(model="vit_small_patch14_dinov2"), 224, every_layer=True)
    assert layered == flops  # reading every layer costs no product


def test_embedding_and_norm_belong_to_every_depth() -> None:
    flops = TeacherFlops(embed=10, blocks=(20, 30, 35), norm=5)
    assert [flops.upto(block) for block in (1, 2, 3)] == [35, 65, 100]


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_matching_and_score_equal_torchs_count_of_their_definitions() -> None:
    rows, width, teacher_width = 50, 24, 40
    tokens, target = torch.randn(rows, width, requires_grad=True), torch.randn(rows, teacher_width)
    weight = torch.randn(teacher_width, width, requires_grad=True)
    definition = counted(lambda: mse_loss(linear(tokens, weight), target).backward())
    assert match_flops(rows, width, teacher_width) == definition
    student, teacher = tokens.detach(), target
    products = counted(lambda: (student.T @ student, teacher.T @ student, teacher.T @ teacher))
    assert moments_flops(rows, width, teacher_width) == products
    moments: Moments = reference.moments(student, teacher)
    assert cka_flops(width, teacher_width) == counted(lambda: cka.linear_cka(moments, weight.detach()))


def configured(*overrides: str):
    sizes = ["teacher.kwargs.depth=3", "teacher.kwargs.embed_dim=48", "teacher.kwargs.num_heads=3"]
    sizes += ["student.kwargs.depth=3", "student.kwargs.embed_dim=24", "student.kwargs.num_heads=3"]
    models = ["teacher.model=vit_tiny_patch16_224", "student.model=vit_tiny_patch16_224", "data.train=digits"]
    return load(None, [*models, *sizes, "data.image_size=32", *overrides])


@pytest.mark.seconds
def test_a_step_has_a_head_per_target_and_a_score_of_its_metric() -> None:
    one = step_flops(configured())  # 4 patch tokens and the class token; one head of 24 x 48
    assert one.match == 6 * 5 * 24 * 48
    assert step_flops(configured("objective.cls_weight=0")).match == 6 * 4 * 24 * 48
    assert (one.evidence, one.cka) == (2 * 4 * (24**2 + 24 * 48 + 48**2), 4 * 48 * 24**2 + 2 * 24**3)
    cosine = step_flops(configured("curriculum.metric=cosine"))
    assert (cosine.evidence, cosine.cka) == (2 * 4 * 24 * 48, 0)
    layers = step_flops(configured("curriculum.mode=all_layers"))
    assert (layers.match, layers.evidence) == (3 * one.match, 3 * one.evidence)
    assert layers.teacher == one.teacher


@pytest.mark.parametrize("remedy", ["none", "lift", "wide_last"])
def test_a_remedys_work_equals_the_closed_form(remedy: str) -> None:
    """DeiT-Tiny at 224 pixels to CaiT-S24's 384 channels, from the widths."""
    narrow, wide = (attention_flops(197, width) + mlp_flops(197, width, 4 * width) for width in (192, 384))
    blocks = {"none": 12 * narrow, "lift": 12 * narrow, "wide_last": 11 * narrow + wide}[remedy]
    projection = 0 if remedy == "none" else 2 * 197 * 192 * 384
    found = student_step_flops(StudentConfig(model="deit_tiny_patch16_224", remedy=remedy), 224, 384)
    assert found.forward == 2 * 196 * 768 * 192 + blocks + projection


def test_matching_without_a_projection_costs_the_moments_only() -> None:
    lifted = step_flops(configured("student.remedy=lift"))
    assert (lifted.match, lifted.evidence, lifted.cka) == (0, 2 * 4 * 3 * 48**2, 0)
    pooled = step_flops(configured("objective.head=pooled"))
    assert (pooled.match, pooled.evidence, pooled.cka) == (0, 2 * 4 * 3 * 24**2, 0)
    assert step_flops(configured("objective.head=pooled", "curriculum.metric=cosine")).evidence == 0
    projected = step_flops(configured("student.remedy=lift", "objective.head=linear"))
    assert projected.match == 6 * 5 * 48 * 48
