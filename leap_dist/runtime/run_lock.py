"""One run at a time in an output folder, which all of its ranks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Optional

from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, gather_objects
from leap_dist.runtime.files import lock, write_text

LOCK = ".lock"
LOCK_SECONDS = 60  # a run that was told to stop may still be saving


class Claim:
    """A run's right to its folder: a lock, held by rank 0 until `release`. Every method is called by all ranks.

    Without it, a second start would delete the checkpoint that the first is writing for one left half-written, and a
    start that waits for the first to leave would go on from an older checkpoint than that leaves.
    """

    def __init__(self, output: Path, world: World) -> None:
        self._output = output
        self._world = world
        self._held: Optional[IO[Any]] = None

    def hold(self) -> None:
        """Lock the folder if it is there, before anybody looks at what is in it. Collective.

        Raises:
            UserError: another run is at it and does not leave, or it cannot be written.
        """
        self._on_main(lambda: self._lock() if self._output.is_dir() else None)

    def mark(self, name: str, text: str) -> None:
        """Write the file `name`, into a new and locked folder if there was none. Collective.

        Raises:
            UserError: as `hold`, or a rank does not see the file.
        """
        self._on_main(lambda: self._write(name, text))
        require_shared(self._output / name, self._output, self._world)

    def release(self) -> None:
        """Let others have the folder; safe at any time."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def _write(self, name: str, text: str) -> None:
        self._output.mkdir(parents=True, exist_ok=True)
        self._lock()
        write_text(self._output / name, text)

    def _lock(self) -> None:
        if self._held is None:
            self._held = lock(self._output / LOCK, LOCK_SECONDS)

    def _on_main(self, work: Callable[[], None]) -> None:
        fault = ""
        if self._world.is_main:
            try:
                work()
            except BlockingIOError:
                fault = "another run is at it, or its ranks still are"
            except OSError as error:
                fault = f"cannot be written ({error})"
        fault = gather_objects(fault, self._world)[0]
        if fault:
            raise UserError(f"output={self._output}: {fault}")


def require_shared(path: Path, output: Path, world: World) -> None:
    """Raise UserError, on every rank, if one does not see the file `path` that rank 0 does. Collective."""
    seen = gather_objects(path.is_file(), world)
    if not all(seen):
        raise UserError(
            f"output={output}: rank {seen.index(False)} does not see {path}; all ranks must share the folder"
        )
