"""Files that a stranger could have made, each with the way a user would meet it. None may run, leave or overwhelm.

A case is a function of an empty folder that makes its files and returns what a user does with them. `CANARY`, a file
name, is what a program in one of them would make in the folder above; `victim.txt` there must stay as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from leap_dist.data.streaming import open_dataset
from leap_dist.data.transforms import Whole, eval_transform, train_transform
from leap_dist.errors import UserError
from small_sets import ALONE, config

BOMB = bytes(1 << 30)  # what a few kilobytes unpack to
CANARY = "canary"
Work = Callable[[], Any]


class Case(NamedTuple):
    """A hostile file. refused: what is said of it; None: it is taken, and does no harm. quick: in `make test`."""

    name: str
    make: Callable[[Path], Work]
    refused: Optional[str]
    quick: bool


CASES: list[Case] = []


def case(refused: Optional[str], *, quick: bool = False) -> Callable[[Callable[..., Work]], Callable[..., Work]]:
    def register(make: Callable[[Path], Work]) -> Callable[[Path], Work]:
        CASES.append(Case(make.__name__, make, refused, quick))
        return make

    return register


class Evil:
    """Pickled, it makes the canary when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.canary = str(folder.parent / CANARY)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def read_all(folder: Path, **options: Any) -> None:
    """Check, open and decode a whole set, augmented and not. UserError also for the first sample that is bad."""
    options = config(folder, **options)
    for transform in (train_transform(options, ALONE.device), Whole(eval_transform(options))):
        dataset = open_dataset(str(folder), options, world=ALONE, transform=transform, seed=0, substitutes=False)
        for sample in range(min(dataset.store.size, 20)):
            try:
                dataset.get_item(sample, 0)
            except UserError:
                raise
            except Exception as error:  # leap_dist.data.streaming.Unreadable, the one that a run counts
                assert type(error).__name__ == "Unreadable", error
                raise UserError(str(error)) from None


def reads(folder: Path, **options: Any) -> Work:
    return lambda: read_all(folder, **options)
