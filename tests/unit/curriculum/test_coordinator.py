"""Rank 0 decides for all; a drift or a non-finite loss ends the run on every rank in the same words."""

from __future__ import annotations

import math
from dataclasses import replace
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from leap_dist.curriculum.coordinator import Coordinator
from leap_dist.curriculum.policy import Curriculum
from leap_dist.errors import UserError
from leap_dist.runtime import distributed
from leap_dist.runtime.distributed import World

ONE = World(0, 1, 0, 1, torch.device("cpu"))


def curriculum(**options: Any) -> Curriculum:
    return Curriculum(4, **{"threshold": 0.8, **options})


def on_ranks(size: int, curricula: list[Curriculum], monkeypatch: pytest.MonkeyPatch, **calls: list) -> list[Any]:
    """Run `decide` on `size` ranks in threads that exchange rows as the control group would."""
    meet, rows, results = Barrier(size), [None] * size, [None] * size

    def gather(row: torch.Tensor, world: World) -> torch.Tensor:
        rows[world.rank] = row
        meet.wait(timeout=10)
        return torch.stack(rows)

    monkeypatch.setattr(distributed, "gather_rows", gather)

    def work(rank: int) -> None:
        own = {name: values[rank] for name, values in calls.items()}
        try:
            results[rank] = Coordinator(curricula[rank], replace(ONE, rank=rank, size=size, control="threads")).decide(
                **own
            )
        except UserError as error:
            results[rank] = str(error)

    threads = [Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return results


def test_one_rank_follows_its_curriculum() -> None:
    coordinator = Coordinator(curriculum(), ONE)
    scores = [0.79, 0.80, 0.81, 0.5, 0.9, 0.95]
    used = []
    for step, score in enumerate(scores):
        used.append(coordinator.curriculum.block)
        assert not coordinator.decide(step=step, loss=1.0, score=score, stop=False).stop
    assert used == [1, 1, 2, 3, 3, 4]


def test_all_ranks_take_rank_0s_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect B3 of the published code: ranks judged their own scores and trained on different blocks."""
    curricula = [curriculum(ema_alpha=0.5) for _ in range(3)]
    results = on_ranks(
        3, curricula, monkeypatch, step=[7] * 3, loss=[1.0] * 3, score=[0.5, 0.99, 3.0], stop=[False, False, True]
    )
    assert all(result == (True, False) for result in results), "one rank was told to stop, and not all do"
    assert [c.state_dict() for c in curricula] == [curricula[0].state_dict()] * 3
    assert curricula[0].ema == 0.25
    results = on_ranks(3, curricula, monkeypatch, step=[8] * 3, loss=[1.0] * 3, score=[2.0, 0, 0], stop=[False] * 3)
    assert all(result == (False, False) for result in results)
    assert [c.block for c in curricula] == [2, 2, 2]


def test_a_non_finite_loss_names_rank_and_step_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    results = on_ranks(
        2,
        [curriculum(), curriculum()],
        monkeypatch,
        step=[41] * 2,
        loss=[1.0, math.nan],
        score=[0.1] * 2,
        stop=[False] * 2,
    )
    assert results == ["non-finite loss on rank 1 at step 41"] * 2


@pytest.mark.parametrize(("steps", "blocks"), [([5, 6], [1, 1]), ([5, 5], [2, 1])])
def test_a_drift_is_an_error_not_a_drift(steps: list[int], blocks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    curricula = [curriculum(start=block) for block in blocks]
    results = on_ranks(2, curricula, monkeypatch, step=steps, loss=[1.0] * 2, score=[0.1] * 2, stop=[False] * 2)
    assert results[0] == results[1]
    assert results[0].startswith(f"ranks drifted apart: rank 1 is at step {steps[1]} on block {blocks[1]}")


def test_an_unscored_step_changes_nothing() -> None:
    coordinator = Coordinator(curriculum(), ONE)
    before = coordinator.curriculum.state_dict()
    assert coordinator.decide(step=0, loss=1.0, score=math.nan, stop=False) == (False, False)
    assert coordinator.curriculum.state_dict() == before


def test_every_rank_hears_that_one_has_met_unreadable_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"step": [3] * 3, "loss": [1.0] * 3, "score": [0.1] * 3, "stop": [False] * 3}
    assert not any(r.bad for r in on_ranks(3, [curriculum() for _ in range(3)], monkeypatch, **calls, bad=[0] * 3))
    assert all(r.bad for r in on_ranks(3, [curriculum() for _ in range(3)], monkeypatch, **calls, bad=[0, 2, 0]))
