"""How fast each runtime takes a student on this machine's CPU, in turns, so that one sitting gives the ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ROUNDS = 9


def images_per_second(models: Mapping[str, Callable[[Tensor], Any]], images: Tensor) -> dict[str, float]:
    """Of each of `models`, from the median of ROUNDS passes over `images`; one pass of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for number in range(ROUNDS + 1):
            for name, model in models.items():
                begin = time.perf_counter()
                model(images)
                if number:  # the first pass warms up
                    times[name].append(time.perf_counter() - begin)
    return {name: len(images) / statistics.median(taken) for name, taken in times.items()}
