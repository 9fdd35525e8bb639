"""Optimizers and the learning rate over a run (LEAP's settings, arXiv 2606.19483).

The rate is a pure function of the step, so that a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from timm.optim import Lars, param_groups_layer_decay
from torch import nn

from leap_dist.config import OptimConfig

UNDECAYED_TOKENS = ("pos_embed", "cls_token", "reg_token", "dist_token")


def peak_lr(config: OptimConfig, global_batch: int) -> float:
    """The peak rate: lr * sqrt(global_batch / batch_reference), or lr itself without a reference."""
    if config.batch_reference is None:
        return config.lr
    return config.lr * math.sqrt(global_batch / config.batch_reference)


def lr_factor(config: OptimConfig, *, step: int, total_steps: int, epochs: float, advanced_at: Optional[int]) -> float:
    """Share of the peak rate that the 0-based optimizer step `step` of `total_steps` uses.

    advanced_at: the first step on the current target block, if the curriculum ever advanced; see `OptimConfig`. One
    during the warm-up of the run does not change the schedule, as in the published code; only `warmup` begins anew.
    """
    final = config.final_lr_fraction
    warmup = min(total_steps, int(total_steps / epochs * min(config.warmup_epochs, epochs / 10)))
    if advanced_at is None or config.on_advance in ("keep", "constant") or _absorbed(config, advanced_at, warmup):
        if step >= warmup and config.on_advance == "constant":
            return 1.0
        return _warmup_cosine(step, total_steps, warmup, final)
    since, remaining = step - advanced_at, total_steps - advanced_at
    if config.on_advance == "warmup":
        return _warmup_cosine(since, remaining, min(warmup, remaining), final)
    start = _warmup_cosine(advanced_at, total_steps, warmup, final) if config.on_advance == "envelope" else 1.0
    return _cosine(since / remaining, start, final)


def _absorbed(config: OptimConfig, advanced_at: int, warmup: int) -> bool:
    """Whether an advance fell into the run's warm-up, which goes on: it would end at once, or stop at a low rate."""
    return config.on_advance in ("restart", "envelope") and advanced_at < warmup


def build_optimizer(config: OptimConfig, module: nn.Module, layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """AdamW or LARS over the trainable parameters of `module`, in two groups: decayed (matrices) and not.

    layer_decay: below 1, `module` is a timm model, and there are two groups a layer, whose "lr_scale" the caller puts
    upon the rate: 1 for the last, this share of the next one's for every other (Clark et al. 2020, as in BEiT).

    LARS scales by the trust ratio where it decays; everything else takes plain momentum SGD at the raw rate.
    At ZeRO stage 0 only: stages 1-3 flatten all layers into one tensor, which then has one trust ratio (the config
    refuses that pair).
    """
    groups = _groups(module) if layer_decay == 1 else _groups_by_layer(module, layer_decay)
    for group in groups:
        decays = group["weight_decay"] > 0
        group["weight_decay"] = config.weight_decay if decays else 0.0
        if config.name == "lars":
            group["always_adapt"] = decays  # timm's default drops the trust ratio at weight_decay=0
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    return Lars(groups, lr=config.lr, momentum=config.momentum, trust_coeff=config.trust_coefficient, eps=1e-8)


def _warmup_cosine(step: int, total: int, warmup: int, final: float) -> float:
    """Linear (step+1)/warmup, then a cosine that reaches `final` at the last step, total-1."""
    if step < warmup:
        return (step + 1) / warmup
    return _cosine((step - warmup) / max(1, total - warmup - 1), 1.0, final)


def _cosine(progress: float, start: float, final: float) -> float:
    """From `start` at progress 0 to `final` at 1 and beyond."""
    return final + (start - final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    """The two groups; "weight_decay" is 1 where there is one."""
    decayed, undecayed = _split(module)
    return [{"params": decayed, "weight_decay": 1.0}, {"params": undecayed, "weight_decay": 0.0}]


def _groups_by_layer(module: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """The same of every layer, by timm's order of layers."""
    return param_groups_layer_decay(
        module, weight_decay=1.0, no_weight_decay_list=UNDECAYED_TOKENS, layer_decay=layer_decay
    )


def _split(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that decay, and those that do not: 1-D (biases, norms, scales) and learned tokens."""
    decayed, undecayed = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim <= 1 or name.rpartition(".")[2] in UNDECAYED_TOKENS
            (undecayed if spared else decayed).append(parameter)
    return decayed, undecayed
