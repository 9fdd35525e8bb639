"""Device work that nothing on the main stream waits for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor


class Aside:
    """A stream of its own on CUDA; on a CPU, where work is done as it comes, nothing."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Optional[torch.cuda.Stream] = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def work(self, reads: Iterable[Tensor]) -> Iterator[None]:
        """Queue the body behind what is queued now, and beside what follows.

        reads: what it takes from outside; none of it may be written to until the body is done on the device.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in reads:
            tensor.record_stream(self._stream)  # or its memory is used anew while the body still reads it
        with torch.cuda.stream(self._stream):
            yield
