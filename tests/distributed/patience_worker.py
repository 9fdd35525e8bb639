"""Run by test_lost_ranks.py on every rank: how long each group waits for a rank that does not come."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from leap_dist.config import load
from leap_dist.runtime.distributed import build_pipeline, initialise, own_group, shutdown
from leap_dist.runtime.engine import build_engine


def main() -> None:
    world = initialise()
    config = load(None, ["teacher.model=t", "student.model=s", "data.train=digits"])
    module = torch.nn.Linear(2, 2)
    engine = build_engine(config, module, torch.optim.AdamW(module.parameters()), micro_batch_size=1)
    groups = {
        "world": dist.group.WORLD, "control": world.control, "own": own_group(world),
        "pipeline": build_pipeline(world, 2).handle, "gradients": engine.seq_data_parallel_group,
    }  # fmt: skip
    for name, group in groups.items():
        waits = group._get_backend(torch.device("cpu")).options._timeout
        assert waits == timedelta(minutes=30), (name, waits)
    if world.is_main:
        print(f"{len(groups)} groups wait")
    shutdown()


if __name__ == "__main__":
    main()
