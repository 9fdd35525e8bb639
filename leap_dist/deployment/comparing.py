"""How far another runtime's outputs are from torch's, on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leap_dist.deployment.loaded import Distilled
from leap_dist.errors import UserError

Runner = Callable[[Tensor], Mapping[str, np.ndarray]]  # images (B, 3, S, S) float32 to named outputs


@dataclass(frozen=True)
class Difference:
    """Of one output, over all images: largest and mean absolute difference, over the largest absolute value."""

    largest: float
    mean: float


def named_outputs(model: Distilled, images: Tensor) -> dict[str, Tensor]:
    """Outputs by name, without those that the student does not have."""
    with torch.no_grad():
        return {name: value for name, value in model(images)._asdict().items() if value is not None}


def differences(model: Distilled, runner: Runner, batches: Iterable[Tensor]) -> dict[str, Difference]:
    """Of every output of `runner` to torch's. Computed in float64."""
    largest: dict[str, float] = {}
    total: dict[str, float] = {}
    scale: dict[str, float] = {}
    count: dict[str, int] = {}
    for images in batches:
        found = runner(images)
        for name, wanted in named_outputs(model, images).items():
            gap = (torch.from_numpy(np.array(found[name])).double() - wanted.double()).abs()
            largest[name] = max(largest.get(name, 0.0), _number(gap.max()))
            scale[name] = max(scale.get(name, 0.0), wanted.abs().max().item())
            total[name] = total.get(name, 0.0) + gap.sum().item()
            count[name] = count.get(name, 0) + gap.numel()
    return {
        name: Difference(largest[name] / (scale[name] or 1.0), total[name] / count[name] / (scale[name] or 1.0))
        for name in largest
    }


def _number(value: Tensor) -> float:
    """A difference that is no number is the largest there is."""
    return float("inf") if value.isnan() else value.item()


def require_close(found: Mapping[str, Difference], bound: float, what: str) -> None:
    """Raise UserError where an output is further off than `bound`."""
    name, worst = max(found.items(), key=lambda item: item[1].largest)
    if not worst.largest <= bound:
        raise UserError(
            f"{what}: its {name} are {worst.largest:.1e} off torch's, at most {bound:.0e} may be; nothing was written"
        )


def described(found: Mapping[str, Difference]) -> str:
    """A line for every output."""
    return "\n".join(
        f"  {name:<7} largest difference {gap.largest:.1e}, mean {gap.mean:.1e} of the largest value"
        for name, gap in found.items()
    )
