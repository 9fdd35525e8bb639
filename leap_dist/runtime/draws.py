"""Random numbers of students that train in turns, each as if it were alone with torch's global generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor


class Draws:
    """What one student draws in a step, which follows from a seed, whoever draws between two of its turns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seed = 0
        self._left: Optional[tuple[Tensor, Optional[Tensor]]] = None  # states of the generators of host and device

    def begin(self, seed: int) -> None:
        """A step begins, whose draws follow from `seed`."""
        self._seed, self._left = seed, None

    @contextmanager
    def turn(self, last: bool) -> Iterator[None]:
        """Draw in this block what comes after the turn before. last: the step has no further turn."""
        if self._left is None:
            # torch.manual_seed seeds every device that it knows of, 1 ms in a process without a GPU.
            torch.default_generator.manual_seed(self._seed)
            if self._device.type == "cuda":
                torch.cuda.manual_seed(self._seed)
        else:
            host, device = self._left
            torch.set_rng_state(host)
            if device is not None:
                torch.cuda.set_rng_state(device, self._device)
        yield
        if not last:
            on_cuda = self._device.type == "cuda"
            self._left = torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if on_cuda else None
