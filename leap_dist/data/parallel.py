"""A function applied to many things by several processes, which end when their parent does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Generic, TypeVar, Union

from torch.utils.data import DataLoader, Dataset

from leap_dist.errors import UserError
from leap_dist.runtime.files import refusal

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Mapped(Dataset, Generic[Item, Result]):
    """`function(item)` of every item; what a user can mend is handed over as a value, so that it stays one line."""

    def __init__(self, function: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self._function = function
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Union[Result, UserError]:
        try:
            return self._function(self._items[index])
        except UserError as error:
            return error
        except OSError as error:
            return UserError(refusal(error, Path.cwd(), probe=False) or str(error))


def _unchanged(result: Any) -> Any:
    return result


def parallel(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` of all items, in their order, worked out by `workers` processes (0: by this one).

    A DataLoader is the pool: unlike the standard library's, its workers notice that their parent was killed, and it
    notices when one of them was. UserError on that, and on any UserError or OSError in `function`.
    """
    # collate_fn: without one, the loader would turn arrays into tensors.
    workers = min(workers, len(items))
    loader = DataLoader(
        _Mapped(function, items), batch_size=None, num_workers=workers, collate_fn=_unchanged,
        multiprocessing_context="fork" if workers else None,  # Python 3.14 would start them by a server
    )  # fmt: skip
    try:
        for result in loader:
            if isinstance(result, UserError):
                raise result
            yield result
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise UserError("a worker process was killed, perhaps for want of memory: try fewer workers") from error


def end_if_orphaned() -> None:
    """Leave at once if this is a worker whose parent is gone; what it would finish, nobody waits for."""
    parent = parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)
