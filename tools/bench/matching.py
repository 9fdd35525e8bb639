"""What matching costs the student's step (forward, backward, optimizer), in one run.

A step with loss, CKA and their backward against the same step with nothing but the projector's matrix products.

    python tools/bench/matching.py                             # the demo's shapes
    python tools/bench/matching.py --config launch_configs/vitg14/leap_vitg14_vits14_imagenet1k.yaml --batch 8
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from leap_dist.assembly import build_objective
from leap_dist.benchmarking.harness import interleaved, versions
from leap_dist.config import load
from leap_dist.matching import Objective
from leap_dist.models import Features
from leap_dist.runtime.distributed import device_name
from leap_dist.runtime.optim import build_optimizer
from leap_dist.teacher import describe_teacher

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Command line -> interleaved rounds -> medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "launch_configs" / "demo.yaml")
    parser.add_argument("--batch", type=int, default=32, help="images per micro-batch")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each variant; medians over them")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = steps(options.config, options.batch, device)
    times = interleaved({name: lambda call=call: call for name, call in calls.items()}, device, options.rounds)
    print(f"{device_name(device)}; {versions()}; {options.config.name}, {options.batch} images")
    for name, values in times.items():
        over = statistics.median(mine / bare - 1 for mine, bare in zip(values, times["projector only"], strict=True))
        print(f"{name:24} {statistics.median(values):9.2f} ms   {over:+7.1%} of the step with the projector only")


def steps(path: Path, batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The student's step with each way of using the projector, on random images and targets."""
    config = load(path, ["data.train=digits", "data.val=null"])
    spec = describe_teacher(config.teacher, config.data.image_size)
    objective = build_objective(config, spec).to(device)
    images = torch.randn(batch, 3, config.data.image_size, config.data.image_size, device=device)
    tokens = spec.grid[0] * spec.grid[1]
    target = Features(torch.randn(batch, tokens, spec.dim, device=device), torch.randn(batch, spec.dim, device=device))
    upstream = Features(torch.randn_like(target.patch), torch.randn_like(target.cls))
    optimizer = build_optimizer(config.optim, objective)
    ways = {
        "projector only": lambda: _projected(objective, images, upstream),
        "loss": lambda: objective(images, [target]).loss.backward(),
        "loss and exact CKA": lambda: _scored(objective, images, target),
    }
    return {name: lambda way=way: (way(), optimizer.step(), optimizer.zero_grad()) for name, way in ways.items()}


def _projected(objective: Objective, images: torch.Tensor, upstream: Features) -> None:
    head, view = objective.heads[0], objective.student(images)
    patch = objective._on_teacher_grid(view.patch, upstream)
    projected = [F.linear(tokens, head.weight, head.bias) for tokens in (patch, view.cls)]
    torch.autograd.backward(projected, list(upstream))


def _scored(objective: Objective, images: torch.Tensor, target: Features) -> None:
    match = objective(images, [target], True)
    match.evidence[0].score()
    match.loss.backward()


if __name__ == "__main__":
    main()
