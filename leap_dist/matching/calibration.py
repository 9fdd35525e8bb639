"""Where a curriculum starts: the teacher block that an untrained student scores highest on (LEAP, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leap_dist.matching.score import Evidence
from leap_dist.models import Features
from leap_dist.runtime.host_copy import HostCopy


class Calibration:
    """Finds the 1-indexed block with the highest score over what it is shown, the shallowest of equals.

    over_ranks: from losses and evidence to mean losses and score of all ranks. A block whose score is not finite is
    never chosen before one whose score is.
    """

    def __init__(self, engine: Any, over_ranks: Callable[[Tensor, Evidence], tuple[Tensor, Tensor]]) -> None:
        self._engine = engine
        self._over_ranks = over_ranks
        self._evidence: list[Evidence] = []

    @torch.no_grad()
    def show(self, images: Tensor, targets: list[Features]) -> None:
        """Images (B, 3, H, W) with the features of every block to choose from. Collective at ZeRO stage 3."""
        self._engine.eval()
        found = self._engine(images, targets, True).evidence
        known = self._evidence
        self._evidence = [a.merged(b) for a, b in zip(known, found, strict=True)] if known else found
        self._engine.train()

    @torch.no_grad()
    def scores(self) -> list[float]:
        """The untrained student's score on each block, the shallowest first. Collective."""
        found = [self._over_ranks(item.tensors[0].new_empty(0), item)[1] for item in self._evidence]
        return HostCopy(torch.stack(found)).read()

    def best(self) -> int:
        """The block. Collective."""
        scores = self.scores()
        return 1 + max(range(len(scores)), key=lambda i: scores[i] if math.isfinite(scores[i]) else -math.inf)
