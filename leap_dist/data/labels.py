"""Integer labels of the shards as the soft labels that a cross-entropy takes."""

from __future__ import annotations

import torch
from timm.data.mixup import one_hot
from torch import Tensor

from leap_dist.errors import UserError


def soft_labels(
    labels: Tensor, classes: int, smoothing: float, device: torch.device, *, option: str = "student.num_classes"
) -> Tensor:
    """(B,) int64 on the host -> (B, classes) float32 on `device`: 1 - smoothing, spread with smoothing / classes.

    option: what sets `classes`, for the message.

    Raises:
        UserError: a label that is none of the classes; shards without labels have -1.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"{option}={classes}: data.train has a sample of label {low if low < 0 else high}, and the "
            f"cross-entropy needs labels from 0 to {classes - 1} (-1: the shards have none)"
        )
    if device.type == "cuda":  # a copy from pageable memory may make the host wait for the stream
        labels = labels.pin_memory()
    floor = smoothing / classes
    return one_hot(labels.to(device, non_blocking=True), classes, on_value=1 - smoothing + floor, off_value=floor)
