"""Re-initialise the matching heads inside a running engine, at any ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leap_dist.matching.heads import MatchingHead


@torch.no_grad()
def reset_heads(engine: Any, seed: int) -> None:
    """Give every head a fresh initialisation, equal on all ranks; the optimizer's momenta stay. Collective."""
    module = engine.module
    for head in [*module.heads, *([] if module.cls_head is None else [module.cls_head])]:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)  # of the host alone
            fresh = MatchingHead(head.in_features, head.out_features, head.impl, head.metric)
        for parameter, value in ((head.weight, fresh.weight), (head.bias, fresh.bias)):
            _overwrite(parameter, value)


def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Both what the next forward reads and ZeRO's own master copy, which would undo the former at the next step."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value.to(parameter.device))
    if hasattr(parameter, "ds_tensor"):
        # DeepSpeed 0.19's setter of the whole fails on the last rank where the ranks' parts are padded to one size.
        safe_set_local_fp32_param(parameter, parameter.ds_tensor)
    else:
        safe_set_full_fp32_param(parameter, value.to(parameter.device))
