"""Put the parts of a set together: one index over the shards of all, which stay where they are."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leap_dist.data.classes import INDEX
from leap_dist.data.sharding import (
    MOST_PARTS,
    QUARANTINE,
    RUN,
    WORK,
    Part,
    Place,
    check_part,
    check_same,
    publish_end,
    publish_index,
    read_part,
    read_part_index,
    sole_writer,
)
from leap_dist.errors import UserError
from leap_dist.runtime.files import read_regular, writing


def merge(out: Path) -> dict[str, int]:
    """Write index.json of every split over all parts in `out`, and what lies beside; return the images of each split.

    In the index a shard is `<part>/shard....mds`, as in the one that streaming's `merge_index` writes. Doing it again
    changes nothing. UserError if a part is not there, not whole, or not of the same plan as the others.
    """
    plan = _plan(out)
    places = [Place(out, Part(number, plan["parts"])) for number in range(1, plan["parts"] + 1)]
    _check_all_there(out, places)
    samples, highest, classes = Counter(), -1, None
    for place in places:
        about = read_part(place)
        check_same(about["plan"], plan, str(out / place.part.record))
        check_part(place, about)
        samples.update(about["splits"])
        highest, classes = max(highest, about["highest"]), about["classes"]
    splits = {split: samples[split] for split in plan["splits"] if samples[split]}
    if not splits:
        raise UserError(f"{out}: no part has an image")
    whole = Place(out)
    with writing(out), sole_writer(whole):
        (out / QUARANTINE).unlink(missing_ok=True)
        numbers = {str(number): number for number in range(highest + 1)}
        publish_end(whole, _bad(places), numbers if classes is None else classes)
        for split in splits:
            publish_index(whole, out / split / INDEX, _shards(places, split))
        shutil.rmtree(out / WORK, ignore_errors=True)
    return splits


def _plan(out: Path) -> dict[str, Any]:
    """What the parts in `out` are made of. UserError if there are none."""
    try:
        plan = json.loads(read_regular(out / RUN))
        parts = plan.get("parts")
    except FileNotFoundError:
        raise UserError(f"{out} has no {RUN}: no part of a set was begun there") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{out / RUN} cannot be read: {error}") from None
    if parts is None:
        raise UserError(f"{out} was not made in parts: there is nothing to merge")
    if type(parts) is not int or not 1 < parts <= MOST_PARTS:
        raise UserError(f"{out / RUN}: {parts!r:.20} is no number of parts")
    return plan


def _check_all_there(out: Path, places: list[Place]) -> None:
    """UserError that names the parts that are not done, or parts that do not belong to the set."""
    wanted = {place.part.record for place in places}
    found = {path.name for path in out.glob("part-*-of-*.json")}
    missing = [str(place.part.number) for place in places if place.part.record not in found]
    if missing:
        more = f", and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{out}: of {len(places)} parts {', '.join(missing[:5])}{more} are not done: run --part "
            f"{missing[0]}/{len(places)}, or copy what it made to {out}"
        )
    if foreign := sorted(found - wanted):
        raise UserError(f"{out / foreign[0]} is none of the {len(places)} parts of this set: remove it")


def _bad(places: list[Place]) -> Iterator[list[Any]]:
    for place in places:
        yield from read_part(place)["bad"]


def _shards(places: list[Place], split: str) -> Iterator[dict[str, Any]]:
    """All shards of a split, their paths as seen from its folder."""
    for place in places:
        if split in read_part(place)["splits"]:
            for info in read_part_index(place, split):
                raw = info["raw_data"]
                yield info | {"raw_data": raw | {"basename": f"{place.part.name}/{raw['basename']}"}}
