"""The labelled images a run's features are judged by."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from leap_dist.config import Config
from leap_dist.data import EvalLoader, build_eval_loader
from leap_dist.errors import UserError
from leap_dist.evaluation.features import FeatureSet, check_finite, extract, in_step, labelled, merge
from leap_dist.runtime.distributed import World, collect, gather_objects

log = logging.getLogger(__name__)

BATCH = 64  # loader workers hold two each ready, in float32


class HeldOut:
    """Images of `data.train`, which kNN and probe may know, and of `data.val`, on which they are judged.

    Opened by all ranks together; UserError if the shards are not fit to be read.

    Args:
        train_limit, val_limit: as many images at most, evenly strided over the set; None = all.
        bicubic: how images are resized, else bilinearly.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        train_limit: Optional[int],
        val_limit: Optional[int],
        *,
        bicubic: bool = False,
    ) -> None:
        assert config.data.val is not None
        parts = config.teacher.microbatches
        self._batch = -(-BATCH // parts) * parts
        self._world = world
        self._train, self._val = (
            build_eval_loader(
                source,
                config.data,
                batch=self._batch,
                world=world,
                limit=limit,
                numbered_as=config.data.train,
                bicubic=bicubic,
            )
            for source, limit in ((config.data.train, train_limit), (config.data.val, val_limit))
        )
        self._told: set[str] = set()

    def features(
        self, model: Callable[[Tensor], Tensor], whose: str = "the student"
    ) -> Optional[tuple[FeatureSet, FeatureSet]]:
        """Both sets as `model` sees them, images (B,3,H,W) -> features (B,D): on rank 0, None elsewhere. Collective.

        Without the images that have no label. whose: the features are, for messages.

        Raises:
            UserError: some are not finite, or no image of a set has a label; on every rank.
        """
        train, val = self._outputs(model, self._train, whose), self.validation(model, whose)
        if train is None or val is None:
            return None
        self._tell_of_unknown(train, val)
        return train, val

    def validation(self, model: Callable[[Tensor], Tensor], whose: str = "the student") -> Optional[FeatureSet]:
        """The images of `data.val` alone, likewise."""
        return self._outputs(model, self._val, whose)

    def _tell_of_unknown(self, train: FeatureSet, val: FeatureSet) -> None:
        """Say, once, how many images no classifier can get right."""
        unknown = int((~torch.isin(val.labels, train.labels)).sum())
        if unknown:
            self._tell(
                f"{self._val.source}: {unknown} of {len(val.labels)} images have labels that none of "
                f"{len(train.labels)} images of {self._train.source} has, and count as errors"
            )

    def _outputs(self, model: Callable[[Tensor], Tensor], loader: EvalLoader, whose: str) -> Optional[FeatureSet]:
        batches = in_step(loader, self._batch, max(gather_objects(len(loader), self._world)))
        found = extract(model, batches, self._world.device)
        _check_together(found, loader, self._world, whose)
        columns = [collect(column, self._world) for column in found]
        if not self._world.is_main:
            return None
        whole = merge([FeatureSet(*share) for share in zip(*columns, strict=True)])
        return self._with_labels(whole, loader)

    def _with_labels(self, whole: FeatureSet, loader: EvalLoader) -> FeatureSet:
        """What can be judged; says once of each set how many images cannot."""
        known = labelled(whole)
        missing = len(whole.ids) - len(known.ids)
        if missing:
            self._tell(f"{loader.source}: {missing} images have no label of a class and are left out")
        return known

    def _tell(self, line: str) -> None:
        """Log a line, once however often the sets are looked at."""
        if line not in self._told:
            log.warning(line)
            self._told.add(line)


def _check_together(share: FeatureSet, loader: EvalLoader, world: World, whose: str) -> None:
    """Raise UserError on every rank if one has features that are not finite, or none has an image with a label."""
    fault: Optional[str] = None
    try:
        check_finite(share, whose=whose)
    except UserError as error:
        fault = str(error)
    faults, labels = zip(*gather_objects((fault, bool((share.labels >= 0).any())), world), strict=True)
    for found in faults:
        if found is not None:
            raise UserError(found)
    if not any(labels):
        raise UserError(f"{loader.source}: no image has a label, which kNN and linear probe need; set data.val=null")
