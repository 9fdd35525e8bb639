"""Running statistics of batch norms: every rank's in a checkpoint, their mean in an export."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leap_dist.runtime import running_stats
from leap_dist.runtime.distributed import World

TWO = World(1, 2, 1, 2, torch.device("cpu"))


def net(mean: float) -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4))
    nn.init.constant_(module[1].running_mean, mean)
    nn.init.constant_(module[1].running_var, 1 + mean)
    return module


def test_a_rank_gets_its_own_back_and_other_numbers_of_ranks_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    everyones = [running_stats.running_stats(net(1.0)), running_stats.running_stats(net(4.0))]
    assert everyones[0].keys() == {"1.running_mean", "1.running_var"}
    running_stats.restore_buffers(module := net(0.0), everyones, TWO)
    assert module[1].running_mean.tolist() == [4.0] * 4 and module[1].running_var.tolist() == [5.0] * 4
    running_stats.restore_buffers(module, everyones, World(0, 1, 0, 1, torch.device("cpu")))
    assert module[1].running_mean.tolist() == [2.5] * 4 and module[1].running_var.tolist() == [3.5] * 4
    monkeypatch.setattr(running_stats, "gather_objects", lambda item, world: [item, everyones[1]])
    means = running_stats.mean_running_stats(net(1.0), TWO)
    assert means["1.running_mean"].tolist() == [2.5] * 4


def test_whatever_else_a_rank_has_comes_back_and_rank_0s_for_another_number_of_ranks() -> None:
    """A counter of batch norm's, and a buffer of a module of one's own; what is not persistent is nobody's business."""

    def counting(count: int) -> nn.Module:
        module = nn.Sequential(nn.BatchNorm1d(2))
        module.register_buffer("seen", torch.tensor([count, -count]))
        module.register_buffer("passing", torch.tensor(count), persistent=False)
        module[0].num_batches_tracked.fill_(count)
        return module

    one = World(0, 1, 0, 1, torch.device("cpu"))
    everyones = [running_stats.all_buffers(counting(count), one)[0] for count in (3, 5)]
    for world, count in ((TWO, 5), (one, 3)):
        running_stats.restore_buffers(module := counting(0), everyones, world)
        assert module.seen.tolist() == [count, -count] and module[0].num_batches_tracked == count
        assert module.passing == 0


def test_nothing_is_gathered_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_stats, "gather_objects", lambda item, world: pytest.fail("a collective"))
    assert running_stats.mean_running_stats(nn.LayerNorm(4), TWO) == {}
    assert running_stats.all_buffers(nn.LayerNorm(4), TWO) == []
