"""`telemetry.profile_steps`: a trace of a few steps by torch's profiler, on every rank, for https://ui.perfetto.dev.

Its ranges are the phases of `leap_dist.runtime.timing` and teacher.block_1, teacher.block_2, ... Outside the window
there is neither a profiler nor a hook.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Optional

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, tensorboard_trace_handler
from torch.utils.hooks import RemovableHandle

from leap_dist.config import Config
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World
from leap_dist.runtime.files import refusal
from leap_dist.runtime.timing import PhaseTimer, around_forward

log = logging.getLogger(__name__)


def check_window(config: Config, total_steps: int) -> None:
    """Raise UserError for a window that ends after the run."""
    window = config.telemetry.profile_steps
    if window is not None and window[1] >= total_steps:
        raise UserError(
            f"telemetry.profile_steps={list(window)}: the run has {total_steps} steps, the last one is "
            f"{total_steps - 1}"
        )


class ProfilerWindow:
    """Opens before the first step of `telemetry.profile_steps` and closes after the last, both 0-based and included.

    blocks: the teacher's, in order. A block under torch.compile shows as torch's own range, not by its number.
    """

    def __init__(self, config: Config, world: World, timer: PhaseTimer, blocks: Iterable[nn.Module]) -> None:
        self._window = config.telemetry.profile_steps
        self._folder = Path(config.output) / "tensorboard"
        self._worker = f"rank{world.rank}"
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda")
        self._timer = timer
        self._blocks = list(blocks)
        self._hooks: list[RemovableHandle] = []
        self._profiler: Optional[profile] = None

    def before(self, step: int) -> None:
        """The 0-based `step` is about to begin, or the run is over."""
        if self._window is None:
            return
        first, last = self._window
        if self._profiler is not None and step > last:
            self.close()
        elif self._profiler is not None:
            self._profiler.step()
        elif first <= step <= last:
            self._open()

    def close(self) -> None:
        """Write the trace, if the window is open."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        try:
            profiler.stop()
        except (OSError, RuntimeError) as error:  # the trace is no result
            reason = refusal(error, self._folder) or " ".join(str(error).split())
            log.warning("no trace of %s: %s", self._worker, reason)
        self._timer.tracing = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _open(self) -> None:
        for number, block in enumerate(self._blocks, 1):
            self._hooks += around_forward(block, partial(record_function, f"teacher.block_{number}"))
        self._timer.tracing = True
        handler = tensorboard_trace_handler(str(self._folder), worker_name=self._worker, use_gzip=True)
        self._profiler = profile(activities=self._activities, on_trace_ready=handler)
        self._profiler.start()
