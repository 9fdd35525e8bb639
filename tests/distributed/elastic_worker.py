"""Run by test_elastic.py on every rank: two steps more from the newest checkpoint in a folder, then save.

Weights are compared with plain torch, which takes all steps in one go: wrong weight decay, momenta or step counts show.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from leap_dist.config import Config, load
from leap_dist.matching.objective import Objective
from leap_dist.models.features import Features
from leap_dist.models.student import build_student
from leap_dist.runtime.checkpoint import Checkpoints
from leap_dist.runtime.checkpoint_folder import newest
from leap_dist.runtime.distributed import World, initialise, shutdown
from leap_dist.runtime.engine import build_engine
from leap_dist.runtime.optim import build_optimizer

SHAPE = ("patch_size=4", "embed_dim=12", "depth=1", "num_heads=2")
BATCH, DECAY = 4, 0.5


def configured(stage: int, folder: str) -> Config:
    needed = ["teacher.model=t", "student.model=vit_tiny_patch16_224", "data.train=digits", "data.image_size=16"]
    sharding = "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    options = [f"output={folder}", f"engine.zero_stage={stage}", "engine.clip=0", f"optim.weight_decay={DECAY}"]
    shape = [f"student.kwargs.{item}" for item in SHAPE]
    return load(None, [*needed, *options, *shape, *([sharding] if stage == 3 else [])])


def built(config: Config) -> tuple[Objective, torch.optim.Optimizer]:
    torch.manual_seed(0)
    objective = Objective(build_student(config.student, 16), 20, (4, 4), config.objective)
    optimizer = build_optimizer(config.optim, objective)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    return objective, optimizer


def batch(step: int) -> tuple[torch.Tensor, Features]:
    draw = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 16, 16, generator=draw)
    return images, Features(torch.randn(BATCH, 16, 20, generator=draw), torch.randn(BATCH, 20, generator=draw))


def train(engine: Any, step: int, world: World) -> None:
    images, target = batch(step)
    mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    engine.backward(engine(images[mine], [Features(target.patch[mine], target.cls[mine])]).loss)
    engine.step()


def trained_by_torch(config: Config, steps: int) -> Objective:
    objective, optimizer = built(config)
    for step in range(steps):
        images, target = batch(step)
        objective(images, [target]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective


def check(engine: Any, steps: int, expected: Objective) -> None:
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [DECAY, 0.0]
    counts = [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]
    assert len(counts) >= 2 and set(counts) == {float(steps)}, counts
    for (name, found), wanted in zip(engine.module.named_parameters(), expected.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([found]):
            torch.testing.assert_close(found.detach(), wanted.detach(), atol=1e-5, rtol=0, msg=name)


def main(stage: int, folder: str) -> None:
    world = initialise()
    config = configured(stage, folder)
    checkpoints = Checkpoints(config, world, layout=str(BATCH), teacher="none")
    path = newest(Path(folder) / "checkpoints")
    convert = path is not None and checkpoints.needs_conversion(path)
    engine = build_engine(config, *built(config), BATCH // world.size, load_universal=convert)
    steps = 0
    if path is not None:
        steps = checkpoints.load(engine, path)["steps"]
        check(engine, steps, trained_by_torch(config, steps))
    for step in range(steps, steps + 2):
        train(engine, step, world)
    check(engine, steps + 2, trained_by_torch(config, steps + 2))
    checkpoints.save(engine, steps + 2, {"steps": steps + 2})
    checkpoints.confirm()
    if world.is_main:
        print(f"{world.size} ranks: {steps} steps{' converted' if convert else ''}, then 2 more", flush=True)
    shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
