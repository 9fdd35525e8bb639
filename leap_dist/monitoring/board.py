"""TensorBoard's files, which a run can do without: where they cannot be written, it says so once and goes on.

And read again, as what they are: records of (length, its checksum, an event, its checksum) in the order of their files'
names. TensorBoard's own reader takes a minute for the points of a run over ImageNet, this one seconds.
"""

from __future__ import annotations

import logging
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

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


class Points(NamedTuple):
    """Of one tag, in the order they were written: 0-based steps, values, seconds since the epoch."""

    steps: array[int]
    values: array[float]
    times: array[float]


def read_points(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Points]:
    """The points of every wanted tag in a TensorBoard folder; none where there is no such folder.

    A session that continued at a step hides what sessions before wrote of it and of later ones. A file that a kill or a
    disk has damaged is read up to there.
    """
    from tensorboard.compat.proto.event_pb2 import SessionLog

    found: dict[str, Points] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in _events(path):
            if event.session_log.status == SessionLog.START:
                for tag, points in found.items():
                    found[tag] = _before(points, event.step)
            for value in event.summary.value:
                if value.HasField("simple_value") and wanted(value.tag):
                    points = found.setdefault(value.tag, Points(array("q"), array("d"), array("d")))
                    points.steps.append(event.step)
                    points.values.append(value.simple_value)
                    points.times.append(event.wall_time)
    return found


def _events(path: Path) -> Iterator[Any]:
    """The events of one file, as far as it is whole."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    data, at = path.read_bytes(), 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        begin, at = at + 12, at + 12 + length + 4
        if at > len(data):
            return
        try:
            yield Event.FromString(data[begin : begin + length])
        except DecodeError:
            return


def _before(points: Points, step: int) -> Points:
    """Those of earlier steps."""
    kept = [index for index, at in enumerate(points.steps) if at < step]
    return Points(*(array(column.typecode, [column[index] for index in kept]) for column in points))
