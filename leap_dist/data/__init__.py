"""The data room: MDS shards in, normalised batches out, in an order that is a function of (seed, epoch, position).

Nothing here knows a model. What is done to a whole batch on the device is here too: mixup, colours, labels.
"""

from __future__ import annotations

from leap_dist.data.batch import Batch
from leap_dist.data.digits import resolve
from leap_dist.data.faults import BadSamples
from leap_dist.data.feed import Feed
from leap_dist.data.labels import soft_labels
from leap_dist.data.loader import EvalLoader, TrainLoader, build_eval_loader, build_train_loader
from leap_dist.data.mixup import Mix, check_groups, draw_mix
from leap_dist.data.preflight import check_sources
from leap_dist.data.shards import check_shards, write_shards
from leap_dist.data.transforms import eval_transform, train_transform

__all__ = [
    "BadSamples",
    "Batch",
    "EvalLoader",
    "Feed",
    "Mix",
    "TrainLoader",
    "build_eval_loader",
    "build_train_loader",
    "check_groups",
    "check_shards",
    "check_sources",
    "draw_mix",
    "eval_transform",
    "resolve",
    "soft_labels",
    "train_transform",
    "write_shards",
]
