"""The moving average of the student's weights, at any ZeRO stage: every rank averages what it holds of them.

Buffers, such as running statistics of batch norms, are running averages themselves and are not averaged again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from leap_dist.runtime.checkpoint_folder import AVERAGE
from leap_dist.runtime.distributed import World, collect, on_main
from leap_dist.runtime.files import write_whole


def own_part(parameter: nn.Parameter) -> Tensor:
    """What this rank holds: all of it, or at ZeRO stage 3 its share, flat and padded."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


class WeightAverage:
    """average <- decay * average + (1 - decay) * weight, after every optimizer step. Begins at the weights as they are.

    module: whose trainable parameters are averaged, on their device and in an engine already.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._averages: list[Tensor] = []
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew at the weights as they are."""
        self._averages = [own_part(parameter).clone() for parameter in self._parameters.values()]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        weights = [own_part(parameter) for parameter in self._parameters.values()]
        torch._foreach_lerp_(self._averages, weights, 1 - self._decay)

    def whole(self, world: World) -> dict[str, Tensor]:
        """The averaged parameters on the host of rank 0, whole and by name; empty elsewhere. Collective."""
        found = {}
        for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True):
            if not hasattr(parameter, "ds_tensor"):
                found[name] = average.cpu().clone()
            elif parts := collect(average.cpu(), world):
                found[name] = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape).clone()
        return found if world.is_main else {}

    def save(self, folder: Path, world: World) -> None:
        """Write it to a checkpoint's folder. UserError on all ranks if the disk refuses. Collective."""
        found = self.whole(world)
        on_main(lambda: write_whole(folder / AVERAGE, lambda partial: torch.save(found, partial)), world)

    @torch.no_grad()
    def load(self, folder: Path, world: World) -> None:
        """Take it from a checkpoint, of any number of ranks; one without it leaves the weights as the beginning."""
        self.restart()
        path = folder / AVERAGE
        if not path.is_file():
            return
        found = torch.load(path, map_location="cpu", weights_only=True)
        for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True):
            value = found[name]
            if hasattr(parameter, "ds_tensor"):
                size = average.numel()
                value = value.flatten()[world.rank * size : (world.rank + 1) * size]
                average[: value.numel()].copy_(value)
            else:
                average.copy_(value)
