"""What `evaluation.protocol` stands for wherever another option of the evaluation is null."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from leap_dist.config import EvaluationConfig
from leap_dist.evaluation.probe import Recipe
from leap_dist.evaluation.tokens import BOTH, CLS, PATCH

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Protocol:
    """How features are judged.

    features: kinds of them, as far as a model has them; train_images: as many of `data.train` at most; None = all.
    bicubic: how images are resized, else bilinearly.
    best_epoch: whether the probe's best epoch is reported beside its last.
    """

    features: tuple[str, ...]
    probe: Recipe
    train_images: Optional[int]
    knn_k: int
    bicubic: bool
    best_epoch: bool


def protocol_of(options: EvaluationConfig) -> Protocol:
    """The protocol with what the user set in its place."""
    leap = options.protocol == "leap"
    train_images = (None if leap else 50_000) if options.max_train_images is None else options.max_train_images or None
    rates = ((0.1,) if leap else RATES) if options.probe_lrs is None else options.probe_lrs
    return Protocol(
        features=tuple(options.features or ((CLS,) if leap else (CLS, PATCH, BOTH))),
        probe=Recipe(options.probe_epochs, tuple(rates), "epoch" if leap else "step"),
        train_images=train_images,
        knn_k=options.knn_k,
        bicubic=options.interpolation == "bicubic",
        best_epoch=leap,
    )
