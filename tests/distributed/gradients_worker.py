"""Run by test_gradients.py on every rank: gradients of two micro-batches at ZeRO stage 0, held to their definition."""

from __future__ import annotations

import deepspeed
import torch
from torch import nn

from leap_dist.config import EngineConfig, OptimConfig, load
from leap_dist.runtime.distributed import gather_rows, initialise, shutdown
from leap_dist.runtime.engine import build_engine
from leap_dist.runtime.gradients import Gradients
from leap_dist.runtime.optim import build_optimizer

MICRO_BATCHES = 2


class Mixed(nn.Module):
    """Weights of two dtypes, one that no loss reaches and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.rounded = nn.Linear(5, 7), nn.Linear(7, 3).bfloat16()
        self.unreached = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rounded(self.narrow(x).tanh().bfloat16()).float().square().sum()


def build(seed: int) -> deepspeed.DeepSpeedEngine:
    needed = ["teacher.model=t", "student.model=s", "data.train=digits", "engine.clip=0"]
    config = load(None, [*needed, f"engine.accumulation={MICRO_BATCHES}", "data.global_batch=12"])
    torch.manual_seed(seed)
    module = Mixed()
    return build_engine(config, module, build_optimizer(OptimConfig(), module), 2)


def main() -> None:
    world = initialise()
    generator = torch.Generator().manual_seed(world.rank)
    data = [torch.randn(2, 5, generator=generator) for _ in range(MICRO_BATCHES)]
    engine, theirs = build(0), build(0)
    trained, others = ([p for p in one.module.parameters() if p.requires_grad] for one in (engine, theirs))
    own = [torch.zeros_like(p, dtype=torch.float64) for p in trained]
    for x in data:
        found = torch.autograd.grad(engine.module(x), trained, allow_unused=True)
        for total, gradient in zip(own, found, strict=True):
            total += 0 if gradient is None else gradient / MICRO_BATCHES
    means = [gather_rows(total.flatten(), world).mean(0).view(total.shape) for total in own]

    gradients = Gradients(engine, EngineConfig(accumulation=MICRO_BATCHES), world)
    for x in data:
        gradients.add(engine(x))
        theirs.backward(theirs(x))
        if x is not data[-1]:
            engine.step()
            theirs.step()
    for parameter, mean, other in zip(trained, means, others, strict=True):
        torch.testing.assert_close(parameter.grad.double(), mean, rtol=2e-2, atol=1e-3)
        assert torch.equal(parameter.grad, other.grad), "DeepSpeed's own sum has other bits"
    memory = {parameter.grad.untyped_storage().data_ptr() for parameter in trained}
    assert len(memory) == 2, "not one buffer for each dtype"
    assert engine.module.frozen.grad is None
    engine.step()
    theirs.step()
    assert all(p.grad is None for p in trained)
    for mine, other in zip(engine.module.parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(mine, other)
    print(f"rank {world.rank} of {world.size}: gradients are means", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
