"""One run at a time in an output folder, which all of its ranks share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Optional

from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, gather_objects, on_main
from leap_dist.runtime.files import is_at, lock, refusal, write_text

LOCK = ".lock"
LOCK_SECONDS = 60  # a run that was told to stop may still be saving


class Claim:
    """A run's right to its folder: a lock, held by rank 0 until `release`. Every method is called by all ranks.

    Without it, a second start would delete the checkpoint that the first is writing for one left half-written, and a
    start that waits for the first to leave would go on from an older checkpoint than that leaves. So a new folder is
    made to be locked, before anybody decides on what is in it; one that stays empty goes again.
    """

    def __init__(self, output: Path, world: World) -> None:
        self._output = output
        self._world = world
        self._held: Optional[IO[Any]] = None
        self._made: list[Path] = []  # folders, the outermost first

    def __enter__(self) -> Claim:
        self.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def hold(self) -> None:
        """Make the folder if there is none, and lock it, before anybody looks at what is in it. Collective.

        Raises:
            UserError: another run is at it and does not leave, or it cannot be written.
        """
        self._on_main(self._lock)

    def mark(self, name: str, text: str) -> None:
        """Write the file `name` into the folder, which is held from here on. Collective.

        Raises:
            UserError: as `hold`, or a rank does not see the file.
        """
        self._on_main(lambda: (self._lock(), write_text(self._output / name, text)))
        require_shared(self._output / name, self._output, self._world)

    def fault(self) -> str:
        """What has become of the folder that is held, on rank 0; empty where it is as it was."""
        if self._held is None or is_at(self._held, self._output / LOCK):
            return ""
        return f"output={self._output}: was removed or replaced while this run was at it; nothing more is written there"

    def release(self) -> None:
        """Let others have the folder; safe at any time. What `hold` has made and nobody has used is removed."""
        if self._held is None:
            return
        if self._made and not self.fault() and {path.name for path in self._output.iterdir()} == {LOCK}:
            (self._output / LOCK).unlink()
            for folder in reversed(self._made):
                with suppress(OSError):  # somebody else has put something beside it meanwhile
                    folder.rmdir()
        self._held.close()
        self._held = None

    def _lock(self) -> None:
        while self._held is None:
            self._made += [path for path in (*reversed(self._output.parents), self._output) if not path.exists()]
            self._output.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # removed in this moment, by a start that came to nothing
                self._held = lock(self._output / LOCK, LOCK_SECONDS)

    def _on_main(self, work: Callable[[], None]) -> None:
        on_main(lambda: self._worded(work), self._world)

    def _worded(self, work: Callable[[], None]) -> None:
        """UserError for all that may go wrong with the folder."""
        try:
            work()
        except BlockingIOError:
            fault = "another run is at it, or its ranks still are"
        except (OSError, UserError) as error:
            fault = f"cannot be written ({refusal(error, self._output, probe=False) or error})"
        else:
            return
        raise UserError(f"output={self._output}: {fault}")


def is_claimed(output: Path) -> bool:
    """Whether a run is at work in a folder now, as far as this machine sees locks."""
    try:
        lock(output / LOCK, 0, "r").close()
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def require_shared(path: Path, output: Path, world: World) -> None:
    """Raise UserError, on every rank, if one does not see the file `path` that rank 0 does. Collective."""
    seen = gather_objects(path.is_file(), world)
    if not all(seen):
        raise UserError(
            f"output={output}: rank {seen.index(False)} does not see {path}; all ranks must share the folder"
        )
