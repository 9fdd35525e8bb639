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
from leap_dist.runtime.engine import (
    _clip_before_steps,
    check_scale,
    deepspeed_config,
    gradscaler,
    micro_batch,
    update_numbers,
    weights_are_finite,
)
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


@pytest.mark.parametrize("universal", [False, True])
def test_universal_checkpoints_are_read_only_when_asked_for(universal: bool) -> None:
    """Left on, DeepSpeed would go back to what was converted once."""
    settings = deepspeed_config(config(), 8, load_universal=universal)
    assert settings["checkpoint"] == {"load_universal": universal}


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


@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_that_always_overflow_end_the_run(sharded: bool) -> None:
    """torch's scaler halves its scale down to 0 and makes no update, without a word."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu")
    sharding = SimpleNamespace(torch_autocast_gradscaler=scaler if sharded else None)
    engine = SimpleNamespace(
        optimizer=sharding, torch_autocast_z0_gradscaler=None if sharded else scaler, get_global_grad_norm=lambda: None
    )
    for step in range(100):
        scale = update_numbers(engine, torch.zeros(()))[1].item()
        assert scale == 65536 / 2**step
        if scale < 1:
            break
        check_scale(scale, step)
        scaler.scale(weight.sum() * math.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert weight.item() == 1
    with pytest.raises(UserError, match=r"step 17: the gradients overflow in fp16 at a loss scale of 0\.5.*bf16"):
        check_scale(scale, step)


def test_there_is_nothing_to_say_of_a_scale_where_there_is_no_scaler() -> None:
    assert gradscaler(SimpleNamespace(optimizer=object(), torch_autocast_z0_gradscaler=None)) is None
    check_scale(math.nan, 3)
