"""The labelled images a run's features are judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from torch import Tensor

from leap_dist.config import Config
from leap_dist.data import EvalLoader, build_eval_loader
from leap_dist.errors import UserError
from leap_dist.evaluation.features import FeatureSet, check_finite, extract, in_step, merge
from leap_dist.runtime.distributed import World, collect, gather_objects

BATCH = 64  # loader workers hold two each ready, in float32


class HeldOut:
    """Images of `data.train`, which kNN and probe may know, and of `data.val`, on which they are judged.

    Opened by all ranks together; UserError if the shards are not fit to be read.

    Args:
        train_limit, val_limit: as many images at most, evenly strided over the set; None = all.
    """

    def __init__(self, config: Config, world: World, train_limit: Optional[int], val_limit: Optional[int]) -> None:
        assert config.data.val is not None
        parts = config.teacher.microbatches
        self._batch = -(-BATCH // parts) * parts
        self._world = world
        self._train, self._val = (
            build_eval_loader(source, config.data, batch=self._batch, world=world, limit=limit)
            for source, limit in ((config.data.train, train_limit), (config.data.val, val_limit))
        )

    def features(self, model: Callable[[Tensor], Tensor]) -> Optional[tuple[FeatureSet, FeatureSet]]:
        """Both sets as `model` sees them, images (B,3,H,W) -> features (B,D): on rank 0, None elsewhere. Collective.

        Raises:
            UserError: some are not finite; on every rank.
        """
        train, val = self._outputs(model, self._train), self.validation(model)
        return None if train is None or val is None else (train, val)

    def validation(self, model: Callable[[Tensor], Tensor]) -> Optional[FeatureSet]:
        """The images of `data.val` alone, likewise."""
        return self._outputs(model, self._val)

    def _outputs(self, model: Callable[[Tensor], Tensor], loader: EvalLoader) -> Optional[FeatureSet]:
        batches = in_step(loader, self._batch, max(gather_objects(len(loader), self._world)))
        share = extract(model, batches, self._world.device)
        _check_together(share, self._world)
        columns = [collect(column, self._world) for column in share]
        return merge([FeatureSet(*share) for share in zip(*columns, strict=True)]) if self._world.is_main else None


def _check_together(share: FeatureSet, world: World) -> None:
    """Raise UserError on every rank if one has features that are not finite."""
    fault: Optional[str] = None
    try:
        check_finite(share)
    except UserError as error:
        fault = str(error)
    for found in gather_objects(fault, world):
        if found is not None:
            raise UserError(found)
