"""Run by test_lost_ranks.py on every rank: ranks that call a collective teacher unequally, or fail inside a call.

lost_worker.py PLACEMENT FAULT      rank 1 behaves as FAULT says; every rank must end soon and name it
"""

from __future__ import annotations

import os
import sys

import torch

from leap_dist.config import TeacherConfig
from leap_dist.curriculum.coordinator import Coordinator
from leap_dist.curriculum.policy import Curriculum
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, initialise, is_lost_peer
from leap_dist.runtime.heartbeat import Heartbeat
from leap_dist.runtime.reporting import complain, give_up
from leap_dist.runtime.signals import Interrupt
from leap_dist.teacher import Teacher, build_teacher

SHAPE = {"embed_dim": 32, "depth": 6, "num_heads": 2}
IMAGES = 4


def misbehave(fault: str, teacher: Teacher, coordinator: Coordinator) -> None:
    images = torch.randn(IMAGES, 3, 32, 32)
    if fault == "once too often":
        teacher.features(images)
    elif fault == "another block":
        teacher.retarget(2)
    elif fault == "more images":
        teacher.features(images.repeat(2, 1, 1, 1))
    elif fault == "not at all":
        coordinator.decide(step=3, loss=1.0, score=0.0, stop=False)
    elif fault == "error inside":
        for block in teacher._lazy.backbone.blocks:
            block.register_forward_hook(fail)


def fail(*_: object) -> None:
    raise MemoryError("no room for this block")


def train(world: World, placement: str, fault: str) -> None:
    config = TeacherConfig(model="vit_small_patch16_224", kwargs=SHAPE, weights="random", placement=placement)
    teacher = build_teacher(config, 32, world.device, world)
    teacher.retarget(6)  # every rank has something to do
    coordinator = Coordinator(Curriculum(6), world)
    for step in range(3):
        teacher.features(torch.randn(IMAGES, 3, 32, 32))
        coordinator.decide(step=step, loss=1.0, score=0.0, stop=False)
    if world.rank == 1:
        misbehave(fault, teacher, coordinator)
    teacher.features(torch.randn(IMAGES, 3, 32, 32))
    coordinator.decide(step=3, loss=1.0, score=0.0, stop=False)


def main(placement: str, fault: str) -> int:
    """As the entry point does: an error leaves the heartbeat before it is told, and never waits for the others."""
    world = initialise()
    try:
        with Heartbeat(world, 20, give_up) as heartbeat:
            heartbeat.step = lambda: 3
            try:
                with Interrupt():  # a launcher's SIGTERM is noted, as in a run, and cuts no explanation short
                    train(world, placement, fault)
            except Exception as error:
                heartbeat.explain(error)
                raise
    except UserError as error:
        complain(str(error))
        return 2
    except Exception as error:
        complain("another rank is gone" if is_lost_peer(error) else repr(error), error)
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))
