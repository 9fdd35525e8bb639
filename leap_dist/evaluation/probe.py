"""Linear probes on frozen features, one for each of several learning rates, trained side by side.

Weights start at zero. SGD with momentum 0.9, batches of 256 in an order drawn anew in each epoch, a cosine to zero, no
weight decay: what LEAP's script does (arXiv 2606.19483). A probe's best rate moves with the width and the scale of the
features, so models are only judged alike if each gets its own. The rate is chosen on a tenth of the training images,
never on what is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Optional

import torch
from torch import Tensor

from leap_dist.evaluation.features import FeatureSet

BATCH = 256
MOMENTUM = 0.9
HELD_BACK = 10  # one training image in so many chooses the rate
MOST_OUTPUTS = 1 << 16  # with larger labels, the classes that occur are numbered anew
CHUNK = 4096  # rows judged at a time
TOP = 5


@dataclass(frozen=True)
class Recipe:
    """How probes are trained. cosine: whether the rate falls after every step or after every epoch."""

    epochs: int
    rates: tuple[float, ...]
    cosine: Literal["step", "epoch"] = "step"


class Probes(NamedTuple):
    """R linear classifiers. weight: (D, R, C); bias: (R, C); rates: of their training."""

    weight: Tensor
    bias: Tensor
    rates: tuple[float, ...]

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, R, C), by one product."""
        return (features @ self.weight.flatten(1)).view(len(features), *self.bias.shape) + self.bias


class ProbeResult(NamedTuple):
    """Accuracies, 0 to 1, after the last epoch, the rate chosen, and the best top-1 of any epoch where asked for."""

    top1: float
    top5: float
    rate: float
    best_epoch: Optional[float]


def train_probes(
    train: FeatureSet,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    classes: int,
    after_epoch: Callable[[Probes], None] = lambda probes: None,
) -> Probes:
    """One probe for each rate of `recipe`, on `device`; the order of samples depends on `seed` alone.

    The gradient of the cross-entropy of a linear classifier is written out: autograd and an optimizer would take longer
    than the arithmetic. A probe that diverges harms no other.
    """
    generator = torch.Generator().manual_seed(seed)  # on the host: the same draws on every device
    features, labels = train.features.to(device), train.labels.to(device)
    rates = torch.tensor(recipe.rates, device=device)[:, None]
    weight = torch.zeros(features.shape[1], len(rates), classes, device=device)
    bias = torch.zeros(len(rates), classes, device=device)
    momenta = torch.zeros_like(weight), torch.zeros_like(bias)
    probes = Probes(weight, bias, recipe.rates)
    per_epoch = math.ceil(len(labels) / BATCH)
    for epoch in range(recipe.epochs):
        for index, rows in enumerate(torch.randperm(len(labels), generator=generator).to(device).split(BATCH)):
            done = epoch / recipe.epochs
            if recipe.cosine == "step":
                done += index / per_epoch / recipe.epochs
            factor = (1 + math.cos(math.pi * done)) / 2
            x = features[rows]
            error = probes.logits(x).softmax(-1)
            error[torch.arange(len(rows), device=device), :, labels[rows]] -= 1
            error /= len(rows)
            gradients = (x.T @ error.flatten(1)).view_as(weight), error.sum(0)
            for parameter, momentum, gradient in zip((weight, bias), momenta, gradients, strict=True):
                momentum.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(rates * momentum, alpha=factor)
        after_epoch(probes)
    return probes


def judge(probes: Probes, asked: FeatureSet, device: torch.device) -> tuple[list[float], list[float]]:
    """Top-1 and top-5 accuracy, 0 to 1, of each probe on `asked`. A probe that diverged is never right."""
    hits = torch.zeros(2, len(probes.rates), dtype=torch.float64)
    for features, labels in zip(asked.features.split(CHUNK), asked.labels.split(CHUNK), strict=True):
        logits = probes.logits(features.to(device))
        sound = logits.isfinite().all(-1).cpu()
        best = logits.topk(min(TOP, logits.shape[-1])).indices.cpu()
        right = (best == labels[:, None, None]) & sound[..., None]
        hits[0] += right[..., 0].sum(0)
        hits[1] += right.any(-1).sum(0)
    top1, top5 = (hits / len(asked.labels)).tolist()
    return top1, top5


def choose_rate(train: FeatureSet, recipe: Recipe, *, seed: int, device: torch.device, classes: int) -> float:
    """The rate whose probe does best on a tenth of `train` that it was not trained on; of equals the smallest.

    The only one there is, without a look, where there is one or where a tenth is not an image.
    """
    count = len(train.labels) // HELD_BACK
    if len(recipe.rates) == 1 or not count:
        return recipe.rates[0]
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    held, rest = (FeatureSet(*(column[rows] for column in train)) for rows in order.split([count, len(order) - count]))
    probes = train_probes(rest, recipe, seed=seed, device=device, classes=classes)
    top1, _ = judge(probes, held, device)
    return min(zip((-share for share in top1), recipe.rates, strict=True))[1]


def fit_probe(
    train: FeatureSet, recipe: Recipe, *, seed: int, device: torch.device, classes: int,
    after_epoch: Callable[[Probes], None] = lambda probes: None,
) -> Probes:  # fmt: skip
    """One probe, at the rate that a tenth of `train` chooses, trained on all of it. after_epoch: sees it grow."""
    rate = choose_rate(train, recipe, seed=seed, device=device, classes=classes)
    alone = Recipe(recipe.epochs, (rate,), recipe.cosine)
    return train_probes(train, alone, seed=seed, device=device, classes=classes, after_epoch=after_epoch)


def probe_accuracy(
    train: FeatureSet, val: FeatureSet, recipe: Recipe, *, seed: int, device: torch.device, watch: bool = False
) -> ProbeResult:
    """How well a probe that knows `train` does on `val`.

    watch: judge every epoch on `val` too, for the best of them. That epoch is chosen by what it is judged on, so it is
    optimistic; it is what LEAP's script reports.
    """
    train, val, classes = _numbered(train, val)
    seen: list[float] = []

    def look(probes: Probes) -> None:
        seen.append(judge(probes, val, device)[0][0])

    options = {"after_epoch": look} if watch else {}
    probe = fit_probe(train, recipe, seed=seed, device=device, classes=classes, **options)
    (top1,), (top5,) = judge(probe, val, device)
    return ProbeResult(top1, top5, probe.rates[0], max(seen) if watch else None)


def _numbered(train: FeatureSet, val: FeatureSet) -> tuple[FeatureSet, FeatureSet, int]:
    """The same with labels that are few enough for outputs, and how many outputs they take."""
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    if classes <= MOST_OUTPUTS:
        return train, val, classes
    numbers, dense = torch.cat([train.labels, val.labels]).unique(return_inverse=True)
    seen, asked = dense.split([len(train.labels), len(val.labels)])
    return train._replace(labels=seen), val._replace(labels=asked), len(numbers)
