"""Parameters that are not trained, in a checkpoint of a run that may go on at another number of ranks.

DeepSpeed 0.19 leaves them out when it converts a checkpoint of ZeRO stages 1-3. A student has some where no loss
reaches a part of it, or where a module of the user's own says so.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from leap_dist.runtime.checkpoint_folder import FROZEN
from leap_dist.runtime.distributed import World, on_main
from leap_dist.runtime.files import write_whole


def save_frozen(module: nn.Module, folder: Path, world: World) -> None:
    """Write them whole to a checkpoint's folder, if there are any. UserError on all if the disk refuses. Collective."""
    if frozen := _frozen(module):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(frozen.values())):
            whole = {name: parameter.detach().cpu().clone() for name, parameter in frozen.items() if world.is_main}
        on_main(lambda: write_whole(folder / FROZEN, lambda partial: torch.save(whole, partial)), world)


def load_frozen(module: nn.Module, folder: Path, world: World) -> None:
    """Take them from there; an older version left them out. Collective."""
    frozen, path = _frozen(module), folder / FROZEN
    if frozen and path.is_file():
        import deepspeed

        whole = torch.load(path, map_location="cpu", weights_only=True)
        with deepspeed.zero.GatheredParameters(list(frozen.values()), modifier_rank=0), torch.no_grad():
            for name, parameter in frozen.items():
                if world.is_main or not hasattr(parameter, "ds_id"):  # at stage 3 rank 0 hands out the shares
                    parameter.copy_(whole[name])


def _frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
