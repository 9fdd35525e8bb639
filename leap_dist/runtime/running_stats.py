"""Running statistics of batch norms, of which every rank gathers its own.

In training a batch norm normalises by the images of its rank, so these numbers change nothing there. A checkpoint keeps
those of every rank, so that a resumed run goes on with them to the bit. What is exported and evaluated has their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leap_dist.runtime.distributed import World, gather_objects

_NAMES = ("running_mean", "running_var")
Stats = dict[str, Tensor]


def running_stats(module: nn.Module) -> Stats:
    """This rank's, by the buffer's name."""
    return {name: buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2] in _NAMES}


def all_running_stats(module: nn.Module, world: World) -> list[Stats]:
    """Every rank's, by rank, on the host; an empty list where there are none. Collective, if there are any."""
    own = {name: buffer.detach().cpu().clone() for name, buffer in running_stats(module).items()}
    return gather_objects(own, world) if own else []


def mean_running_stats(module: nn.Module, world: World) -> Stats:
    """Their means over ranks, on the host. Collective, if there are any."""
    everyones = all_running_stats(module, world)
    return _means(everyones) if everyones else {}


@torch.no_grad()
def restore_running_stats(module: nn.Module, saved: list[Stats], world: World) -> None:
    """Give this rank back its own, or the means, where there was another number of ranks."""
    if not saved:
        return
    mine = saved[world.rank] if len(saved) == world.size else _means(saved)
    for name, buffer in running_stats(module).items():
        buffer.copy_(mine[name])


def _means(everyones: list[Stats]) -> Stats:
    if len(everyones) == 1:
        return everyones[0]
    return {
        name: torch.stack([stats[name].double() for stats in everyones]).mean(0).to(first.dtype)
        for name, first in everyones[0].items()
    }
