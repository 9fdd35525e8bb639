"""Is the data of a run fit to be read, and do its sets go together? Asked before anything is built."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np

from leap_dist.config import DIGITS, DataConfig
from leap_dist.data.classes import CLASSES, UNLABELLED, class_number, explain, translation
from leap_dist.data.index import INDEX, read_index
from leap_dist.data.shuffling import key_of, permuted
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, on_first

if TYPE_CHECKING:
    from leap_dist.data.store import ShardStore

LOOK_SECONDS = 0.25  # at the labels of each set: all of a small one, some hundreds of a large one
LOOKS_DRAWN = 1024  # at a time
ENOUGH = 1000  # without any label among so many, a set has none; of a few, a tenth or a hundredth may have one

log = logging.getLogger(__name__)


class Task(NamedTuple):
    """A classifier that trains on the labels: its outputs, set by `option`; 0 = there is none."""

    classes: int
    option: str

    def check(self, label: int, known: Optional[Mapping[str, int]]) -> None:
        """UserError if it cannot be trained on a label, where the set names its classes if they are `known`."""
        if self.classes and not 0 <= label < self.classes:
            raise UserError(
                f"{self.option}={self.classes}: data.train has a sample of label {label}, and the cross-entropy needs "
                f"labels from 0 to {self.classes - 1}"
            )
        if self.classes and known is not None and label not in known.values():
            raise UserError(f"data.train has a sample of label {label}, which its {CLASSES} does not list")


def check_sources(config: DataConfig, world: World, classes: int = 0, *, option: str = "student.num_classes") -> None:
    """Check the sets of a run, on one rank of each node, before anything is built. Collective.

    All that is checked when a set is opened is checked here: models are built first, and `data.val` may not be opened
    again before the last step, too late to hear that it cannot be. With `data.val` both need labels, which kNN and
    linear probe are about, of the same classes.

    classes: outputs of a classifier that trains on the labels, set by `option`; 0 = none.

    Raises:
        UserError: on every rank, the first fault.
    """
    for told in on_first(lambda: _check(config, Task(classes, option)), world):
        if world.is_main:
            log.warning(told)


class Look(NamedTuple):
    """What was seen of a set: labels of samples, and whether these are all of its labels."""

    labels: set[int]
    whole: bool


def _check(config: DataConfig, task: Task) -> list[str]:
    """What is worth saying of sets that pass."""
    from leap_dist.data.store import ShardStore, class_names, prepare  # 3 s to import

    if not isinstance(config.train, str):
        return _check_several(config, task)
    sources = {"data.train": config.train, "data.val": config.val}
    sets = {f"{key}={source}": source for key, source in sources.items() if source and source != DIGITS}
    tasks = {name: task if name.startswith("data.train=") else Task(0, "") for name in sets}
    for name, source in sets.items():
        _check_column(name, prepare(source, config), tasks[name], judged=config.val is not None)
    stores = {name: ShardStore(source, config) for name, source in sets.items()}
    names = {name: class_names(source, config) for name, source in sets.items()}
    joined = len(sets) == 2 and config.val != config.train
    # Where nothing names the classes, their labels are all there is to compare.
    thorough = joined and not any(known is not None for known in names.values())
    seen = {
        name: _look_at_labels(name, store, tasks[name], names[name], thorough)
        for name, store in stores.items()
        if tasks[name].classes or config.val is not None
    }
    for name, known in names.items():
        if tasks[name].classes and known and max(known.values()) >= task.classes:
            raise UserError(f"{task.option}={task.classes}: {name} has {len(known)} classes")
    if len(sets) < 2:
        return []
    told = _told_of_images(*stores.items())
    if joined:
        pair, whose = tuple(names.values()), tuple(names)
        translation(*pair, whose)
        told += filter(None, [explain(*pair, whose)])
        told += _told_of_labels(*seen.items()) if thorough else []
    return told


def _check_several(config: DataConfig, task: Task) -> list[str]:
    """As `_check`, of several sources, which the config allows without `data.val` only."""
    from leap_dist.data.store import prepare

    if task.classes:
        raise UserError(
            f"{task.option}={task.classes}: data.train has several sources, and labels are those of one set"
        )
    for source in config.train:
        prepare(source, config)
    return []


def _check_column(name: str, folder: Path, task: Task, judged: bool) -> None:
    """UserError if a set that needs labels has no column of them."""
    if all("label" in columns.names for columns in read_index(folder).columns):
        return
    if task.classes:
        raise UserError(f"{task.option}={task.classes}: {name} has no labels, says {folder / INDEX}")
    if judged:
        raise UserError(
            f"{name}: its shards have no labels, says {folder / INDEX}, and evaluation needs them; set data.val=null"
        )


def _look_at_labels(
    name: str, store: ShardStore, task: Task, known: Optional[Mapping[str, int]], thorough: bool
) -> Look:
    """Labels of samples all over a set, as many as can be read within LOOK_SECONDS; one is enough unless `thorough`.

    None where shards would have to be fetched. UserError if none of many has a label, or `task` cannot train on one.
    """
    until, looked, labels = time.monotonic() + LOOK_SECONDS, 0, set()
    for sample_id in () if store.fetches else _all_over(store.size):
        if time.monotonic() > until or (labels and not task.classes and not thorough):
            break
        try:
            label = int(store.read(sample_id)["label"])
        except Exception:  # what cannot be read is left out, and counted, later
            continue
        looked += 1
        task.check(label, known)
        if class_number(label) != UNLABELLED:
            labels.add(label)
    if not labels and looked and looked >= min(store.size, ENOUGH):
        raise UserError(
            f"{name}: none of {looked} samples looked at has a label, and evaluation needs them; set data.val=null"
        )
    return Look(labels, looked == store.size)


def _all_over(size: int) -> Iterator[int]:
    """Every sample of a set of `size` once, in an order of no meaning."""
    for begin in range(0, size, LOOKS_DRAWN):
        places = np.arange(begin, min(begin + LOOKS_DRAWN, size))
        yield from permuted(places, np.full(len(places), size), key_of(np.zeros(len(places), np.int64))).tolist()


def _told_of_labels(train: tuple[str, Look], val: tuple[str, Look]) -> list[str]:
    """A line if `val` has labels that no image of `train` has; UserError if it has no others.

    Only where all of `train` was looked at, as it is for sets of which nobody names the classes, if they are small.
    """
    (train_name, ours), (val_name, theirs) = train, val
    foreign = theirs.labels - ours.labels
    if not foreign or not ours.whole:
        return []
    few = ", ".join(map(str, sorted(foreign)[:3])) + (", ..." if len(foreign) > 3 else "")
    said = f"{val_name}: no image of {train_name} has its label{'s' if len(foreign) > 1 else ''} {few}"
    if foreign == theirs.labels:
        raise UserError(f"{said}, nor any other that was seen; make both sets with one {CLASSES}")
    return [f"{said}; such images count as errors"]


def _told_of_images(train: tuple[str, ShardStore], val: tuple[str, ShardStore]) -> list[str]:
    """A line if both sets are the same images, as far as the index tells."""
    if train[1].layout() != val[1].layout() or train[1].contents() != val[1].contents():
        return []
    return [f"{val[0]}: holds the images of {train[0]}, so accuracies are of images that were trained on"]
