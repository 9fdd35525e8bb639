"""Linear probe on frozen features, by LEAP's protocol: SGD with momentum 0.9, batch 256, cosine to zero.

The accuracy is the last epoch's. The published script keeps the best epoch on the split it reports: optimistic.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from leap_dist.evaluation.features import FeatureSet

BATCH = 256
MOMENTUM = 0.9
MOST_OUTPUTS = 1 << 16  # with larger labels, the classes that occur are numbered anew


def train_probe(
    train: FeatureSet, *, epochs: int, lr: float, seed: int, device: torch.device, classes: int
) -> nn.Linear:
    """A linear classifier (D -> classes) on `device`; initial weights and sample order depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)  # on the host: the same draws on every device
    features, labels = train.features.to(device), train.labels.to(device)
    probe = nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        probe.weight.normal_(std=0.01, generator=generator)
        probe.bias.zero_()
    probe.to(device)
    optimizer = torch.optim.SGD(probe.parameters(), lr=lr, momentum=MOMENTUM)
    steps = epochs * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).to(device).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(probe(features[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return probe


def probe_accuracy(
    train: FeatureSet, val: FeatureSet, *, epochs: int, lr: float, seed: int, device: torch.device
) -> float:
    """Share of `val` that a probe trained on `train` classifies correctly after its last epoch, 0 to 1."""
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    if classes > MOST_OUTPUTS:
        numbers, dense = torch.cat([train.labels, val.labels]).unique(return_inverse=True)
        seen, asked = dense.split([len(train.labels), len(val.labels)])
        train, val, classes = train._replace(labels=seen), val._replace(labels=asked), len(numbers)
    probe = train_probe(train, epochs=epochs, lr=lr, seed=seed, device=device, classes=classes)
    with torch.no_grad():
        predicted = torch.cat([probe(rows.to(device)).argmax(dim=1).cpu() for rows in val.features.split(BATCH)])
    return (predicted == val.labels).double().mean().item()
