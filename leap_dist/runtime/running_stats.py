"""Buffers of a student, of which every rank has its own: running statistics of batch norms, and what a module counts.

In training a batch norm normalises by the images of its rank, so its statistics change nothing there. A checkpoint
keeps the buffers of every rank, so that a resumed run goes on with them to the bit. What is exported and evaluated has
the mean of the running statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leap_dist.runtime.distributed import World, gather_objects

_NAMES = ("running_mean", "running_var")
Buffers = dict[str, Tensor]


def running_stats(module: nn.Module) -> Buffers:
    """This rank's, by the buffer's name."""
    return {name: buffer for name, buffer in module.named_buffers() if _is_running(name)}


def all_buffers(module: nn.Module, world: World) -> list[Buffers]:
    """Every rank's persistent ones, by rank, on the host; an empty list where there are none. Collective, if there are
    any.
    """
    return _gathered(_persistent(module), world)


def mean_running_stats(module: nn.Module, world: World) -> Buffers:
    """Their means over ranks, on the host. Collective, if there are any."""
    everyones = _gathered(running_stats(module), world)
    return _met(everyones) if everyones else {}


@torch.no_grad()
def restore_buffers(module: nn.Module, saved: list[Buffers], world: World) -> None:
    """Give this rank back its own. Where there was another number of ranks, it gets the means of running statistics,
    and of the rest what rank 0 had: DeepSpeed 0.19 leaves buffers out when it converts a checkpoint of stage 3.
    """
    if not saved:
        return
    mine = saved[world.rank] if len(saved) == world.size else _met(saved)
    for name, buffer in _persistent(module).items():
        if name in mine:  # an older version kept running statistics alone
            buffer.copy_(mine[name])


def _is_running(name: str) -> bool:
    return name.rpartition(".")[2] in _NAMES


def _persistent(module: nn.Module) -> Buffers:
    kept = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _gathered(own: Buffers, world: World) -> list[Buffers]:
    return gather_objects({name: item.detach().cpu().clone() for name, item in own.items()}, world) if own else []


def _met(everyones: list[Buffers]) -> Buffers:
    """Of buffers of every rank those of one."""
    first = everyones[0]
    if len(everyones) == 1:
        return first
    return first | {
        name: torch.stack([buffers[name].double() for buffers in everyones]).mean(0).to(buffer.dtype)
        for name, buffer in first.items()
        if _is_running(name)
    }
