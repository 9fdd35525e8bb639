"""Parameters that are not trained: in a checkpoint by themselves, and only they."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from leap_dist.runtime.frozen import load_frozen, save_frozen
from stubs import ONE


def net(value: float) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3))
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    module[1].requires_grad_(False)
    return module


def test_they_come_back_and_the_trained_stay_as_they_are(tmp_path: Path) -> None:
    save_frozen(net(1.0), tmp_path, ONE)
    load_frozen(module := net(2.0), tmp_path, ONE)
    assert {name: set(p.flatten().tolist()) for name, p in module.named_parameters()} == {
        "0.weight": {2.0}, "1.weight": {1.0}, "1.bias": {1.0}
    }  # fmt: skip
    assert not module[1].weight.requires_grad


def test_without_any_and_without_a_file_nothing_happens(tmp_path: Path) -> None:
    load_frozen(module := net(2.0), tmp_path, ONE)  # of an older version
    save_frozen(module.requires_grad_(True), tmp_path, ONE)
    assert not list(tmp_path.iterdir()) and torch.equal(module[1].bias, torch.full((3,), 2.0))
