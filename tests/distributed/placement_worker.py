"""Run by test_placements.py on every rank: each placement against the replicated teacher, at every block."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leap_dist.config import TeacherConfig
from leap_dist.models.features import Features
from leap_dist.runtime.distributed import World, gather_rows, initialise, shutdown
from leap_dist.teacher import Teacher, build_teacher

SIZE, BATCH, DEPTH, CLASSES = 32, 4, 7, 5
SHAPE: dict[str, Any] = {"embed_dim": 32, "depth": DEPTH, "num_heads": 2}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("vit_small_patch16_224", {}),
    ("vit_small_patch16_dinov3", {}),  # RoPE, registers
    ("vit_small_patch16_rope_mixed_224", {}),  # a rotary table per block
    ("cait_s24_224", {}),  # no class token
    ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
]
# A batch of another size may run other kernels, which order sums otherwise. A block has four products of up to 4 * 32
# terms, and a sum of k terms rounds to about sqrt(k) u (Higham and Mary 2019); normed features are about 1.
ROUNDING = 4 * DEPTH * (4 * SHAPE["embed_dim"]) ** 0.5 * 2**-24
TARGETS = [*range(1, DEPTH + 1), 3, 1, DEPTH]  # every advance, then jumps both ways


def configs(world: World, families: list[tuple[str, dict[str, Any]]]) -> Iterator[TeacherConfig]:
    """What is compared at this number of ranks."""
    for model, kwargs in families:
        common = {"model": model, "kwargs": SHAPE | kwargs, "weights": "random"}
        yield TeacherConfig(placement="sharded", **common)
        yield TeacherConfig(placement="pipelined", microbatches=2, **common)
    for parts in (1, 4):
        yield TeacherConfig(placement="pipelined", microbatches=parts, **common)
    yield TeacherConfig(placement="pipelined", rebalance=False, **common)
    yield TeacherConfig(placement="pipelined", rebalance=False, microbatches=4, **common)
    yield TeacherConfig(placement="pipelined", dtype="bf16", **common)
    yield TeacherConfig(placement="sharded", dtype="bf16", **common)
    if world.size == 4:
        yield TeacherConfig(placement="pipelined", stages=2, microbatches=4, **common)


def images_of(world: World, draw: int) -> Tensor:
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(100 * draw + world.rank))


def reference(config: TeacherConfig) -> Teacher:
    plain = TeacherConfig(model=config.model, kwargs=config.kwargs, weights=config.weights, dtype=config.dtype)
    return build_teacher(plain, SIZE, torch.device("cpu"), classes=CLASSES)


def same_shapes(config: TeacherConfig, world: World) -> bool:
    """Whether blocks see as many images at a time as the replicated teacher's do, and so run the same kernels."""
    stages = config.stages or world.size
    return config.placement == "sharded" or BATCH * stages // config.microbatches == BATCH


def assert_equal(found: Features, expected: Features, about: str, bitwise: bool) -> None:
    tolerance = 0.0 if bitwise else ROUNDING if found.patch.dtype is torch.float32 else 0.05
    assert found.patch.shape == expected.patch.shape and found.patch.dtype is expected.patch.dtype, about
    assert [part is None for part in found] == [part is None for part in expected], about
    for mine, theirs in zip(found, expected, strict=True):
        if mine is not None and theirs is not None:
            difference = (mine.float() - theirs.float()).abs().max().item()
            assert difference <= tolerance, f"{about}: off by {difference}"
            assert not mine.requires_grad


def compare(config: TeacherConfig, world: World) -> None:
    teacher = build_teacher(config, SIZE, world.device, world, classes=CLASSES)
    plain = reference(config)
    bitwise = same_shapes(config, world)
    for draw, target in enumerate(TARGETS):
        teacher.retarget(target)
        plain.retarget(target)
        images = images_of(world, draw)
        about = f"{config.model} {config.placement} x{config.microbatches}, block {target}, rank {world.rank}"
        for _ in range(2):
            assert_equal(teacher.features(images), plain.features(images), about, bitwise)
    for index, (swept, expected) in enumerate(zip(teacher.sweep(images), plain.sweep(images), strict=True)):
        assert_equal(swept, expected, f"{config.model} {config.placement}, sweep at block {index + 1}", bitwise=True)
    teacher.retarget(2)
    swept_again = list(teacher.sweep(images))
    assert_equal(swept_again[-1], expected, f"{config.model} {config.placement}, sweep past the target", bitwise=True)
    assert teacher.block == 2
    plain.retarget(2)
    assert len(list(teacher.sweep(images, until=3))) == 3
    assert_equal(teacher.features(images), plain.features(images), about, bitwise)
    assert_resident(teacher, world, config)


def assert_resident(teacher: Teacher, world: World, config: TeacherConfig) -> None:
    """Over its ranks, a placement holds the blocks up to the target once, besides everybody's stem."""
    depth = teacher.spec.depth
    teacher.retarget(1)
    one = gather_rows(torch.tensor([teacher.resident_bytes()]), world)
    teacher.retarget(depth)
    all_blocks = gather_rows(torch.tensor([teacher.resident_bytes()]), world)
    copies = 1 if config.placement == "sharded" else world.size // (config.stages or world.size)
    block = reference(config)
    stem_and_one = block.resident_bytes()
    block.retarget(2)
    each = block.resident_bytes() - stem_and_one
    grown = int((all_blocks - one).sum())
    assert abs(grown - copies * (depth - 1) * each) <= 0.01 * grown, f"{config}: {grown} bytes more at the last block"
    most = int(all_blocks.max()) - (stem_and_one - each)
    assert most <= -(-depth // (world.size // copies)) * each * 1.01, f"{config}: a rank has more than its share"


def main(which: str) -> None:
    world = initialise()
    compared = bitwise = 0
    for config in configs(world, FAMILIES if which == "all" else FAMILIES[1:2]):
        compare(config, world)
        compared += 1
        bitwise += same_shapes(config, world)
    print(f"rank {world.rank} of {world.size}: {compared} placements equal, {bitwise} of them bitwise", flush=True)
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
