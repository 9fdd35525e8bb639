"""The replicated placement: what is run, what is resident, what the features may be used for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from leap_dist.config import TeacherConfig
from leap_dist.teacher import Teacher, build_teacher
from leap_dist.teacher.lazy_backbone import LazyBackbone
from leap_dist.teacher.replicated import ReplicatedTeacher

DEPTH, DIM, SIZE = 4, 16, 32
BLOCK_PARAMETERS = 12 * DIM**2 + 13 * DIM  # qkv, projection and a 4x MLP with biases, two norms
STEM_PARAMETERS = (3 * 16**2 + 1) * DIM + DIM + (4 + 1) * DIM + 2 * DIM  # patches, CLS, positions of 2x2+1, norm


def config(model: str = "deit_small_patch16_224", dtype: str = "fp32") -> TeacherConfig:
    kwargs = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 2}
    return TeacherConfig(model=model, kwargs=kwargs, weights="random", dtype=dtype)


def build(**changes: str) -> Teacher:
    return build_teacher(config(**changes), SIZE, torch.device("cpu"))


def lazy(**changes: str) -> LazyBackbone:
    return LazyBackbone(config(**changes), SIZE, torch.device("cpu"))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def test_blocks_past_the_target_are_never_called(images):
    blocks = lazy()
    called = []
    for number, block in enumerate(blocks.backbone.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    teacher = ReplicatedTeacher(blocks)
    for target in (1, 3, DEPTH, 2):
        called.clear()
        teacher.retarget(target)
        teacher.features(images)
        assert called == list(range(1, target + 1))
    called.clear()
    assert len(list(teacher.sweep(images))) == DEPTH
    assert called == list(range(1, DEPTH + 1))


def test_only_what_the_target_needs_is_loaded(images):
    backbone = (blocks := lazy()).backbone
    teacher = ReplicatedTeacher(blocks)
    for target in (*range(1, DEPTH + 1), 2):
        teacher.retarget(target)
        for _ in range(2):
            devices = [{p.device.type for p in block.parameters()} for block in backbone.blocks]
            assert devices == [{"cpu"}] * target + [{"meta"}] * (DEPTH - target)
            assert {p.device.type for p in backbone.stem.parameters()} == {"cpu"}
            assert teacher.resident_bytes() == 4 * (STEM_PARAMETERS + target * BLOCK_PARAMETERS)
            list(teacher.sweep(images))  # visits every block, and leaves what it found


def test_the_next_block_is_read_before_it_is_needed(monkeypatch):
    blocks, asked = lazy(), []
    read = blocks._weights.read

    def noting(names):
        asked.append({name.split(".")[1] for name in names})
        return read(names)

    monkeypatch.setattr(blocks._weights, "read", noting)
    teacher = ReplicatedTeacher(blocks)
    for target in range(1, DEPTH):
        blocks._reader.submit(int).result()  # the reader works in order: what it was asked for is done
        assert asked == [{str(index)} for index in range(target + 1)]
        teacher.retarget(target + 1)
    blocks._reader.submit(int).result()
    assert len(asked) == DEPTH, "a block was read twice"


def test_what_is_read_ahead_outlasts_the_calibration(images):
    blocks = lazy()
    teacher = ReplicatedTeacher(blocks)
    coming = dict(blocks._coming)
    assert list(coming) == [1]
    first = [features.patch.clone() for features in teacher.sweep(images)]
    assert blocks._coming == coming
    teacher.retarget(2)
    assert torch.equal(teacher.features(images).patch, first[1])


def test_half_precision_halves_what_is_resident():
    assert 2 * build(dtype="bf16").resident_bytes() == build().resident_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", ["deit_small_patch16_224", "vit_small_patch16_dinov3", "cait_s24_224"])
def test_half_precision_features(model, dtype, images):
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    exact, half = build(model=model), build(model=model, dtype=name)
    for teacher in (exact, half):
        teacher.retarget(DEPTH)
    patch = half.features(images).patch
    assert patch.dtype is dtype
    assert torch.allclose(patch.float(), exact.features(images).patch, atol=0.1)


def test_rotary_tables_stay_exact_in_half_precision():
    tables = dict(lazy(model="vit_small_patch16_dinov3", dtype="bf16").backbone.named_buffers())
    assert tables
    assert {table.dtype for table in tables.values()} == {torch.float32}


def test_features_are_constants_that_backward_may_keep(images):
    teacher = build()
    patch, cls, _ = teacher.features(images.requires_grad_())
    assert not patch.requires_grad
    assert not cls.requires_grad
    scale = torch.ones((), requires_grad=True)
    (scale * patch).square().mean().backward()
    assert scale.grad.item() == pytest.approx(2 * patch.square().mean().item())
    assert not next(teacher.sweep(images)).patch.requires_grad


def test_dropout_is_off(images):
    kwargs = config().kwargs | {"proj_drop_rate": 0.5, "drop_path_rate": 0.5, "pos_drop_rate": 0.5}
    dropping = TeacherConfig(model=config().model, kwargs=kwargs, weights="random")
    teacher = build_teacher(dropping, SIZE, torch.device("cpu"))
    assert torch.equal(teacher.features(images).patch, teacher.features(images).patch)


def test_a_sweep_ends_where_it_is_told_to(images):
    teacher = build()
    whole = list(teacher.sweep(images))
    teacher.blocks[3].register_forward_pre_hook(lambda *_: pytest.fail("a block past the end was run"))
    part = list(teacher.sweep(images, until=3))
    assert len(part) == 3
    assert torch.equal(part[-1].patch, whole[2].patch)


def test_sweep_leaves_the_target_as_it_was(images):
    teacher = build()
    teacher.retarget(2)
    before = teacher.features(images).patch
    next(teacher.sweep(images))
    list(teacher.sweep(images))
    assert teacher.block == 2
    assert torch.equal(teacher.features(images).patch, before)


@pytest.mark.parametrize("block", [0, -1, DEPTH + 1])
def test_target_outside_the_teacher_is_refused(block):
    teacher = build()
    with pytest.raises(ValueError, match=rf"{block} is outside 1\.\.{DEPTH}"):
        teacher.retarget(block)
    assert teacher.block == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deit_small_patch16_224", "vit_small_patch16_dinov3"])
def test_compiled_blocks_share_their_code(model, images):
    """One compilation for all blocks and depths: they differ in their weights alone."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain = build(model=model)
    compiled = build_teacher(replace(config(model), compile=True), SIZE, torch.device("cpu"))
    for target in (*range(1, DEPTH + 1), 2):
        compiled.retarget(target)
        plain.retarget(target)
        assert torch.allclose(compiled.features(images).patch, plain.features(images).patch, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 1
