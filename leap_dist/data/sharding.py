"""Write the shards of a whole source, or a part of them, with several processes; the same call continues after a kill.

`OUT`/.sharding holds a record of every finished piece of the plan; index.json, without which nobody can train, is
written when all of them are there. Of a set that is made in parts, each part has its own folder, records and index;
`merging` puts them together.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import os
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from leap_dist.data.classes import CLASSES, INDEX
from leap_dist.data.names import printable
from leap_dist.data.parallel import end_if_orphaned, parallel
from leap_dist.data.plans import AnyPlan
from leap_dist.data.shards import COLUMNS, HASH
from leap_dist.data.sources import WHOLE, Lost, counted
from leap_dist.data.sources.images import SPLITS
from leap_dist.errors import UserError
from leap_dist.runtime.files import lock, read_regular, write_json, write_whole, writing

QUARANTINE = "quarantine.csv"
RUN = "sharding.json"  # what the shards were made of: stays beside them
WORK = ".sharding"
LOCK_SECONDS = 10  # a killed run's workers are gone within the time of one image
MOST_PARTS = 10_000

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """The share of one machine: the `number`-th, from 1, of `of`."""

    number: int
    of: int

    @property
    def name(self) -> str:
        """Of its folders."""
        return f"{self.number:0{len(str(self.of))}}-of-{self.of}"

    @property
    def record(self) -> str:
        """The file that says that it is done, and of what."""
        return f"part-{self.name}.json"

    def choose(self, weights: np.ndarray) -> range:
        """Which of the pieces of these weights are this part's: those whose middle lies in its stretch of the whole."""
        ends = np.cumsum(weights, dtype=np.float64)
        owners = ((ends - weights / 2) * self.of / max(ends[-1], 1)).astype(np.int64) + 1
        return range(*np.searchsorted(owners, [self.number, self.number + 1]).tolist())


class Place(NamedTuple):
    """Where shards go: all of a set, or a part of them."""

    out: Path
    part: Optional[Part] = None

    @property
    def work(self) -> Path:
        """What is needed until all is done."""
        return self.out / WORK / (self.part.name if self.part else "")

    @property
    def quarantine(self) -> str:
        """The list of bad images."""
        return f"part-{self.part.name}.{QUARANTINE}" if self.part else QUARANTINE

    @property
    def command(self) -> str:
        """What makes it, for messages."""
        return f"--part {self.part.number}/{self.part.of}"

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.out}, part {self.part.number}/{self.part.of}" if self.part else str(self.out)

    def folder(self, split: str) -> Path:
        """Of the shards of a split, and of their index."""
        return self.out / split / (self.part.name if self.part else "")

    def record(self, piece: Any) -> Path:
        """Where it says what was written of a piece."""
        return self.work / piece.split / f"{piece.number:05}.json"

    def parameters(self, plan: AnyPlan) -> dict[str, Any]:
        """All that the shards depend on, and in how many parts they are made."""
        return plan.parameters() | ({"parts": self.part.of} if self.part else {})

    def publish(self, name: str, content: Any) -> None:
        """Write JSON inside the work folder and rename it, so that a kill leaves nothing beside the shards."""
        write_json(self.work / "publish", content)
        os.replace(self.work / "publish", self.out / name)


# ---- one piece, in a worker


@dataclass(frozen=True)
class ShardWriter:
    """Writes any piece of a plan, by its number among all, and its record after it."""

    plan: AnyPlan
    place: Place

    def __call__(self, number: int) -> dict[str, Any]:
        """Write the shards of a piece; return its record. UserError if the disk refuses, or the source has changed."""
        with writing(self.place.out):
            return self._write(self.plan.pieces[number])

    def _write(self, piece: Any) -> dict[str, Any]:
        from streaming import MDSWriter  # 3 s to import

        scratch = self.place.record(piece).with_suffix(".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        record = {"weight": piece.weight, "images": 0, "highest": -1, "bad": [], "retry": False, "left_out": {}}
        limit = self.plan.size_limit
        with MDSWriter(out=str(scratch), columns=COLUMNS, hashes=[HASH], size_limit=limit) as writer:
            for sample in self._samples(piece, record):
                writer.write(sample)
        # Where the first image alone is over the limit, the writer begins with an empty shard.
        written = [info for info in json.loads((scratch / INDEX).read_text())["shards"] if info["samples"]]
        names = (f"shard.{piece.number:05}{'' if limit is None else f'.{i:03}'}.mds" for i in itertools.count())
        for name, info in zip(names, written, strict=False):
            os.replace(scratch / info["raw_data"]["basename"], self.place.folder(piece.split) / name)
            info["raw_data"]["basename"] = name
        shutil.rmtree(scratch)
        record["shards"] = written
        write_json(self.place.record(piece), record)
        return record

    def _samples(self, piece: Any, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The images that can be read and decoded. `record` gets their number, and what is said of the others.

        What could not be read may only have been out of reach: its piece is to be written again. In a stream what does
        not decode stays so: nearly every piece has such images, and a kill would cost all of them.
        """
        left_out: Counter[str] = Counter()
        for sample in self.plan.samples(piece, left_out):
            end_if_orphaned()
            if isinstance(sample, Lost):
                record["images"] += sample.images
                record["retry"] = True
                record["bad"].append([printable(sample.name), printable(sample.reason), sample.images])
                continue
            record["images"] += 1
            content = None
            try:
                content = sample.read()
                data = self.plan.recipe.encode(content)
            except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ...
                record["retry"] |= self.plan.repairable or (content is None and isinstance(error, OSError))
                # Without the address of the object in memory, which some messages have.
                reason = re.sub(r"\s*<[^>]*>", "", f"{type(error).__name__}: {error}")
                record["bad"].append([printable(sample.name), printable(" ".join(reason.split())), 1])
            else:
                record["highest"] = max(record["highest"], sample.label)
                yield {"image": data, "label": sample.label}
        record["left_out"] = dict(left_out)


# ---- the whole run


def check_apart(source: Path, out: Path) -> None:
    """UserError if `out` lies in `source`, whose images it would be among when the same command continues."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies in {source}: shards would be found there as images; name a folder outside")


def write_planned(plan: AnyPlan, out: Path, workers: int, max_bad: float, part: Optional[Part] = None) -> Iterator[int]:
    """Write what is not written yet, of all or of a part, with `workers` processes; yield weights of pieces when done.

    Images that cannot be read or decoded are left out and listed in quarantine.csv. UserError if there are more than
    the fraction `max_bad` of them, if `out` holds anything else or what was begun otherwise, and if somebody is at it.
    """
    import streaming  # noqa: F401  # once, for all workers

    place, numbers = Place(out, part), _pieces_of(plan, part)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if _begun(plan, place) and _complete(plan, place):
        shutil.rmtree(place.work, ignore_errors=True)
        yield share_of(plan, part)
        return
    with writing(out), sole_writer(place):
        _begin(plan, place)
        for split in dict.fromkeys(plan.pieces[number].split for number in numbers):
            (place.work / split).mkdir(parents=True, exist_ok=True)
            place.folder(split).mkdir(parents=True, exist_ok=True)
        yield from _write_missing(plan, place, numbers, workers, max_bad)
        _finish(plan, place, numbers)


def share_of(plan: AnyPlan, part: Optional[Part] = None) -> int:
    """The weight of all pieces, or of those of a part."""
    numbers = _pieces_of(plan, part)
    return int(plan.weights[numbers.start : numbers.stop].sum())


def _pieces_of(plan: AnyPlan, part: Optional[Part]) -> range:
    return range(len(plan.pieces)) if part is None else part.choose(plan.weights)


def check_out(out: Path) -> None:
    """UserError if the folder `out` holds anything but shards of this tool, finished or not."""
    if out.is_dir() and not (out / RUN).exists() and any(path.name != WORK for path in out.iterdir()):
        raise UserError(f"{out} exists and is not empty: name a new folder")


def check_begun(plan: AnyPlan, out: Path, part: Optional[Part] = None) -> None:
    """UserError if `out` holds anything else, or what was begun otherwise."""
    if out.is_dir():
        _begun(plan, Place(out, part))


def _begun(plan: AnyPlan, place: Place) -> bool:
    """Whether `out` was begun with the same plan; UserError if with another one, or if it holds something else."""
    check_out(place.out)
    if not (place.out / RUN).exists():
        return False
    check_same(json.loads((place.out / RUN).read_text()), place.parameters(plan), str(place.out))
    return True


def check_same(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """UserError, which begins with `what`, if something was begun otherwise than it is `wanted`."""
    for key in dict.fromkeys(("parts", *wanted, *found)):
        if found.get(key) != wanted.get(key):
            how = f"with {key}={found.get(key)}, not {wanted.get(key)}"
            if key == "parts":
                how = " and not ".join(
                    f"in {of} parts" if of else "as a whole" for of in (found.get(key), wanted.get(key))
                )
            elif isinstance(wanted.get(key), dict):
                how = "from other images" if key == "splits" else "with other classes"
            raise UserError(f"{what} was begun {how}: give what it was begun with, or name a new folder")


def _complete(plan: AnyPlan, place: Place) -> bool:
    if place.part is None:
        return all((place.out / split / INDEX).exists() for split in plan.splits)
    try:
        about = read_part(place)
    except FileNotFoundError:
        return False
    check_same(about["plan"], place.parameters(plan), str(place.out / place.part.record))
    try:
        check_part(place, about)
    except UserError as fault:
        log.warning("%s; it is written anew", str(fault).partition(": run")[0])
        (place.out / place.part.record).unlink()
        return False
    return True


@contextmanager
def sole_writer(place: Place) -> Iterator[None]:
    """Hold the lock of `place`; UserError if somebody else does. Workers inherit it, so it outlives a killed parent."""
    place.work.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(place.work / "lock", LOCK_SECONDS)
    except BlockingIOError:
        raise UserError(f"{place.title}: another process is writing shards here") from None
    with held:
        yield


def _begin(plan: AnyPlan, place: Place) -> None:
    """Say what is made here, before anything is. Machines that begin parts at the same time do it one by one."""
    try:
        held = lock(place.out / WORK / "begin", LOCK_SECONDS)
    except BlockingIOError:
        raise UserError(f"{place.out}: another process keeps it locked") from None
    with held:
        if not _begun(plan, place):
            place.publish(RUN, place.parameters(plan))


def _write_missing(plan: AnyPlan, place: Place, numbers: Sequence[int], workers: int, max_bad: float) -> Iterator[int]:
    missing, tally = [], _Tally(place, share_of(plan, place.part), max_bad)
    for number in numbers:
        record = _finished(plan.pieces[number], place)
        if record is None or record["retry"]:
            missing.append(number)
        else:
            tally.add(record)
            yield record["weight"]
    for record in parallel(ShardWriter(plan, place), missing, workers):
        tally.add(record)
        yield record["weight"]


def _finished(piece: Any, place: Place) -> Optional[dict[str, Any]]:
    """The record of a piece whose shards are there."""
    try:
        record = json.loads(place.record(piece).read_text())
    except FileNotFoundError:
        return None
    if "retry" not in record:  # of an older version
        return None
    for info in record["shards"]:
        path = place.folder(piece.split) / info["raw_data"]["basename"]
        if not path.is_file() or path.stat().st_size != info["raw_data"]["bytes"]:
            return None
    return record


class _Tally:
    """Counts images and bad ones. total: the weight of all pieces; from it a stream's images are estimated."""

    def __init__(self, place: Place, total: int, max_bad: float) -> None:
        self._place, self._total, self._max_bad = place, total, max_bad
        self._weight, self._images, self._lost, self._bad = 0, 0, 0, []

    def add(self, record: dict[str, Any]) -> None:
        """Count a piece in. UserError if that makes too many bad images."""
        self._weight += record["weight"]
        self._images += record["images"]
        self._lost += sum(images for _, _, images in record["bad"])
        self._bad += record["bad"]
        expected = round(self._images * self._total / self._weight)
        if record["bad"] and self._lost > self._max_bad * expected:
            _publish_quarantine(self._place, self._bad)
            first = "; ".join(f"{name}: {reason}" for name, reason, _ in self._bad[:3])
            raise UserError(
                f"{self._lost} of {expected} images cannot be read, more than --max-bad {self._max_bad:g} allows: "
                f"{first}; all so far are in {self._place.out / self._place.quarantine}"
            )


def _finish(plan: AnyPlan, place: Place, numbers: Sequence[int]) -> None:
    """Put the records together, and only then let index.json appear. Doing it again changes nothing."""
    bad, left_out, highest, samples = [], Counter(), -1, Counter()
    for split, record in _records(plan, place, numbers):
        bad += record["bad"]
        left_out.update(record["left_out"])
        highest = max(highest, record["highest"])
        samples[split] += sum(info["samples"] for info in record["shards"])
    if left_out:
        log.warning("%s: left out: %s", place.title, counted(left_out))
    (place.out / place.quarantine).unlink(missing_ok=True)
    if place.part is None:
        publish_end(place, bad, plan.class_index(highest))
    for split in samples:
        shards = (
            info for owner, record in _records(plan, place, numbers) if owner == split for info in record["shards"]
        )
        publish_index(place, place.folder(split) / INDEX, shards)
    if place.part is not None:
        about = {
            "plan": place.parameters(plan),
            "classes": plan.classes,
            "highest": highest,
            "splits": samples,
            "bad": bad,
        }
        place.publish(place.part.record, about)
    shutil.rmtree(place.work, ignore_errors=True)  # NFS keeps a name for the lock while it is open


def _records(plan: AnyPlan, place: Place, numbers: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number in numbers:
        piece = plan.pieces[number]
        yield piece.split, json.loads(place.record(piece).read_text())


def publish_end(place: Place, bad: Iterable[Sequence[Any]], classes: Mapping[str, int]) -> None:
    """Write what lies beside the shards of all splits: the list of bad images, if there are any, and the classes."""
    first = next(bad := iter(bad), None)
    if first is not None:
        _publish_quarantine(place, itertools.chain([first], bad))
    place.publish(CLASSES, dict(classes))


def _publish_quarantine(place: Place, bad: Iterable[Sequence[Any]]) -> None:
    with open(place.work / "publish", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "reason"), *(entry[:2] for entry in bad)])
    os.replace(place.work / "publish", place.out / place.quarantine)


def publish_index(place: Place, path: Path, shards: Iterable[Mapping[str, Any]]) -> None:
    """Write an index of streaming's, whose shards are never all in memory."""

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.write('{\n  "version": 2,\n  "shards": [')
            for number, info in enumerate(shards):
                file.write((",\n" if number else "\n") + textwrap.indent(json.dumps(info, indent=2), "    "))
            file.write("\n  ]\n}\n")

    write_whole(place.work / "publish", write)
    os.replace(place.work / "publish", path)


# ---- parts


def read_part(place: Place) -> dict[str, Any]:
    """What a part that is done says of itself. FileNotFoundError if it is not done, UserError if it cannot be read."""
    path = place.out / place.part.record
    try:
        about = json.loads(read_regular(path))
        if not about.keys() >= {"plan", "classes", "highest", "splits", "bad"} or not about["splits"].keys() <= {
            WHOLE,
            *SPLITS,
        }:
            raise ValueError("it is no record of a part")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}; remove it and run {place.command} again") from None
    return about


def read_part_index(place: Place, split: str) -> list[dict[str, Any]]:
    """The shards of a split of a part that is done. UserError if the index is not there or is none."""
    path = place.folder(split) / INDEX
    try:
        return json.loads(read_regular(path))["shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r:.200}; run {place.command} again") from None


def check_part(place: Place, about: Mapping[str, Any]) -> None:
    """UserError unless all shards of a part that is done are there and have their sizes."""
    for split, samples in about["splits"].items():
        folder, shards = place.folder(split), read_part_index(place, split)
        with os.scandir(folder) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        for info in shards:
            name, size = info["raw_data"]["basename"], info["raw_data"]["bytes"]
            if sizes.get(name) != size:
                found = f"has {sizes[name]} bytes where {INDEX} says {size}" if name in sizes else "is missing"
                raise UserError(f"{folder / name} {found}: run {place.command} again")
        listed = sum(info["samples"] for info in shards)
        if listed != samples:
            raise UserError(f"{folder / INDEX} lists {listed} images, not {samples}: run {place.command} again")
