"""FLOP counts against closed forms and published figures."""

from __future__ import annotations

import pytest

from leap_dist.config import StudentConfig, TeacherConfig
from leap_dist.flops import TeacherFlops, student_flops, teacher_flops


def block_flops(tokens: int, dim: int, hidden: int, matrices: int = 2) -> int:
    """qkv and projection 8 N D^2, scores and their use 4 N^2 D, an MLP of `matrices` D x hidden products."""
    return 8 * tokens * dim**2 + 4 * tokens**2 * dim + 2 * matrices * tokens * dim * hidden


@pytest.mark.parametrize(
    ("model", "embed", "block", "depth"),
    [
        ("vit_small_patch14_dinov2", 2 * 256 * 588 * 384, block_flops(257, 384, 1536), 12),
        ("vit_giant_patch14_dinov2", 2 * 256 * 588 * 1536, block_flops(257, 1536, 4096, matrices=3), 40),
        ("vit_giant_patch14_reg4_dinov2", 2 * 256 * 588 * 1536, block_flops(261, 1536, 4096, matrices=3), 40),
        ("vit_7b_patch16_dinov3", 2 * 196 * 768 * 4096, block_flops(201, 4096, 8192, matrices=3), 40),
        # Talking heads: two more products that mix the 8 heads of every score.
        ("cait_s24_224", 2 * 196 * 768 * 384, block_flops(196, 384, 1536) + 2 * 2 * 196**2 * 8 * 8, 24),
    ],
)
def test_counts_equal_the_closed_form(model, embed, block, depth):
    flops = teacher_flops(TeacherConfig(model=model), 224)
    assert flops.embed == embed
    assert flops.blocks == (block,) * depth
    assert flops.norm == 0


def test_vit_g_has_the_published_cost():
    """299 GMAC an image at 224 pixels, 7.48 a block; a block is about 2.5 % of the teacher."""
    flops = teacher_flops(TeacherConfig(model="vit_giant_patch14_dinov2"), 224)
    assert flops.upto(40) / 2e9 == pytest.approx(299, abs=0.5)
    assert flops.blocks[0] / 2e9 == pytest.approx(7.48, abs=0.005)
    assert flops.saved_fraction(39) == pytest.approx(0.025, abs=0.0005)


def test_vit_s_student_has_the_published_cost():
    assert student_flops(StudentConfig(model="vit_small_patch14_dinov2"), 224) / 2e9 == pytest.approx(6.1, abs=0.05)


def test_vit_t_student_has_the_published_cost():
    config = StudentConfig(model="vit_small_patch14_dinov2", kwargs={"embed_dim": 192, "num_heads": 3})
    assert student_flops(config, 224) / 2e9 == pytest.approx(1.7, abs=0.05)


def test_saved_fraction():
    flops = TeacherFlops(embed=10, blocks=(20, 30, 35), norm=5)
    assert [flops.upto(block) for block in (1, 2, 3)] == [35, 65, 100]
    assert [flops.saved_fraction(block) for block in (1, 2, 3)] == pytest.approx([0.65, 0.35, 0.0])
