"""Is the data of a run fit to be read? Asked before anything is built."""

from __future__ import annotations

from pathlib import Path

from leap_dist.config import DIGITS, DataConfig, is_remote
from leap_dist.data.shards import INDEX, check_shards, read_index
from leap_dist.distributed import World, on_first
from leap_dist.errors import UserError


def check_sources(config: DataConfig, world: World) -> None:
    """Check the sets of a run, on one rank of each node, before anything is built. Collective.

    With `data.val` both need labels, which kNN and linear probe are about. A remote one must open. So must `data.val`,
    wherever it is: it may not be opened again before the last step, too late to hear that it cannot be.
    UserError, on every rank, at the first fault.
    """

    def check() -> None:
        for key, source in (("data.train", config.train), ("data.val", config.val)):
            if source is None or source == DIGITS:
                continue
            folder = _checked(source, config, fully=key == "data.val" or is_remote(source))
            labelled = all("label" in shard["column_names"] for shard in read_index(folder))
            if config.val is not None and not labelled:
                raise UserError(
                    f"{key}={source}: its shards have no labels, says {folder / INDEX}, and evaluation needs them; "
                    "set data.val=null"
                )

    on_first(check, world)


def _checked(source: str, config: DataConfig, *, fully: bool) -> Path:
    """The folder that the index of `source` is read from. fully: check all that is checked when it is opened."""
    if not fully:
        check_shards(Path(source))
        return Path(source)
    from leap_dist.data.store import prepare  # 3 s to import

    return prepare(source, config)
