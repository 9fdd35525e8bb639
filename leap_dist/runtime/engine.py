"""The DeepSpeed engine: its config is generated here and nowhere else."""

from __future__ import annotations

import difflib
import math
from typing import Any, Optional

import torch
from torch import Tensor, nn

from leap_dist.config import Config
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, be_patient, gather_objects

LEAST_SCALE = 1.0  # below it fp16 has no room left that bf16 or fp32 would not have
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


def deepspeed_config(config: Config, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's own dict; `engine.deepspeed` is merged over it, key by key.

    Mixed precision is torch autocast over fp32 weights (as LEAP trained), not DeepSpeed's fp16/bf16 sections: those
    flatten the weights into one tensor even at stage 0, which would make LARS' per-layer trust ratios wrong.
    Clipping is always explicit: left out, DeepSpeed 0.19 clips at 1.0. Where `_clips_in_step` it is off.
    Gradients are summed over ranks in fp32 at every stage: by default stages 1-3 would sum those of linear layers in
    the autocast's 16 bits.
    """
    engine = config.engine
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": engine.accumulation,
        "gradient_clipping": 0.0 if _clips_in_step(config) else engine.clip,
        "zero_optimization": {"stage": engine.zero_stage},
        "steps_per_print": 10**9,  # the progress bar reports
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a micro-batch
    }
    if engine.precision != "fp32":
        generated["torch_autocast"] = {
            "enabled": True,
            "dtype": AUTOCAST_DTYPES[engine.precision],
            "lower_precision_safe_modules": [],
        }
    return _merged(generated, engine.deepspeed)


def _clips_in_step(config: Config) -> bool:
    """Whether gradients are clipped at the beginning of the optimizer's step rather than by DeepSpeed.

    Without ZeRO DeepSpeed takes each parameter's norm, and scales it, by itself: 13 ms a step for ViT-T on a CPU, where
    torch takes 3; on a GPU it waits for the device. In fp16 torch's scaler unscales before it steps LARS, but leaves
    that to the step of the fused AdamW: there clipping stays with DeepSpeed, which unscales first.
    """
    engine = config.engine
    unscaled = engine.precision != "fp16" or config.optim.name == "lars"
    return engine.zero_stage == 0 and engine.clip > 0 and unscaled


def _clip_before_steps(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def clip(owner: Any, *_: Any) -> None:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        owner._global_grad_norm = norm  # where DeepSpeed's engine takes it from

    optimizer.register_step_pre_hook(clip)


class _Asked(dict[str, Any]):
    """A dict that knows which keys it was asked for: DeepSpeed passes over those it does not know (0.19)."""

    def __init__(self, items: dict[str, Any]) -> None:
        super().__init__(items)
        self.asked: set[str] = set()

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)  # DeepSpeed saves it in every checkpoint, which must not need this class

    def __copy__(self) -> _Asked:
        copied = _Asked(self)
        copied.asked = self.asked  # DeepSpeed reads some keys from a copy
        return copied

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


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
) -> Any:
    """Wrap `objective` and its optimizer in a DeepSpeed engine (which moves it to the device and shards it).

    Raises:
        UserError: DeepSpeed refuses the merged config, or has never heard of a key of `engine.deepspeed`.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    # pydantic's ValidationError is a ValueError
    refusals = ValueError, AssertionError, TypeError, DeepSpeedConfigError, ZeRORuntimeException
    settings = _Asked(deepspeed_config(config, micro_batch_size))
    if _clips_in_step(config):
        _clip_before_steps(optimizer, config.engine.clip)
    try:
        engine = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)[0]
    except refusals as error:
        if not config.engine.deepspeed:
            raise
        raise UserError(f"engine.deepspeed={config.engine.deepspeed}: {' '.join(str(error).split())}") from None
    for key in config.engine.deepspeed.keys() - settings.asked:
        close = difflib.get_close_matches(key, settings.asked, n=1)
        raise UserError(f"engine.deepspeed.{key}: DeepSpeed has no such option" + (f"; {close[0]}?" if close else ""))
    for group in {engine.data_parallel_group, engine.seq_data_parallel_group}:  # gradients travel in DeepSpeed's own
        be_patient(group)
    if config.engine.zero_stage == 0 and engine.dp_world_size == 1:
        # It would copy all gradients into one buffer and back to add up one rank's: 69 ms of 1.5 s for ViT-S on a CPU.
        engine.enable_backward_allreduce = False
    return engine


def expect_universal(engine: Any, universal: bool) -> None:
    """Whether what the engine loads next is a universal checkpoint: DeepSpeed has the option for an engine's life."""
    engine._config.load_universal_checkpoint = universal


def weights_are_finite(engine: Any, world: World) -> bool:
    """Whether all of the student's weights are, on all ranks. Collective; waits for the device."""
    own = (_own_part(parameter, world.rank) for parameter in engine.module.parameters())
    return all(gather_objects(all(bool(part.isfinite().all()) for part in own), world))


def _own_part(parameter: nn.Parameter, rank: int) -> Tensor:
    """All of a parameter, or at ZeRO stage 3 this rank's part, without the uninitialised padding behind the last."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    part = parameter.ds_tensor
    return part[: max(0, parameter.ds_numel - rank * part.numel())]


def gradscaler(engine: Any) -> Optional[torch.amp.GradScaler]:
    """The loss scaler of fp16 under autocast: the engine's own without ZeRO, else its optimizer's."""
    sharded = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    return engine.torch_autocast_z0_gradscaler if sharded is None else sharded


class LostScale(UserError):
    """The loss scale of fp16 has fallen so far that nothing is learnt any more."""


def check_scale(scale: float, step: int) -> None:
    """Raise LostScale where fp16 cannot go on: torch's scaler halves without end, and steps without an update follow.

    scale: of the update before `step`; NaN where there is no scaler.
    """
    if scale < LEAST_SCALE:
        raise LostScale(
            f"step {step}: the gradients overflow in fp16 at a loss scale of {scale:g}, so nothing is learnt any more; "
            "use engine.precision=bf16, or a lower optim.lr"
        )


def update_numbers(engine: Any, like: Tensor) -> Tensor:
    """(2,) of the engine's last update: norm of the gradients before clipping, loss scale; NaN where there is none.

    On the device and in the dtype of `like`; waits for nothing.
    """
    norm, scaler = engine.get_global_grad_norm(), gradscaler(engine)
    none = like.new_full((), math.nan)
    if norm is not None and not isinstance(norm, Tensor):
        norm = like.new_full((), norm)
    scale = none if scaler is None else scaler.scale(like.new_ones(()))
    return torch.stack([none if norm is None else norm.to(like), scale])
