"""Run by test_placements.py on every rank: in FP8 a teacher gives the same wherever its blocks are.

Below `build_teacher`, which refuses FP8 on a CPU. Rank 1 would judge blocks otherwise than rank 0 does, as a GPU of
another kind might: all ranks are to go by rank 0.
"""

from __future__ import annotations

import torch

from leap_dist.config import TeacherConfig
from leap_dist.models import teacher_flops
from leap_dist.runtime.distributed import World, gather_objects, initialise, shutdown
from leap_dist.teacher.lazy_backbone import LazyBackbone
from leap_dist.teacher.placements import build_placed
from leap_dist.teacher.replicated import ReplicatedTeacher

SIZE, BATCH, DEPTH = 32, 4, 5
TARGETS = (1, 2, 3, DEPTH, 2, DEPTH)  # advances, and a jump back


def compare(placement: str, bound: float, world: World) -> list[float]:
    """Every target in this placement and replicated; the cosines that the blocks were judged by."""
    config = TeacherConfig(
        model="vit_small_patch16_224", kwargs={"embed_dim": 32, "depth": DEPTH, "num_heads": 2}, weights="random",
        dtype="fp8", fp8_bound=bound, placement=placement, microbatches=2,
    )  # fmt: skip
    lazy = LazyBackbone(config, SIZE, world.device, world=world)
    _disagree(lazy, world)
    teacher = build_placed(config, SIZE, lazy, world, teacher_flops(config, SIZE))
    plain = ReplicatedTeacher(LazyBackbone(config, SIZE, world.device))  # judges for itself, as rank 0 does
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(world.rank))
    for target in TARGETS:
        teacher.retarget(target)
        plain.retarget(target)
        found, right = teacher.features(images).patch, plain.features(images).patch
        # bf16, which a batch of another size may round otherwise.
        assert (found.float() - right.float()).abs().max() <= 0.05, f"{placement}, block {target}"
    for found in teacher.sweep(images):
        assert found.patch.isfinite().all()
    assert gather_objects(lazy._float8.found, world) == [plain._lazy._float8.found] * world.size
    return lazy._float8.found


def _disagree(lazy: LazyBackbone, world: World) -> None:
    """Let every rank but the first find that no block may run in FP8."""
    if not world.is_main:
        lazy._float8._likeness = lambda *_: 0.0


def main() -> None:
    world = initialise()
    for placement in ("sharded", "pipelined"):
        found = compare(placement, 0.9, world)
        assert len(found) == DEPTH
        some = compare(placement, sorted(found)[DEPTH // 2], world)  # a bound that some blocks miss
        assert 0 < sum(one >= sorted(found)[DEPTH // 2] for one in some) < DEPTH
    print("placements equal")
    shutdown()


if __name__ == "__main__":
    main()
