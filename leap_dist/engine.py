"""The DeepSpeed engine: its config is generated here and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from leap_dist.config import Config, EngineConfig
from leap_dist.distributed import World
from leap_dist.errors import UserError

AUTOCAST_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def micro_batch(config: Config, world: World) -> int:
    """Images per forward on each rank: global batch over ranks and accumulation steps.

    Raises:
        UserError: it does not divide.
    """
    shares = world.size * config.engine.accumulation
    if config.data.global_batch % shares:
        raise UserError(
            f"data.global_batch={config.data.global_batch}: must be a multiple of {shares} "
            f"({world.size} ranks x engine.accumulation={config.engine.accumulation})"
        )
    return config.data.global_batch // shares


def deepspeed_config(config: EngineConfig, micro_batch_size: int, load_universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's own dict; `engine.deepspeed` is merged over it, key by key.

    Mixed precision is torch autocast over fp32 weights (as LEAP trained), not DeepSpeed's fp16/bf16 sections: those
    flatten the weights into one tensor even at stage 0, which would make LARS' per-layer trust ratios wrong.
    Clipping is always explicit: left out, DeepSpeed 0.19 clips at 1.0. Where `_clips_in_step` it is off.
    load_universal: what this engine loads will be a universal checkpoint.
    """
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": 0.0 if _clips_in_step(config) else config.clip,
        "zero_optimization": {"stage": config.zero_stage},
        "checkpoint": {"load_universal": load_universal},
        "steps_per_print": 10**9,  # the progress bar reports
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a micro-batch
    }
    if config.precision != "fp32":
        generated["torch_autocast"] = {"enabled": True, "dtype": AUTOCAST_DTYPES[config.precision]}
    return _merged(generated, config.deepspeed)


def _clips_in_step(config: EngineConfig) -> bool:
    """Whether gradients are clipped at the beginning of the optimizer's step rather than by DeepSpeed.

    Without ZeRO DeepSpeed takes each parameter's norm, and scales it, by itself: 13 ms a step for ViT-T on a CPU, where
    torch takes 3. fp16 is left to it, which unscales first.
    """
    return config.zero_stage == 0 and config.precision != "fp16" and config.clip > 0


def _clip_before_steps(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(clip)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if nested else value
    return result


def build_engine(
    config: Config,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batch_size: int,
    load_universal: bool = False,
) -> Any:
    """Wrap `objective` and its optimizer in a DeepSpeed engine (which moves it to the device and shards it).

    load_universal: see `deepspeed_config`.

    Raises:
        UserError: DeepSpeed refuses the merged config.
    """
    import deepspeed

    settings = deepspeed_config(config.engine, micro_batch_size, load_universal)
    if _clips_in_step(config.engine):
        _clip_before_steps(optimizer, config.engine.clip)
    try:
        engine = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)[0]
    except (ValueError, AssertionError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        if not config.engine.deepspeed:
            raise
        raise UserError(f"engine.deepspeed={config.engine.deepspeed}: {' '.join(str(error).split())}") from None
    if config.engine.zero_stage == 0 and engine.dp_world_size == 1:
        # It would copy all gradients into one buffer and back to add up one rank's: 69 ms of 1.5 s for ViT-S on a CPU.
        engine.enable_backward_allreduce = False
    return engine
