"""The DeepSpeed dict: one place, nothing left to DeepSpeed's defaults that bite."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from leap_dist.config import Config, OptimConfig, load
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World
from leap_dist.runtime.engine import _clip_before_steps, deepspeed_config, micro_batch, weights_are_finite
from leap_dist.runtime.optim import build_optimizer

NEEDED = ["teacher.model=t", "student.model=s", "data.train=digits"]
ONE = World(0, 1, 0, 1, torch.device("cpu"))


def config(*overrides: str) -> Config:
    return load(None, [*NEEDED, *overrides])


def test_clipping_is_explicit_also_when_off() -> None:
    """Left out, DeepSpeed 0.19 clips at 1.0."""
    assert deepspeed_config(config("engine.clip=0"), 8)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_mixed_precision_is_autocast(precision: str, dtype: str) -> None:
    settings = deepspeed_config(config(f"engine.precision={precision}"), 8)
    assert settings["torch_autocast"] == {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    assert "fp16" not in settings and "bf16" not in settings


def test_users_deepspeed_section_is_merged_over() -> None:
    extra = ["zero_optimization.overlap_comm=true", "wall_clock_breakdown=true"]
    asked = config("engine.zero_stage=2", "engine.accumulation=2", *(f"engine.deepspeed.{text}" for text in extra))
    settings = deepspeed_config(asked, 8)
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert settings["wall_clock_breakdown"] is True
    assert settings["gradient_accumulation_steps"] == 2


def test_micro_batch_is_the_share_of_a_rank() -> None:
    asked = config("data.global_batch=96", "engine.accumulation=2")
    assert micro_batch(asked, replace(ONE, size=4)) == 12
    with pytest.raises(UserError, match=r"data.global_batch=96: must be a multiple of 10 \(5 ranks"):
        micro_batch(asked, replace(ONE, size=5))


@pytest.mark.parametrize(
    ("name", "precision", "stage", "by_deepspeed"),
    [("lars", "fp16", 0, False), ("adamw", "fp16", 0, True), ("adamw", "bf16", 0, False), ("adamw", "bf16", 2, True)],
)
def test_who_clips(name: str, precision: str, stage: int, by_deepspeed: bool) -> None:
    asked = config(f"optim.name={name}", f"engine.precision={precision}", f"engine.zero_stage={stage}")
    assert deepspeed_config(asked, 8)["gradient_clipping"] == (1.0 if by_deepspeed else 0.0)


def test_clipping_before_the_step_of_lars_sees_gradients_without_the_loss_scale() -> None:
    torch.manual_seed(0)
    module, data = torch.nn.Linear(4, 3), torch.randn(8, 4)
    optimizer = build_optimizer(OptimConfig(name="lars"), module)
    _clip_before_steps(optimizer, 0.5)
    seen: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in module.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = module(data).square().sum()
    truth = [gradient.double() for gradient in torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)]
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    norm = torch.cat([gradient.flatten() for gradient in truth]).norm()
    assert norm > 0.5
    for gradient, true in zip(seen, truth, strict=True):
        torch.testing.assert_close(gradient.double(), true * 0.5 / norm, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("rank", "part", "finite"),
    [
        (0, [1.0, 2.0, 3.0], True),
        (0, [1.0, math.inf, 3.0], False),
        (3, [4.0, math.nan, math.nan], True),
        (4, [math.nan], True),
    ],
)
def test_weights_in_parts_are_judged_without_their_padding(rank: int, part: list[float], finite: bool) -> None:
    """Ten weights over four ranks and more: what lies behind the tenth was never written (DeepSpeed's ZeRO-3)."""
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_tensor, weight.ds_numel = torch.tensor(part + [math.nan] * (3 - len(part))), 10
    module = torch.nn.Module()
    module.weight = weight
    world = World(rank, 1, 0, 1, torch.device("cpu"))
    assert weights_are_finite(SimpleNamespace(module=module), world) is finite
