"""The DeepSpeed dict: one place, nothing left to DeepSpeed's defaults that bite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from leap_dist.config import EngineConfig, load
from leap_dist.distributed import World
from leap_dist.engine import deepspeed_config, micro_batch
from leap_dist.errors import UserError

NEEDED = ["teacher.model=t", "student.model=s", "data.train=digits"]
ONE = World(0, 1, 0, 1, torch.device("cpu"))


def test_clipping_is_explicit_also_when_off() -> None:
    """Left out, DeepSpeed 0.19 clips at 1.0."""
    assert deepspeed_config(EngineConfig(clip=0.0), 8)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_mixed_precision_is_autocast(precision: str, dtype: str) -> None:
    settings = deepspeed_config(EngineConfig(precision=precision), 8)
    assert settings["torch_autocast"] == {"enabled": True, "dtype": dtype}
    assert "fp16" not in settings and "bf16" not in settings


def test_users_deepspeed_section_is_merged_over() -> None:
    extra = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    settings = deepspeed_config(EngineConfig(zero_stage=2, accumulation=3, deepspeed=extra), 8)
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert settings["wall_clock_breakdown"] is True
    assert settings["gradient_accumulation_steps"] == 3


@pytest.mark.parametrize("universal", [False, True])
def test_universal_checkpoints_are_read_only_when_asked_for(universal: bool) -> None:
    """Left on, DeepSpeed would go back to what was converted once."""
    settings = deepspeed_config(EngineConfig(), 8, load_universal=universal)
    assert settings["checkpoint"] == {"load_universal": universal}


def test_micro_batch_is_the_share_of_a_rank() -> None:
    config = load(None, [*NEEDED, "data.global_batch=96", "engine.accumulation=2"])
    assert micro_batch(config, replace(ONE, size=4)) == 12
    with pytest.raises(UserError, match=r"data.global_batch=96: must be a multiple of 10 \(5 ranks"):
        micro_batch(config, replace(ONE, size=5))
