"""Sources that are read piece by piece, in their own order: nothing is known of an image before its piece is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from leap_dist.data.classes import CLASSES, numbered
from leap_dist.errors import UserError
from leap_dist.runtime.files import read_json

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """An image. name: for reports. label: a number or the name of a class, None if it has none. read: its bytes.

    `read` raises OSError, or anything, where it cannot.
    """

    name: str
    label: Union[int, str, None]
    read: Callable[[], bytes]


class Lost(NamedTuple):
    """What cannot be read because its container is damaged. images: how many, if only about."""

    name: str
    reason: str
    images: int


class Piece(NamedTuple):
    """What one process reads from its beginning to its end.

    number: in its split. weight: its share of the source, in the unit of its stream. content: the stream's own.
    """

    split: str
    number: int
    weight: int
    content: Any


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A source. All processes and machines see the same pieces, in the same order.

    unit: of weights, as it is shown. pieces: of all splits, those of a split together. classes: name -> label, where
    the source names them. labelled: split -> whether its samples have labels; there are no other splits.
    """

    unit: str
    pieces: Sequence[Piece]
    classes: Optional[Mapping[str, int]]
    labelled: Mapping[str, bool]

    def samples(self, piece: Piece, left_out: Counter[str]) -> Iterator[Union[Sample, Lost]]:
        """The images of a piece; `left_out` counts what else is in it, by reason. UserError if it has changed."""
        raise NotImplementedError

    def digest(self, split: str) -> str:
        """Of all that the images of a split depend on."""
        raise NotImplementedError

    def describe(self, split: str) -> str:
        """What a split is made of, in words."""
        raise NotImplementedError


def grouped(split: str, weights: Sequence[int], enough: int) -> list[Piece]:
    """Files that follow each other as pieces of at least `enough` together; the content is their `range`."""
    pieces, start, weight = [], 0, 0
    for number, more in enumerate(weights):
        weight += max(more, 1)  # an empty one is read too, and told
        if weight >= enough or number + 1 == len(weights):
            pieces.append(Piece(split, len(pieces), weight, range(start, number + 1)))
            start, weight = number + 1, 0
    return pieces


def named_classes(folder: Path) -> Optional[dict[str, int]]:
    """Class name -> label, where a source has such a file. UserError if it is none."""
    try:
        return numbered(read_json(folder / CLASSES), str(folder / CLASSES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CLASSES} cannot be read: {error}") from None


def alike(folder: Path, labelled: dict[str, bool]) -> dict[str, bool]:
    """The splits to take of those found. A test set without labels is left out beside others that have them.

    UserError if other splits differ in whether they have labels.
    """
    if len(set(labelled.values())) > 1 and not labelled.get("test", True):
        log.warning("%s: split 'test' is left out, it has no labels", folder)
        labelled = {split: known for split, known in labelled.items() if split != "test"}
    if len(set(labelled.values())) > 1:
        bare = next(split for split, known in labelled.items() if not known)
        raise UserError(
            f"{folder}: split {bare!r} has no labels, which other splits have; make shards of each by itself"
        )
    return labelled
