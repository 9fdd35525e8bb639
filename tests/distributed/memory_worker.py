"""Run by test_placements.py on every rank: what a placement keeps in memory, counted and as the system sees it.

memory_worker.py flat PLACEMENT      200 steps over all targets must not grow
memory_worker.py share PLACEMENT     a teacher of 300 M parameters at its last block
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from leap_dist.config import TeacherConfig
from leap_dist.runtime.distributed import World, initialise, shutdown
from leap_dist.teacher import build_teacher

SIZE, BATCH, MIB = 32, 4, 2**20


def rss() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def flat(placement: str, world: World) -> None:
    shape = {"embed_dim": 128, "depth": 8, "num_heads": 2}
    config = TeacherConfig(model="vit_small_patch16_dinov3", kwargs=shape, weights="random", placement=placement)
    teacher = build_teacher(config, SIZE, world.device, world)
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    seen = []
    for step in range(300):
        if step % 5 == 0:
            teacher.retarget(1 + step // 5 % teacher.spec.depth)
        teacher.features(images)
        seen.append(rss())
    grown = (seen[-1] - seen[99]) / MIB
    assert grown < 8, f"{placement}: {grown:.1f} MiB more after 200 steps"
    print(f"rank {world.rank}: {placement} grew by {grown:.2f} MiB", flush=True)


def share(placement: str, world: World) -> None:
    config = TeacherConfig(model="vit_large_patch16_224", weights="random", placement=placement)
    build_teacher(config, SIZE, world.device, world).retarget(1)  # what is imported and started once is now there
    before = rss()
    teacher = build_teacher(config, SIZE, world.device, world)
    teacher.retarget(teacher.spec.depth)
    teacher.features(torch.randn(BATCH, 3, SIZE, SIZE))
    taken = rss() - before
    blocks, stem = 24 * 12_596_224 * 4, 4 * (3 * 16**2 * 1024 + 1024 * (1 + 1 + 5 + 2))
    allowed = 1.15 * blocks / world.size + stem
    counted = teacher.resident_bytes()
    about = f"{placement}: {taken / MIB:.0f} MiB taken, {counted / MIB:.0f} counted, {allowed / MIB:.0f} allowed"
    assert counted <= allowed and taken <= allowed, about
    print(f"rank {world.rank}: {about}", flush=True)


def main(what: str, placement: str) -> None:
    world = initialise()
    {"flat": flat, "share": share}[what](placement, world)
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
