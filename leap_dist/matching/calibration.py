"""Where a curriculum starts: the teacher block that an untrained student scores highest on (LEAP, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from leap_dist.matching.score import Evidence
from leap_dist.models import Features
from leap_dist.runtime.host_copy import HostCopy


@torch.no_grad()
def block_scores(
    engine: Any, chunks: Iterable[tuple[Tensor, list[Features]]], score: Callable[[Evidence], Tensor]
) -> list[float]:
    """The untrained student's score on each block, the shallowest first, over all chunks. Collective.

    chunks: images (B, 3, H, W) with the features of every block to choose from. score: of the evidence of all ranks.
    """
    evidence: list[Evidence] = []
    engine.eval()
    for images, targets in chunks:
        found = engine(images, targets, True).evidence
        evidence = [a.merged(b) for a, b in zip(evidence, found, strict=True)] if evidence else found
    scores = HostCopy(torch.stack([score(item) for item in evidence])).read()
    engine.train()
    return scores


def best_block(
    engine: Any, chunks: Iterable[tuple[Tensor, list[Features]]], score: Callable[[Evidence], Tensor]
) -> int:
    """The 1-indexed block with the highest of `block_scores`, the shallowest of equals. Collective.

    A block whose score is not finite is never chosen before one whose score is.
    """
    scores = block_scores(engine, chunks, score)
    return 1 + max(range(len(scores)), key=lambda i: scores[i] if math.isfinite(scores[i]) else -math.inf)
