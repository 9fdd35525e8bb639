"""Is the data of a run fit to be read? Asked before anything is built."""

from __future__ import annotations

from leap_dist.config import DIGITS, DataConfig
from leap_dist.data.shards import INDEX, read_index
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, on_first


def check_sources(config: DataConfig, world: World) -> None:
    """Check the sets of a run, on one rank of each node, before anything is built. Collective.

    All that is checked when a set is opened is checked here: models are built first, and `data.val` may not be opened
    again before the last step, too late to hear that it cannot be. With `data.val` both need labels, which kNN and
    linear probe are about. UserError, on every rank, at the first fault.
    """

    def check() -> None:
        from leap_dist.data.store import prepare  # 3 s to import

        for key, source in (("data.train", config.train), ("data.val", config.val)):
            if source is None or source == DIGITS:
                continue
            folder = prepare(source, config)
            labelled = all("label" in shard["column_names"] for shard in read_index(folder))
            if config.val is not None and not labelled:
                raise UserError(
                    f"{key}={source}: its shards have no labels, says {folder / INDEX}, and evaluation needs them; "
                    "set data.val=null"
                )

    on_first(check, world)
