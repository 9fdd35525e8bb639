"""How good frozen features are: nearest neighbours and a linear probe, at the end of a run and between its epochs.

Nothing here trains what it judges; what tokens look like is in analysis/.
"""

from __future__ import annotations

import torch

from leap_dist.config import EvaluationConfig
from leap_dist.evaluation.features import FeatureSet, check_finite
from leap_dist.evaluation.held_out import HeldOut
from leap_dist.evaluation.knn import knn_accuracy
from leap_dist.evaluation.periodic import Validation
from leap_dist.evaluation.probe import probe_accuracy

__all__ = ["FeatureSet", "HeldOut", "Validation", "evaluate"]


def evaluate(
    train: FeatureSet, val: FeatureSet, config: EvaluationConfig, *, device: torch.device, seed: int = 0
) -> dict[str, float]:
    """Accuracy on `val`, 0 to 1, of kNN ("knn") and of a linear probe ("probe") that know `train`.

    Raises:
        UserError: features that are not finite.
    """
    check_finite(train, val)
    return {
        "knn": knn_accuracy(train, val, config.knn_k, device),
        "probe": probe_accuracy(train, val, epochs=config.probe_epochs, lr=config.probe_lr, seed=seed, device=device),
    }
