"""From the device to the host without waiting."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


class HostCopy:
    """Numbers on their way from the device to the host: copied without waiting, read when they are needed."""

    def __init__(self, values: Tensor) -> None:
        self._ready: Optional[torch.cuda.Event] = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._host = values

    def tensor(self) -> Tensor:
        """The values on the host; waits for the copy, if need be."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host

    def read(self) -> list[float]:
        """The values of a 1-D copy."""
        return self.tensor().tolist()
