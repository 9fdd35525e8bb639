"""512 ranks in one process: who reads what, what is decided, what is sent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from leap_dist.curriculum import Curriculum
from leap_dist.curriculum.coordinator import Coordinator, NonFiniteLoss
from leap_dist.data.order import EpochOrder, Share
from leap_dist.errors import UserError
from leap_dist.matching.cka import linear_cka_of_features
from leap_dist.matching.score import CkaEvidence, over_ranks
from leap_dist.runtime.distributed import LostRank, Roll, World, call_roll, sum_over_ranks
from leap_kernels.feature_match import alignment_moments
from tests.distributed.many_ranks import CONTROL, ManyRanks, many_ranks

__all__ = ["many_ranks"]  # a fixture
RANKS, PER_NODE, WIDTH, TEACHER = 512, 8, 6, 10
NODES = RANKS // PER_NODE
ROW = 96 + 8 * 8  # bytes of what a rank says at a decision: where it is, and eight numbers
Made = Callable[..., ManyRanks]


def world(rank: int) -> World:
    return World(rank, RANKS, rank % PER_NODE, PER_NODE, torch.device("cpu"))


def test_an_epoch_is_read_once_and_every_batch_is_what_one_rank_reads() -> None:
    sizes = np.random.default_rng(0).integers(50, 90, 160)
    order = EpochOrder(sizes, canonical_nodes=NODES, seed=0, epoch=0)
    batch, seen = 2 * RANKS, []
    shares = [Share(1, 2, world(rank)) for rank in range(RANKS)]
    alone = Share(batch, 1, World(0, 1, 0, 1, torch.device("cpu")))
    for step in range(order.size // batch):
        read = [order(step * batch + share.positions(2 * step + i)) for share in shares for i in range(2)]
        assert set(np.concatenate(read)) == set(order(step * batch + alone.positions(step)))
        seen.append(np.concatenate(read))
    assert len(np.unique(np.concatenate(seen))) == len(seen) * batch


def test_a_node_fetches_its_own_shards_and_the_ends_of_two() -> None:
    """All nodes together fetch every shard once, but for those that lie across the border of two nodes."""
    sizes = np.full(6400, 64)
    order = EpochOrder(sizes, canonical_nodes=NODES, seed=0, epoch=0)
    positions = np.arange(order.size)
    place = np.stack([Share(1, 1, world(PER_NODE * node + i)).positions(0) for node in range(NODES) for i in range(8)])
    node_of = np.empty(RANKS, int)
    node_of[place[:, 0]] = np.arange(RANKS) // PER_NODE
    shards = order(positions) // 64
    fetched = [len(np.unique(shards[node_of[positions % RANKS] == node])) for node in range(NODES)]
    assert max(fetched) <= 6400 // NODES + 1
    assert 6400 <= sum(fetched) < 6400 + NODES


def rows(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Tokens of a rank: unlike means, and a student that agrees more from step to step."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    teacher = torch.randn(4, TEACHER, generator=random) + rank % 7
    noise = torch.randn(4, WIDTH, generator=random)
    return teacher[:, :WIDTH] * step / 4 + noise, teacher


def test_all_take_the_decision_that_all_rows_together_call_for(many_ranks: Made) -> None:
    group = many_ranks(RANKS)
    weight, steps = torch.eye(TEACHER, WIDTH), 5

    def work(world: World) -> list[tuple[float, int]]:
        curriculum, said = Curriculum(9, threshold=0.6), []
        coordinator = Coordinator(curriculum, world)
        for step in range(steps):
            evidence = CkaEvidence(alignment_moments(*rows(world.rank, step)), weight)
            loss = torch.tensor([float(world.rank)])
            means, score = over_ranks(loss, evidence, "exact", world, sum_over_ranks)
            assert means.item() == pytest.approx((RANKS - 1) / 2)
            coordinator.decide(step=step, loss=loss.item(), score=score.item(), stop=False)
            said.append((score.item(), curriculum.block))
        return said

    found = group.run(work)
    assert all(said == found[0] for said in found), "ranks differ"
    expected_block = 1
    for step, (score, block) in enumerate(found[0]):
        student, teacher = (
            torch.cat(side).double() for side in zip(*(rows(r, step) for r in range(RANKS)), strict=True)
        )
        truth = linear_cka_of_features(student @ weight.double().T, teacher).item()
        assert score == pytest.approx(truth, abs=1e-5)
        expected_block += truth >= 0.6
        assert block == expected_block
    assert 1 < expected_block < steps  # it stayed, and it moved
    moments = RANKS * (1 + WIDTH + TEACHER) + WIDTH**2 + TEACHER * WIDTH + TEACHER**2
    assert group.bytes == {
        "all_reduce": steps * RANKS * 4 * (1 + moments),
        "gather": steps * (RANKS - 1) * ROW,
        "broadcast": steps * (RANKS - 1) * RANKS * ROW,
    }


def test_a_loss_that_is_not_finite_ends_all_and_names_the_rank(many_ranks: Made) -> None:
    def work(world: World) -> None:
        loss = float("nan") if world.rank == 300 else 1.0
        Coordinator(Curriculum(9), world).decide(step=7, loss=loss, score=0.1, stop=False)

    for error in many_ranks(RANKS).run(work):
        assert isinstance(error, NonFiniteLoss) and str(error) == "non-finite loss on rank 300 at step 7"


def test_ranks_that_drift_apart_are_told_in_the_same_words(many_ranks: Made) -> None:
    def work(world: World) -> None:
        Coordinator(Curriculum(9), world).decide(step=5 + (world.rank == 411), loss=1.0, score=0.1, stop=False)

    said = {str(error) for error in many_ranks(RANKS).run(work) if isinstance(error, UserError)}
    assert said == {"ranks drifted apart: rank 411 is at step 6 on block 1, rank 0 at step 5 on block 1"}


def test_the_roll_call_is_one_letter_there_and_one_back(many_ranks: Made) -> None:
    group = many_ranks(RANKS)
    found = group.run(lambda world: call_roll([world.rank, 7], Roll(CONTROL, CONTROL), world))
    assert all(said == [[rank, 7] for rank in range(RANKS)] for said in found)
    assert group.messages == {"send": 2 * (RANKS - 1)}
    assert group.bytes == {"send": (RANKS - 1) * 16 * (1 + RANKS)}


def test_the_rank_that_is_silent_is_named_on_all_others(many_ranks: Made) -> None:
    group = many_ranks(64, silent=frozenset({37}))
    found = group.run(lambda world: None if world.rank == 37 else call_roll([1], Roll(CONTROL, CONTROL), world))
    for rank, error in enumerate(found):
        assert rank == 37 or (isinstance(error, LostRank) and error.rank == 37)
