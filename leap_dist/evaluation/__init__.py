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
from leap_dist.evaluation.protocol import protocol_of
from leap_dist.evaluation.tokens import KINDS, Pooling

__all__ = ["KINDS", "FeatureSet", "HeldOut", "Pooling", "Validation", "evaluate", "protocol_of"]


def evaluate(
    train: FeatureSet, val: FeatureSet, config: EvaluationConfig, *, device: torch.device, seed: int = 0
) -> dict[str, float]:
    """Accuracy on `val`, 0 to 1, of kNN and of a linear probe that know `train`, by the config's protocol.

    Returns knn, knn_top5, probe, probe_top5, probe_lr (the rate that the probe chose) and, by `protocol=leap`,
    probe_best_epoch (the best top-1 of any epoch, which is optimistic).

    Raises:
        UserError: features that are not finite.
    """
    check_finite(train, val)
    protocol = protocol_of(config)
    knn, knn_top5 = knn_accuracy(train, val, protocol.knn_k, device)
    probe = probe_accuracy(train, val, protocol.probe, seed=seed, device=device, watch=protocol.best_epoch)
    found = {
        "knn": knn,
        "knn_top5": knn_top5,
        "probe": probe.top1,
        "probe_top5": probe.top5,
        "probe_lr": probe.rate,
    }
    return found if probe.best_epoch is None else found | {"probe_best_epoch": probe.best_epoch}
