"""A segmentation head on its way, kept on the disk so that a killed evaluation goes on, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, on_main
from leap_dist.runtime.files import write_whole
from leap_dist.runtime.running_stats import all_buffers, restore_buffers

log = logging.getLogger(__name__)


class KeptHead:
    """path: of its file. others: optimizer and schedule. Every method is collective; rank 0 reads and writes.

    All ranks have the same weights, but running statistics of their own.
    """

    def __init__(self, path: Path, head: nn.Module, others: Sequence[Any], world: World) -> None:
        self._path, self._head, self._others, self._world = path, head, others, world

    def save(self, step: int) -> None:
        """As it is after `step` steps. UserError, on every rank, if the disk refuses it."""
        stats = all_buffers(self._head, self._world)
        parts = [self._head.state_dict(), *(other.state_dict() for other in self._others)]
        state = {"step": step, "parts": parts, "stats": stats}
        try:
            on_main(lambda: write_whole(self._path, lambda partial: torch.save(state, partial)), self._world)
        except UserError as error:
            raise UserError(f"{error}; see --cache") from None

    def restore(self) -> int:
        """Go on from what is there: how many steps that has been through; 0 if there is none."""
        state = on_main(self._read, self._world)
        if state is None:
            return 0
        for part, known in zip((self._head, *self._others), state["parts"], strict=True):
            part.load_state_dict(known)
        restore_buffers(self._head, state["stats"], self._world)
        return state["step"]

    def _read(self) -> Any:
        if not self._path.is_file():
            return None
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
            return {key: state[key] for key in ("step", "parts", "stats")}
        except Exception as error:  # torch raises anything
            log.warning("%s is damaged and trained again (%s)", self._path, str(error)[:100])
            return None
