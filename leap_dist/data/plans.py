"""What a source becomes: which images in which order, which classes, and where one shard ends and the next begins.

All of it is settled before an image is read, so that nothing depends on who writes what.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Optional, Union

import numpy as np
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from leap_dist.data.classes import MOST_CLASSES
from leap_dist.data.pixels import open_rgb
from leap_dist.data.sources import WHOLE, Images, Lost, Piece, Sample, Stream, counted
from leap_dist.data.sources.spool import Spool
from leap_dist.data.sources.tree import ONE_CLASS
from leap_dist.errors import UserError

JPEG_QUALITY = 90
JPEG_BYTES_PER_PIXEL = 0.4  # for the plan; ImageNet at quality 90 has 0.33
SAMPLE_OVERHEAD = 16  # bytes MDS adds to an image: its offset, its size, its label
SHUFFLED = 1 << 24  # images that are shuffled with each other: all of ImageNet-21k. It takes 0.7 GB
AT_ONCE = 1 << 20  # numbers of a long array


@dataclass(frozen=True)
class Recipe:
    """How images become shards.

    resize: re-encode images whose shorter side, in pixels, is longer than this, as JPEG of `quality`; None keeps every
    image's own bytes. shard_mib: size of a shard, an estimate if images are re-encoded.
    """

    resize: Optional[int] = None
    quality: int = JPEG_QUALITY
    shard_mib: float = 64

    def encode(self, data: bytes) -> bytes:
        """The bytes to store. It decodes all, as training will. Errors as of `pixels.open_rgb`."""
        image = open_rgb(data)
        if self.resize is None or min(image.size) <= self.resize:
            return data
        jpeg = io.BytesIO()
        resize(image, [self.resize], InterpolationMode.BICUBIC).save(jpeg, "JPEG", quality=self.quality)
        return jpeg.getvalue()

    def stored_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Estimated bytes in a shard of images of `sizes` bytes."""
        if self.resize is not None:
            sizes = np.minimum(sizes, int(self.resize**2 * 4 / 3 * JPEG_BYTES_PER_PIXEL))
        return sizes + SAMPLE_OVERHEAD


class Shard(NamedTuple):
    """One shard to write: which images of which split, in which order."""

    split: str
    number: int
    images: np.ndarray

    @property
    def weight(self) -> int:
        """Its share of the set: images."""
        return len(self.images)


class AnyPlan(ABC):
    """What the writer of shards asks of a plan.

    classes: name -> label, None where labels are all that is known. unit: of weights, as it is shown. size_limit: bytes
    at which the shard of a piece ends and another begins; None: a piece is one shard. repairable: an image that does
    not decode may be mended before the same command goes on.
    """

    recipe: Recipe
    classes: Optional[Mapping[str, int]]
    unit: str
    size_limit: Optional[int]
    repairable: bool

    @property
    @abstractmethod
    def splits(self) -> list[str]:
        """The folders to write."""

    @property
    @abstractmethod
    def pieces(self) -> Sequence[Union[Shard, Piece]]:
        """What is written in one go, by one process; those of a split together."""

    @property
    @abstractmethod
    def weights(self) -> np.ndarray:
        """(pieces,) the weight of each."""

    @abstractmethod
    def samples(self, piece: Any, left_out: Counter[str]) -> Iterator[Union[Sample, Lost]]:
        """The images of a piece, with the labels to store; `left_out` counts those that are meant to be in no shard."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """All that the bytes of the shards depend on, as it is recorded beside them."""

    @abstractmethod
    def class_index(self, highest: int) -> dict[str, int]:
        """Class name -> label. highest: of the labels that were written, -1 if none was."""

    def _recipe_parameters(self) -> dict[str, Any]:
        return asdict(self.recipe) if self.recipe.resize else {"resize": None, "shard_mib": self.recipe.shard_mib}


class Shards(Sequence[Shard]):
    """The shards of all splits, each built when it is asked for.

    orders: split -> its images. bounds: split -> where in them each shard begins, and where the last ends.
    """

    def __init__(self, orders: Mapping[str, np.ndarray], bounds: Mapping[str, np.ndarray]) -> None:
        self._orders, self._bounds = orders, bounds
        self.weights = np.concatenate([np.diff(places) for places in bounds.values()] or [np.empty(0, np.int64)])

    def bounds_of(self, split: str) -> np.ndarray:
        """Where the shards of a split begin in its order, and where the last ends; [0] if it has none."""
        return self._bounds.get(split, np.zeros(1, np.int64))

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        for split, places in self._bounds.items():
            if number < len(places) - 1:
                return Shard(split, number, self._orders[split][places[number] : places[number + 1]])
            number -= len(places) - 1
        raise IndexError(index)


@dataclass(frozen=True)
class Plan(AnyPlan):
    """What listed images and a recipe become: the images of all splits, their labels in `classes`, and all shards.

    labels: (N,) per split, of all its images; those of classes that are left out are in no shard.
    """

    sources: Mapping[str, Images]
    recipe: Recipe
    classes: Mapping[str, int]
    labels: Mapping[str, np.ndarray]
    shards: Shards
    unit = "image"
    size_limit = None
    repairable = True

    @property
    def splits(self) -> list[str]:
        """See AnyPlan."""
        return list(self.sources)

    @property
    def pieces(self) -> Shards:
        """See AnyPlan."""
        return self.shards

    @property
    def weights(self) -> np.ndarray:
        """See AnyPlan."""
        return self.shards.weights

    @property
    def size(self) -> int:
        """Number of images."""
        return int(self.weights.sum())

    def left_out(self, split: str, images: Images) -> dict[str, int]:
        """Why `images`, all those of a split, are in no shard, and how many; a split may be left out whole."""
        unlabelled = sum(int((~_known(images, labels)).sum()) for labels in _stretches(images.labels))
        unwanted = sum(int((labels < 0).sum()) for labels in _stretches(self.labels[split])) - unlabelled
        return {reason: n for reason, n in (("without a label", unlabelled), ("of other classes", unwanted)) if n}

    def samples(self, piece: Shard, left_out: Counter[str]) -> Iterator[Sample]:
        """See AnyPlan."""
        images, labels = self.sources[piece.split], self.labels[piece.split]
        read = images.reader(piece.images)
        for number in piece.images.tolist():
            yield Sample(images.names[number], int(labels[number]), partial(read, number))

    @cached_property
    def _digests(self) -> dict[str, dict[str, Any]]:
        return {
            split: {"images": _labelled(self.labels[split]), "sha256": _digest(images, self.labels[split])}
            for split, images in self.sources.items()
        }

    def parameters(self) -> dict[str, Any]:
        """See AnyPlan."""
        return {"version": 1, **self._recipe_parameters(), "classes": len(self.classes), "splits": self._digests}

    def class_index(self, highest: int) -> dict[str, int]:
        """See AnyPlan."""
        return dict(self.classes)

    def describe(self, sources: Mapping[str, Images]) -> Iterator[str]:
        """What is going to be written and what is left out of all `sources`, a line per split."""
        for split, images in sources.items():
            places = self.shards.bounds_of(split)
            left_out = {**images.left_out, **self.left_out(split, images)}
            told = f"; left out: {counted(left_out)}" if left_out else ""
            yield (
                f"{_shown(split)}: {places[-1]} of {len(images.names)} images, {len(self.classes)} classes, "
                f"{len(places) - 1} shards{told}"
            )


def _shown(split: str) -> str:
    return "all" if split == WHOLE else split


def _digest(images: Images, labels: np.ndarray) -> str:
    digest = hashlib.sha256()
    for number, name in enumerate(images.names):
        digest.update((b"\n" if number else b"") + name.encode(errors="surrogateescape"))
    for array in (labels, images.sizes):
        for part in _stretches(array):
            digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()


def _stretches(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array, AT_ONCE of it at a time: what is computed from it shall not be as long as it is."""
    return (array[start : start + AT_ONCE] for start in range(0, len(array), AT_ONCE))


def _labelled(labels: np.ndarray) -> int:
    return sum(int((part >= 0).sum()) for part in _stretches(labels))


def _known(images: Images, labels: np.ndarray) -> np.ndarray:
    return (labels >= 0) & (labels < len(images.classes))


def plan(
    sources: Mapping[str, Images], recipe: Recipe, wanted: Optional[list[str]] = None, scratch: Optional[Path] = None
) -> Plan:
    """Settle classes, order and shards; a function of its arguments alone. `wanted`: names of the classes to take.

    Classes keep the order of the source, also when they are a part of it. A split without a labelled image is dropped.
    scratch: whose disk holds the order, see `spool.Spool`. UserError if a split lacks a wanted class, classes of
    splits differ, or two have one name.
    """
    names = _common_classes(sources, wanted)
    classes = {name: label for label, name in enumerate(names)}
    labels = {split: _relabelled(images, classes, scratch) for split, images in sources.items()}
    sources = {split: images for split, images in sources.items() if _labelled(labels[split])}
    cuts = {split: _cut(images, labels[split], recipe, scratch) for split, images in sources.items()}
    if not cuts:
        raise UserError("there are no images to write")
    shards = Shards(
        {split: order for split, (order, _) in cuts.items()}, {split: ends for split, (_, ends) in cuts.items()}
    )
    return Plan(sources, recipe, classes, labels, shards)


def _common_classes(sources: Mapping[str, Images], wanted: Optional[list[str]]) -> list[str]:
    first = next(iter(sources.values())).classes
    for split, images in sources.items():
        twice = [name for name, count in Counter(images.classes).items() if count > 1]
        if twice:
            raise UserError(f"two classes are named {twice[0]!r}: a class index needs names that differ")
        if wanted is None:
            wrong, what = set(images.classes) ^ set(first), "not in all splits"
        else:
            place = "the set" if split == WHOLE else f"split {split!r}"
            wrong, what = set(wanted) - set(images.classes), f"wanted but not in {place}"
        if wrong:
            raise UserError(f"classes {', '.join(sorted(wrong)[:3])} ({len(wrong)} in all) are {what}")
    return [name for name in first if wanted is None or name in set(wanted)]


def _relabelled(images: Images, classes: Mapping[str, int], scratch: Optional[Path]) -> np.ndarray:
    """Labels in `classes`; -1 where the image's class, or any label, is absent."""
    table = np.array([classes.get(name, -1) for name in images.classes] + [-1], dtype=np.int64)
    new = Spool(np.int64, scratch)
    for labels in _stretches(images.labels):
        new.extend(table[np.where(_known(images, labels), labels, len(images.classes))])
    return new.array()


def _cut(images: Images, labels: np.ndarray, recipe: Recipe, scratch: Optional[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the labelled images in their order, and where in it each shard begins; the last place is its end.

    They are shuffled within their windows, or else among SHUFFLED that follow each other.
    """
    order, bounds = Spool(np.int64, scratch), Spool(np.int64, scratch)
    bounds.extend([0])
    at = 0
    blocks = [(0, len(labels))] if images.windows is not None else _blocks(len(labels))
    for seed, (start, stop) in enumerate(blocks):
        keys = np.random.RandomState(seed).permutation(stop - start)  # this generator's stream is frozen (NEP 19)
        chosen = start + np.lexsort((keys,) if images.windows is None else (keys, images.windows))
        chosen = chosen[labels[chosen] >= 0]
        ends = _ends(np.cumsum(recipe.stored_sizes(images.sizes[chosen])), recipe.shard_mib * 2**20)
        order.extend(chosen)
        bounds.extend(at + ends)
        at += len(chosen)
    return order.array(), bounds.array()


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + SHUFFLED, count)) for start in range(0, count, SHUFFLED))


def _ends(sums: np.ndarray, limit: float) -> np.ndarray:
    """Where shards end if images of `sums` bytes in all follow each other: before `limit`, but for one image alone."""
    ends = [0]
    while ends[-1] < len(sums):
        start = sums[ends[-1] - 1] if ends[-1] else 0
        ends.append(max(int(np.searchsorted(sums, start + limit, "right")), ends[-1] + 1))
    return np.array(ends[1:], np.int64)


# ---- streams


@dataclass(frozen=True)
class StreamedPlan(AnyPlan):
    """What a stream and a recipe become. table: labels of the source -> those to store; None: they stay.

    Shards keep the order of the source, and end with their piece.
    """

    stream: Stream
    recipe: Recipe
    table: Optional[Mapping[int, int]] = None
    classes: Optional[Mapping[str, int]] = None
    repairable = False

    @property
    def unit(self) -> str:
        """See AnyPlan."""
        return self.stream.unit

    @property
    def size_limit(self) -> int:
        """See AnyPlan."""
        return max(1, int(self.recipe.shard_mib * 2**20))

    @property
    def splits(self) -> list[str]:
        """See AnyPlan."""
        return list(self.stream.labelled)

    @property
    def pieces(self) -> Sequence[Piece]:
        """See AnyPlan."""
        return self.stream.pieces

    @cached_property
    def weights(self) -> np.ndarray:
        """See AnyPlan."""
        return np.array([piece.weight for piece in self.stream.pieces], np.int64)

    @cached_property
    def _labels(self) -> Container[int]:
        """Those of the source that are some class's."""
        return range(MOST_CLASSES) if self.stream.classes is None else set(self.stream.classes.values())

    def samples(self, piece: Piece, left_out: Counter[str]) -> Iterator[Union[Sample, Lost]]:
        """See AnyPlan."""
        for sample in self.stream.samples(piece, left_out):
            if isinstance(sample, Lost) or not self.stream.labelled[piece.split]:
                yield sample if isinstance(sample, Lost) else sample._replace(label=0)
                continue
            label = sample.label
            if isinstance(label, str):
                label = (self.stream.classes or {}).get(label)
                if label is None:
                    yield sample._replace(read=partial(_refuse_label, sample.label))
                    continue
            if label is None or label not in self._labels:
                left_out["without a label"] += 1
            elif self.table is not None and label not in self.table:
                left_out["of other classes"] += 1
            else:
                yield sample._replace(label=label if self.table is None else self.table[label])

    def parameters(self) -> dict[str, Any]:
        """See AnyPlan."""
        splits = {
            split: {
                "pieces": sum(piece.split == split for piece in self.pieces),
                "labelled": labelled,
                "sha256": self.stream.digest(split),
            }
            for split, labelled in self.stream.labelled.items()
        }
        chosen = {} if self.table is None else {"labels": {str(old): new for old, new in self.table.items()}}
        return {"version": 1, **self._recipe_parameters(), "classes": self.classes, **chosen, "splits": splits}

    def class_index(self, highest: int) -> dict[str, int]:
        """See AnyPlan."""
        if self.classes is not None:
            return dict(self.classes)
        return {str(number): number for number in range(highest + 1)}

    def describe(self) -> Iterator[str]:
        """What is going to be written, a line per split."""
        for split, labelled in self.stream.labelled.items():
            told = "" if labelled else f"; no labels: all become the one class {ONE_CLASS!r}"
            pieces = sum(piece.split == split for piece in self.pieces)
            yield f"{_shown(split)}: {self.stream.describe(split)}, in {pieces} pieces{told}"


def _refuse_label(label: object) -> NoReturn:
    raise ValueError(f"label {label!r:.80} is neither a number nor the name of a class in class_to_idx.json")


def plan_stream(stream: Stream, recipe: Recipe, wanted: Optional[list[str]] = None) -> StreamedPlan:
    """Settle classes; a function of its arguments alone. `wanted`: names of the classes to take; see `plan`.

    Where the source names no classes, the names are the numbers. UserError if `wanted` has another name.
    """
    if not stream.pieces:
        raise UserError("there are no images to write")
    if not all(stream.labelled.values()):
        if wanted is not None:
            raise UserError("--classes: the images of this source have no labels")
        return StreamedPlan(stream, recipe, classes={ONE_CLASS: 0})
    if wanted is None:
        return StreamedPlan(stream, recipe, classes=stream.classes)
    known = stream.classes or {name: int(name) for name in wanted if name.isdecimal()}
    wrong = sorted(set(wanted) - set(known))
    if wrong:
        raise UserError(
            f"classes {', '.join(wrong[:3])} ({len(wrong)} in all) are wanted but not in the set, whose classes are "
            f"{'those of its class_to_idx.json' if stream.classes else 'numbers'}"
        )
    names = sorted(set(wanted), key=known.__getitem__)
    table = {known[name]: label for label, name in enumerate(names)}
    return StreamedPlan(stream, recipe, table, {name: label for label, name in enumerate(names)})
