"""Weighted nearest-neighbour classification (Wu et al. 2018, as in DINO's evaluation)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from leap_dist.evaluation.features import FeatureSet

TEMPERATURE = 0.07
CHUNK = 1024  # validation rows at a time: 1024 x 1.28M similarities are 5 GB in float32
TOP = 5


@torch.no_grad()
def knn_ranking(train: FeatureSet, features: Tensor, k: int, device: torch.device) -> Tensor:
    """The five likeliest classes (M, up to 5) of each row of `features` (M, D), likeliest first.

    The `k` nearest by cosine vote with weight exp(cosine / 0.07). A class without a vote is never among them: -1.
    """
    bank = _unit(train.features, device)
    classes, labels = train.labels.to(device).unique(return_inverse=True)  # labels may be as large as they like
    ranked = []
    for rows in features.split(CHUNK):
        cosine, near = (_unit(rows, device) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(rows), len(classes), device=device)
        votes.scatter_add_(1, labels[near], (cosine / TEMPERATURE).exp())
        weight, best = votes.topk(min(TOP, len(classes)), dim=1)
        ranked.append(classes[best].where(weight > 0, -1).cpu())
    return torch.cat(ranked)


@torch.no_grad()
def nearest(train: FeatureSet, features: Tensor, k: int, device: torch.device) -> Tensor:
    """Rows of `train` that are nearest by cosine to each of a few `features` (M, D): (M, up to k), nearest first."""
    similar = _unit(features, device) @ _unit(train.features, device).T
    return similar.topk(min(k, len(train.ids)), dim=1).indices.cpu()


def _unit(features: Tensor, device: torch.device) -> Tensor:
    return F.normalize(features.to(device), dim=1)


def knn_accuracy(train: FeatureSet, val: FeatureSet, k: int, device: torch.device) -> tuple[float, float]:
    """Share of `val` whose class its `k` nearest training samples give first, and among the first five; 0 to 1."""
    right = knn_ranking(train, val.features, k, device) == val.labels[:, None]
    return right[:, 0].double().mean().item(), right.any(1).double().mean().item()
