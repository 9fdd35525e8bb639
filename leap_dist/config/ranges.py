"""What every number of a run may be: bounds are far above what anybody has used, and below what harms a machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional


class Range(NamedTuple):
    """Numbers from `low` to `high`, each included unless it is open."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """False also for what is no number."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    @property
    def words(self) -> str:
        """As in a complaint and in docs/configuration.md."""
        first = f"above {_digits(self.low)}" if self.low_open else f"at least {_digits(self.low)}"
        last = f"below {_digits(self.high)}" if self.high_open else f"at most {_digits(self.high)}"
        return f"{first}, {last}"


def _digits(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def complaint(key: str, value: Any, ranges: Mapping[str, Range]) -> Optional[str]:
    """What is wrong with the value of an option, a number, several or None; None if it is in its range."""
    several = isinstance(value, (tuple, list))
    numbers = value if several else () if value is None else (value,)
    wanted = ranges[key]
    if all(map(wanted.holds, numbers)):
        return None
    finite = "" if all(map(math.isfinite, numbers)) else "finite, "
    return f"{key}={list(value) if several else value}: must be {finite}{wanted.words}"


_STEPS, _EPOCHS, _IMAGES, _BLOCKS = 10**9, 10**6, 10**9, 1000
_SHARE, _OPEN_SHARE = Range(0, 1), Range(0, 1, high_open=True)

RANGES = {
    "student.image_size": Range(1, 16384),
    "student.reduction": Range(1, 1024),
    "student.ema_decay": _OPEN_SHARE,
    "seed": Range(0, 2**32 - 1),  # numpy's generators take no more
    "epochs": Range(0, _EPOCHS, low_open=True),
    "teacher.stages": Range(1, 2**16),
    "teacher.microbatches": Range(1, 2**20),
    "teacher.memory_budget": Range(0, 10**6, low_open=True),
    "teacher.fp8_bound": Range(-1, 1),
    "student.num_classes": Range(0, 10**6),
    "student.seed": Range(0, 2**32 - 1),
    "objective.feature_weight": Range(0, 10**6),
    "objective.kd_alpha": _SHARE,
    "objective.kd_tau": Range(0, 1000, low_open=True),
    "objective.label_smoothing": _SHARE,
    "objective.cls_weight": Range(0, 10**6),
    "curriculum.block": Range(1, _BLOCKS),
    "curriculum.start": Range(1, _BLOCKS),
    "curriculum.threshold": Range(-1000, 1000),
    "curriculum.ema_alpha": Range(0, 1, low_open=True),
    "curriculum.max_epochs_per_block": Range(1, _EPOCHS),
    "curriculum.snap_to_last_at": Range(1, _BLOCKS),
    "curriculum.last_block_after": Range(1, _EPOCHS),
    "data.predownload": Range(0, 10**8),
    "data.image_size": Range(1, 4096),
    "data.global_batch": Range(1, 2**20),
    "data.workers": Range(0, 256),
    "data.crop_scale": Range(0.0001, 1),
    "data.crop_pct": Range(0.01, 1),
    "data.mixup_alpha": Range(0, 1000, low_open=True),
    "data.cutmix_alpha": Range(0, 1000),
    "data.mixup_group": Range(1, 2**20),
    "data.mean": Range(-1000, 1000),
    "data.std": Range(0.0001, 1000),
    "data.canonical_nodes": Range(1, 2**16),
    "data.max_bad_fraction": _SHARE,
    "data.timeout_s": Range(1, 10**6),
    "optim.lr": Range(0, 10**10, low_open=True),  # beyond it one step overflows fp32, whatever the model
    "optim.batch_reference": Range(1, 2**24),
    "optim.weight_decay": Range(0, 1000),
    "optim.betas": _OPEN_SHARE,
    "optim.momentum": _SHARE,
    "optim.trust_coefficient": Range(0, 1000, low_open=True),
    "optim.warmup_epochs": Range(0, _EPOCHS),
    "optim.final_lr_fraction": _SHARE,
    "engine.accumulation": Range(1, 2**20),
    "engine.silence_s": Range(0, 86_400),
    "engine.clip": Range(0, 10**9),
    "checkpoint.every_epochs": Range(0, _EPOCHS),
    "checkpoint.every_steps": Range(0, _STEPS),
    "checkpoint.keep": Range(1, 10**6),
    "telemetry.every": Range(1, _STEPS),
    "telemetry.spectra_every": Range(0, _STEPS),
    "telemetry.pictures_every": Range(0, _STEPS),
    "telemetry.pictures_foreground": Range(0, 1, low_open=True, high_open=True),
    "telemetry.profile_steps": Range(0, _STEPS),
    "telemetry.peak_tflops": Range(0, 10**6, low_open=True),
    "evaluation.knn_k": Range(1, 10**6),
    "evaluation.probe_epochs": Range(1, 10**5),
    "evaluation.probe_lrs": Range(0, 10**6, low_open=True),
    "evaluation.max_train_images": Range(0, _IMAGES),
    "evaluation.every_epochs": Range(0, _EPOCHS),
    "evaluation.quick_images": Range(1, _IMAGES),
}

# Of the recipe of `tools/train_teacher.py`; what it shares with a run has the run's.
RECIPE_RANGES = {
    "epochs": Range(1, _EPOCHS),
    "seed": RANGES["seed"],
    "classes": Range(1, 10**6),
    "evaluate_every": Range(1, _EPOCHS),
    "clip": Range(0, 10**9, low_open=True),
    "save_minutes": Range(0, 10**6, low_open=True),
    "embed_std": Range(0, 100, low_open=True),
    "init_std": Range(0, 100, low_open=True),
    **{f"{part}_{what}": Range(-100, 100) for part in ("attention", "mlp") for what in ("scale", "growth")},
    "label_smoothing": _OPEN_SHARE,
    "ema_decay": _OPEN_SHARE,
    "mix_prob": _SHARE,
    "layer_decay": Range(0, 1, low_open=True),
}
