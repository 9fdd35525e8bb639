"""Weighted nearest-neighbour classification (Wu et al. 2018, as in DINO's evaluation)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from leap_dist.evaluation.features import FeatureSet

TEMPERATURE = 0.07
CHUNK = 1024  # validation rows at a time: 1024 x 1.28M similarities are 5 GB in float32


@torch.no_grad()
def knn_predict(train: FeatureSet, features: Tensor, k: int, device: torch.device) -> Tensor:
    """Class (M,) of each row of `features` (M, D): the `k` nearest by cosine vote with weight exp(cosine / 0.07)."""
    bank = F.normalize(train.features.to(device), dim=1)
    classes, labels = train.labels.to(device).unique(return_inverse=True)  # labels may be as large as they like
    predicted = []
    for rows in features.split(CHUNK):
        cosine, nearest = (F.normalize(rows.to(device), dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(rows), len(classes), device=device)
        votes.scatter_add_(1, labels[nearest], (cosine / TEMPERATURE).exp())
        predicted.append(classes[votes.argmax(dim=1)].cpu())
    return torch.cat(predicted)


def knn_accuracy(train: FeatureSet, val: FeatureSet, k: int, device: torch.device) -> float:
    """Share of `val` that its `k` nearest training samples classify correctly, 0 to 1."""
    return (knn_predict(train, val.features, k, device) == val.labels).double().mean().item()
