"""A save of DeepSpeed's in which a rank whose disk refuses does not leave the others waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from leap_dist.runtime.distributed import join_barrier


class _Deferring:
    """DeepSpeed's own writer of checkpoint files, but a file that cannot be written is noted, not raised.

    Each rank writes its parts, and then all meet: one that broke off would be waited for.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.fault: Optional[Exception] = None

    def save(self, state_dict: Any, path: str) -> None:
        """As DeepSpeed's; what follows a file that failed is not written."""
        self._noted(self._writer.save, state_dict, path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._noted(self._writer.makedirs, path, exist_ok=exist_ok)

    def _noted(self, write: Any, *args: Any, **more: Any) -> None:
        if self.fault is None:
            try:
                write(*args, **more)
            except (OSError, RuntimeError) as error:  # torch.save says a full disk in its own words
                self.fault = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


@contextmanager
def met_by_all(engine: Any) -> Iterator[None]:
    """Save `engine` in this block: what a rank could not write is raised at its end, when all ranks are there."""
    usual = engine.checkpoint_engine
    engine.checkpoint_engine = deferring = _Deferring(usual)
    try:
        yield
    except OSError as error:
        # Of rank 0, which copies a script of DeepSpeed's into the folder: the others are at the end of the save.
        join_barrier()
        deferring.fault = deferring.fault or error
    finally:
        engine.checkpoint_engine = usual
    if deferring.fault is not None:
        raise deferring.fault
