"""The training samples that could not be read: found by any rank, known to all, listed in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, gather_objects, on_first, on_main
from leap_dist.runtime.files import write_text
from leap_dist.runtime.integrity import Damaged, read_lines

NOT_FETCHED = "FetchError: "  # in the reason where a shard did not arrive; see `data.store`


class BadSample(NamedTuple):
    """A sample that cannot be read: its index in the whole set, the file name of its shard, and why."""

    id: int
    shard: str
    reason: str


@dataclass(frozen=True)
class _Line:
    """What is read back of a line."""

    id: int
    shard: str
    reason: str


class BadSamples:
    """A ledger that is the same on all ranks; rank 0 keeps it at `path`, one JSON object a line, over resumes.

    most: distinct samples that may be bad before the run stops. `fresh` holds what this rank has found since the last
    `share`; its length is the count that tells all ranks, with whatever they exchange anyway, to share.
    """

    def __init__(self, path: Path, most: int, world: World) -> None:
        self.path = path
        self.most = most
        self.world = world
        self.fresh: dict[int, BadSample] = {}
        self._known: dict[int, BadSample] = {}

    def __len__(self) -> int:
        """Distinct bad samples that all ranks know of."""
        return len(self._known)

    def reopen(self, resumed: bool) -> None:
        """Take up the list of the run that is continued, or drop one that an abandoned run left. Collective.

        Without the samples whose shards could not be fetched: that was the network, and is tried again.
        """
        self._known = on_first(lambda: self._listed() if resumed else self._dropped(), self.world)

    def _listed(self) -> dict[int, BadSample]:
        if not self.path.exists():
            return {}
        try:
            bad = [BadSample(line["id"], line["shard"], line["reason"]) for line in read_lines(self.path, _Line)]
        except (OSError, Damaged) as error:
            raise UserError(f"{self.path} is not a list of bad samples: {error}; delete it") from None
        return {sample.id: sample for sample in bad if NOT_FETCHED not in sample.reason}

    def _dropped(self) -> dict[int, BadSample]:
        self.path.unlink(missing_ok=True)
        return {}

    def note(self, found: Iterable[BadSample]) -> None:
        """Remember what this rank has met, unless all know of it."""
        self.fresh |= {bad.id: bad for bad in found if bad.id not in self._known}

    def share(self) -> None:
        """Tell all ranks what each has found, and list it. Collective.

        Raises:
            UserError: on every rank, when there are more than may be, or the list cannot be written.
        """
        for found in gather_objects(self.fresh, self.world):
            self._known |= found
        self.fresh = {}
        lines = [json.dumps(self._known[sample_id]._asdict()) for sample_id in sorted(self._known)]
        on_main(lambda: write_text(self.path, "\n".join(lines) + "\n"), self.world)
        if len(self) > self.most:
            raise UserError(
                f"data.max_bad_fraction: {len(self)} training samples cannot be read, at most {self.most} may be; "
                f"they are listed in {self.path}; delete it when the data has been mended"
            )
