"""Instance retrieval on Revisited Oxford and Paris (Radenović et al. 2018): mean average precision, precision at k.

A query's database images are positives, junk or negatives. Junk is taken out of the ranking, as if it were not there.
Easy: the easy ones are positives, the hard ones junk. Medium: easy and hard are positives. Hard: the hard ones are, the
easy ones junk. Those marked as junk are junk throughout. A query without positives does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

KAPPAS = (1, 5, 10)
CHUNK = 64  # queries at a time: their similarities to a million images are 256 MB


class Truth(NamedTuple):
    """Of one query: numbers of database images."""

    easy: NDArray[np.int64]
    hard: NDArray[np.int64]
    junk: NDArray[np.int64]


SETTINGS = {
    "easy": lambda truth: (truth.easy, np.concatenate([truth.junk, truth.hard])),
    "medium": lambda truth: (np.concatenate([truth.easy, truth.hard]), truth.junk),
    "hard": lambda truth: (truth.hard, np.concatenate([truth.junk, truth.easy])),
}


def summed(scales: Sequence[Tensor]) -> Tensor:
    """Features (N, D) of several scales as one: each L2-normalised, then added (cirtorch's `extract_ms` with msp=1).

    Of one scale they are left as they are; a ranking normalises them all the same.
    """
    return scales[0] if len(scales) == 1 else torch.stack([F.normalize(each, dim=1) for each in scales]).sum(0)


@torch.no_grad()
def rankings(queries: Tensor, database: Tensor, device: torch.device) -> NDArray[np.int64]:
    """Database images (Q, N) by falling cosine to each query, features (Q, D) and (N, D); of equals the first first."""
    bank = F.normalize(database.to(device), dim=1)
    ranked = [
        (F.normalize(rows.to(device), dim=1) @ bank.T).argsort(dim=1, descending=True, stable=True).cpu()
        for rows in queries.split(CHUNK)
    ]
    return torch.cat(ranked).numpy()


def query_scores(
    ranking: NDArray[np.int64], positives: NDArray[np.int64], junk: NDArray[np.int64]
) -> tuple[float, list[float]]:
    """Average precision of one query by the trapezoidal rule, and precision at each of KAPPAS.

    ranking: (N,) all database images, best first. positives: at least one. Precision at k counts only down to the last
    positive where that comes before k, as published.
    """
    kept = ranking[~np.isin(ranking, junk)]
    places = np.flatnonzero(np.isin(kept, positives))  # from 0
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    after = (found + 1) / (places + 1)
    average = float(((before + after) / 2).sum() / len(positives))
    depths = [min(int(places[-1]) + 1, kappa) for kappa in KAPPAS]
    return average, [float((places < depth).sum() / depth) for depth in depths]


def retrieval_scores(ranked: NDArray[np.int64], truths: Sequence[Truth]) -> dict[str, float]:
    """mAP and mP@1, 5, 10 of each setting, 0 to 1, such as medium_map and hard_mp10; queries: how many counted.

    ranked: (Q, N), a row a query. A setting in which no query has positives is absent.
    """
    scores: dict[str, float] = {}
    for name, split in SETTINGS.items():
        found = [
            query_scores(ranking, positives, junk)
            for ranking, (positives, junk) in zip(ranked, map(split, truths), strict=True)
            if len(positives)
        ]
        if found:
            scores[f"{name}_map"] = float(np.mean([average for average, _ in found]))
            precisions = np.mean([precision for _, precision in found], axis=0)
            scores |= {f"{name}_mp{kappa}": float(p) for kappa, p in zip(KAPPAS, precisions, strict=True)}
            scores[f"{name}_queries"] = len(found)
    return scores
