"""`telemetry.spectra_every`: how many dimensions the student's tokens fill, and those it is to imitate, as it trains.

The head is where the two meet: the student's tokens, on the teacher's grid but not yet projected, and the target
block's, both of rank 0's first micro-batch. A few images of each leave the device as the losses do, without waiting,
and the host looks at them when it reads the losses: an eigenvalue solver on the device would wait for everything that
is queued there.
"""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leap_dist.analysis import token_summary
from leap_dist.config import Config
from leap_dist.runtime.distributed import World
from leap_dist.runtime.host_copy import HostCopy

IMAGES = 4


class Spectroscope:
    """Looks at one head's input every so many steps; on rank 0 only, and without a hook in between.

    head: called with (tokens (B, N, Ds), target (B, N, Dt), ...); calls with other shapes, of class tokens, are let by.
    """

    def __init__(self, config: Config, world: World, head: nn.Module) -> None:
        self._every = config.telemetry.spectra_every if world.is_main else 0
        self._head = head
        self._hook: Optional[RemovableHandle] = None
        self._seen: dict[str, HostCopy] = {}

    def before(self, step: int) -> None:
        """The 0-based `step` is about to begin."""
        if self._every and step % self._every == 0:
            self._hook = self._head.register_forward_pre_hook(self._look)

    def scalars(self) -> dict[str, float]:
        """TensorBoard tag -> value, of what was seen since the last call."""
        seen, self._seen = self._seen, {}
        summaries = {side: token_summary(copy.tensor()) for side, copy in seen.items()}
        return {
            f"spectra/{side}/{name}": value.item()
            for side, summary in summaries.items()
            for name, value in summary.items()
        }

    def _look(self, _head: nn.Module, inputs: tuple[Any, ...]) -> None:
        sides: dict[str, Tensor] = dict(zip(("student", "target"), inputs, strict=False))
        if all(tokens.dim() == 3 for tokens in sides.values()):
            self._seen = {side: HostCopy(tokens[:IMAGES].detach()) for side, tokens in sides.items()}
            self._hook.remove()
