"""Is the data of a run fit to be read, and do its sets go together? Asked before anything is built."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Optional

import numpy as np

from leap_dist.config import DIGITS, DataConfig
from leap_dist.data.classes import MOST_CLASSES, explain, translation
from leap_dist.data.shards import INDEX, read_index
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, on_first

if TYPE_CHECKING:
    from leap_dist.data.store import ShardStore

LOOK_SECONDS = 0.25  # at the labels of each set: all of a small one, some hundreds of a large one
ENOUGH = 1000  # without any label among so many, a set has none; of a few, a tenth or a hundredth may have one

log = logging.getLogger(__name__)


def check_sources(config: DataConfig, world: World, classes: int = 0, *, option: str = "student.num_classes") -> None:
    """Check the sets of a run, on one rank of each node, before anything is built. Collective.

    All that is checked when a set is opened is checked here: models are built first, and `data.val` may not be opened
    again before the last step, too late to hear that it cannot be. With `data.val` both need labels, which kNN and
    linear probe are about, of the same classes.

    classes: outputs of a classifier that trains on the labels, set by `option`; 0 = none.

    Raises:
        UserError: on every rank, the first fault.
    """
    told = on_first(lambda: _check(config, classes, option), world)
    if told and world.is_main:
        log.warning(told)


def _check(config: DataConfig, classes: int, option: str) -> Optional[str]:
    """What is worth saying of sets that pass."""
    from leap_dist.data.store import ShardStore, class_names, prepare  # 3 s to import

    sets = {key: source for key, source in (("data.train", config.train), ("data.val", config.val)) if source}
    for key, source in sets.items():
        if source == DIGITS:
            continue
        folder = prepare(source, config)
        unlabelled = any("label" not in shard["column_names"] for shard in read_index(folder))
        trains = classes if key == "data.train" else 0
        if trains and unlabelled:
            raise UserError(f"{option}={classes}: {key}={source} has no labels, says {folder / INDEX}")
        if config.val is not None and unlabelled:
            raise UserError(
                f"{key}={source}: its shards have no labels, says {folder / INDEX}, and evaluation needs them; "
                "set data.val=null"
            )
        if not unlabelled and (trains or config.val is not None):
            _look_at_labels(f"{key}={source}", ShardStore(source, config), trains, option)
    if DIGITS in sets.values():
        return None
    names = {key: class_names(source, config) for key, source in sets.items()}
    known = names["data.train"]
    if classes and known and max(known.values()) >= classes:
        raise UserError(f"{option}={classes}: data.train={config.train} has {len(known)} classes")
    if config.val is None or config.val == config.train:
        return None
    pair = known, names["data.val"]
    told = tuple(f"{key}={source}" for key, source in sets.items())
    translation(*pair, told)
    return explain(*pair, told)


def _look_at_labels(name: str, store: ShardStore, classes: int, option: str) -> None:
    """UserError if none of many samples has a label, or if one of them is none of the classifier's `classes`.

    Evenly over the set, as many as can be read within LOOK_SECONDS. Not where shards would have to be fetched.
    """
    if store.fetches:
        return
    until, seen = time.monotonic() + LOOK_SECONDS, []
    for sample_id in np.random.RandomState(0).permutation(store.size).tolist():
        if time.monotonic() > until:
            break
        try:
            seen.append(int(store.read(sample_id)["label"]))
        except Exception:  # what cannot be read is left out, and counted, later
            continue
        if classes and not 0 <= seen[-1] < classes:
            raise UserError(
                f"{option}={classes}: data.train has a sample of label {seen[-1]}, and the cross-entropy needs labels "
                f"from 0 to {classes - 1}"
            )
        labelled = 0 <= seen[-1] < MOST_CLASSES
        if labelled and not classes:
            break
    enough = len(seen) >= min(store.size, ENOUGH)
    if enough and not any(0 <= label < MOST_CLASSES for label in seen):
        raise UserError(
            f"{name}: none of {len(seen)} samples looked at has a label, and evaluation needs them; set data.val=null"
        )
