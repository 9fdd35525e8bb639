"""Where a rank stands among the others: what must hold of all together."""

from __future__ import annotations

import pytest
import torch

from leap_dist import distributed
from leap_dist.distributed import World, check_nodes
from leap_dist.errors import UserError

CPU = torch.device("cpu")


def places(*nodes: int) -> list[tuple[int, int]]:
    """(local_rank, local_size) of the ranks of nodes with so many processes, numbered node by node."""
    return [(local_rank, local_size) for local_size in nodes for local_rank in range(local_size)]


@pytest.mark.parametrize("nodes", [(1,), (4,), (1, 1, 1), (3, 3)])
def test_nodes_of_one_size_pass(nodes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    found = places(*nodes)
    monkeypatch.setattr(distributed, "gather_objects", lambda item, world: found)
    for rank, place in enumerate(found):
        check_nodes(World(rank, len(found), *place, CPU))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (places(4, 8), "nodes have 4 and 8 processes: every node needs the same number"),
        (places(8, 4, 2, 4), "nodes have 2 and 4 and 8 processes"),
        # Dealt out to two nodes in turn, as some schedulers do.
        (
            [(0, 2), (0, 2), (1, 2), (1, 2)],
            "rank 1 of 4 has LOCAL_RANK=0 of LOCAL_WORLD_SIZE=2: ranks must be numbered",
        ),
        ([(0, 1), (1, 1)], "rank 1 of 2 has LOCAL_RANK=1 of LOCAL_WORLD_SIZE=1"),  # started without the latter
        ([(0, 2), (1, 2), (0, 2)], "rank 0 of 3 has LOCAL_RANK=0 of LOCAL_WORLD_SIZE=2"),  # one was not started
    ],
)
def test_what_the_layout_of_data_and_pipelines_cannot_hold_for_is_said_by_every_rank(
    found: list[tuple[int, int]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "gather_objects", lambda item, world: found)
    said = set()
    for rank, place in enumerate(found):
        with pytest.raises(UserError, match=message) as caught:
            check_nodes(World(rank, len(found), *place, CPU))
        said.add(str(caught.value))
    assert len(said) == 1 and "\n" not in said.pop()
