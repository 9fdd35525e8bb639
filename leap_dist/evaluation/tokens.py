"""Which of a model's tokens are judged: the class token, the mean patch token, or both side by side.

LEAP's scripts judge the class token by default, this project's first runs judged the patches. Neither is right for all
models: a student that matches patches may have a weak class token, and DINOv2's is its best single one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

from leap_dist.evaluation.features import FeatureSet
from leap_dist.models import Features

CLS, PATCH, BOTH = "cls", "patch", "cls_patch"
log = logging.getLogger(__name__)
KINDS = {CLS: "class token", PATCH: "patches", BOTH: "both"}  # in the words of a table


class Pooling:
    """A model as a map from images to the one vector an image that all kinds of features are columns of.

    Args:
        model: images (B,3,H,W) to the tokens of the last block.
    """

    def __init__(self, model: Callable[[Tensor], Features]) -> None:
        self._model = model
        self._cls_width: Optional[int] = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) -> (B, D), float32: the class token, where there is one, and behind it the mean patch."""
        found = self._model(images)
        parts = [found.patch.float().mean(1)]
        if found.cls is not None:
            parts.insert(0, found.cls.float())
        self._cls_width = parts[0].shape[1] if len(parts) > 1 else 0
        return torch.cat(parts, 1)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that the model has, after its first call."""
        return (CLS, PATCH, BOTH) if self._cls_width else (PATCH,)

    def chosen(self, wanted: Sequence[str], who: str) -> list[str]:
        """Those of `wanted` that the model has; its patches, with a word, if it has none. who: the model, for that.

        No error: a run hears of it at its end, when the model has been trained.
        """
        found = [kind for kind in self.kinds if kind in wanted]
        if not found:
            log.warning("%s has no class token and is judged by its patches", who)
        return found or [PATCH]

    def of(self, kind: str, whole: FeatureSet) -> FeatureSet:
        """The columns of one kind of features in what `__call__` gave of a whole set."""
        columns = {CLS: slice(0, self._cls_width), PATCH: slice(self._cls_width, None), BOTH: slice(None)}[kind]
        return whole._replace(features=whole.features[:, columns])
