"""TensorBoard's files, which a run can do without: where they cannot be written, it says so once and goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from tensorboard.summary.writer import event_file_writer

from leap_dist.runtime.files import refusal

log = logging.getLogger(__name__)


class Board:
    """A `SummaryWriter` on `folder` that raises nothing; `purge_step` as it has it."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer: Optional[Any] = None
        self._usual_hook = threading.excepthook
        threading.excepthook = self._thread_failed

        def opened() -> None:
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

        self._attempt(opened)

    def write(self, add: Callable[[Any], None]) -> None:
        """`add` to the writer, unless that has failed before."""
        if self._writer is not None:
            self._attempt(lambda: add(self._writer))

    def close(self) -> None:
        """Write what is on its way; safe at any time."""
        self.write(lambda writer: writer.close())
        self._writer, threading.excepthook = None, self._usual_hook

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # where TensorFlow is installed, it writes, and has errors of its own
            self._writer = None
            reason = refusal(error, self._folder, probe=False) or f"{self._folder}: {error}"
            log.warning("TensorBoard cannot be written (%s); the run goes on without charts", reason)

    def _thread_failed(self, told: threading.ExceptHookArgs) -> None:
        """What SummaryWriter's thread dies of, its next call raises again: it needs no traceback."""
        if type(told.thread).__module__ != event_file_writer.__name__:
            self._usual_hook(told)
