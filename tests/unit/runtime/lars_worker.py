"""Run by test_optim.py: DeepSpeed at stage 0 with LARS takes the steps that timm's LARS takes in plain PyTorch."""

from __future__ import annotations

import copy
import sys

import torch
from timm.optim import Lars
from torch import nn

from leap_dist.config import OptimConfig, load
from leap_dist.runtime import distributed
from leap_dist.runtime.engine import build_engine
from leap_dist.runtime.optim import build_optimizer


def main(precision: str) -> None:
    config = OptimConfig(name="lars", lr=2.0, weight_decay=1e-6)
    torch.manual_seed(0)
    world = distributed.initialise()
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(world.device)
    plain = copy.deepcopy(model)
    matrices, vectors = [[p for p in plain.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    reference = Lars([{"params": matrices, "weight_decay": 1e-6}, {"params": vectors}], lr=2.0, momentum=0.9)
    needed = ["teacher.model=t", "student.model=s", "data.train=digits"]
    run = load(None, [*needed, f"engine.precision={precision}", "engine.clip=1.0"])
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    optimizer = build_optimizer(config, model)
    engine = build_engine(run, model, optimizer, 4)
    assert engine.optimizer is optimizer, type(engine.optimizer)
    assert not engine.tput_timer.config.enabled, "it waits for the device in every micro-batch"
    for _ in range(4):
        x, y = torch.randn(4, 8, device=world.device), torch.randn(4, 4, device=world.device)
        loss = (engine(x).float() - y).square().mean() * 30  # gradients far above the clip
        engine.backward(loss)
        engine.step()
        with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
            out = plain(x)
        scaler.scale((out.float() - y).square().mean() * 30).backward()
        scaler.unscale_(reference)
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        scaler.step(reference)
        scaler.update()
        reference.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
