"""Run by test_reset.py on every rank: reset the head of a live engine at the ZeRO stage given, and look at it."""

from __future__ import annotations

import sys

import deepspeed
import torch

from leap_dist.config import ObjectiveConfig, OptimConfig, StudentConfig, load
from leap_dist.matching.heads import MatchingHead
from leap_dist.matching.objective import Objective
from leap_dist.matching.reset import reset_heads
from leap_dist.models.features import Features
from leap_dist.models.student import build_student
from leap_dist.runtime.distributed import gather_rows, initialise, shutdown
from leap_dist.runtime.engine import build_engine
from leap_dist.runtime.optim import build_optimizer

SHAPE = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}


def head_weight(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    weight = engine.module.heads[0].weight
    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


def step(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    generator = torch.Generator().manual_seed(0)
    target = Features(torch.randn(2, 16, 20, generator=generator), torch.randn(2, 20, generator=generator))
    engine.backward(engine(torch.randn(2, 3, 16, 16, generator=generator), [target]).loss)
    engine.step()


def main(stage: int) -> None:
    world = initialise()
    sharding = "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    needed = ["teacher.model=t", "student.model=s", "data.train=digits"]
    config = load(None, [*needed, f"engine.zero_stage={stage}", *([sharding] if stage == 3 else [])])
    torch.manual_seed(0)
    student = build_student(StudentConfig(model="vit_tiny_patch16_224", kwargs=SHAPE), 16)
    objective = Objective(student, 20, (4, 4), ObjectiveConfig())
    optimizer = build_optimizer(OptimConfig(weight_decay=0.0), objective)
    engine = build_engine(config, objective, optimizer, 2)
    step(engine, 1e-2)
    trained = head_weight(engine)
    reset_heads(engine, seed=5)
    torch.manual_seed(5)
    fresh = MatchingHead(12, 20, "auto", "cka").weight
    assert not torch.equal(trained, fresh)
    assert torch.equal(head_weight(engine), fresh), "the next forward would not see the reset"
    step(engine, 0.0)
    assert torch.equal(head_weight(engine), fresh), "the next step undid the reset"
    rows = gather_rows(head_weight(engine).flatten(), world)
    assert (rows == rows[0]).all(), "ranks differ"
    print(f"rank {world.rank} of {world.size} reset at stage {stage}", flush=True)
    shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
