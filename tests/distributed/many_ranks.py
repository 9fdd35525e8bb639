"""Hundreds of ranks as threads of one process: what `torch.distributed` gives them, and what it would send."""

from __future__ import annotations

import copy
import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from leap_dist.runtime import distributed
from leap_dist.runtime.distributed import World

_T = TypeVar("_T")
CONTROL = "the control group"


class ManyRanks:
    """Stands in for the module `torch.distributed`, as far as `leap_dist.runtime.distributed` asks it.

    messages, bytes: sent, by collective. What a tree or a ring makes of a collective is not played: a gather is a
    message of every other rank, a broadcast one to every other rank, a sum what each rank puts in.
    silent: ranks that send nothing to who waits for them.
    """

    def __init__(self, size: int, ranks_per_node: int, silent: frozenset[int] = frozenset()) -> None:
        self.size, self.ranks_per_node, self.silent = size, ranks_per_node, silent
        self.messages: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._own = threading.local()
        self._barrier, self._counting = threading.Barrier(size), threading.Lock()
        self._slots: list[Any] = [None] * size
        self._made: Any = None
        self._boxes: dict[tuple[int, int], queue.Queue[Tensor]] = {}

    def run(self, work: Callable[[World], _T]) -> list[_T | Exception]:
        """What `work` gives or raises on every rank, by rank."""
        found: list[_T | Exception] = [RuntimeError("never ran")] * self.size

        def rank(number: int) -> None:
            self._own.rank = number
            node = self.ranks_per_node
            world = World(number, self.size, number % node, node, torch.device("cpu"), CONTROL)
            try:
                found[number] = work(world)
            except Exception as error:
                found[number] = error

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.size

    def all_reduce(self, tensor: Tensor) -> None:
        self._sent("all_reduce", self.size, tensor)
        tensor.copy_(self._everyones(tensor.clone(), lambda parts: torch.stack(parts).sum(0)))

    def gather(self, tensor: Tensor, parts: list[Tensor] | None, *, group_dst: int, group: Any) -> None:
        self._sent("gather", self.size - 1, tensor)
        for part, found in zip(parts or [], self._everyones(tensor), strict=False):
            part.copy_(found)
        self._barrier.wait()

    def broadcast(self, tensor: Tensor, *, group_src: int, group: Any) -> None:
        self._sent("broadcast", self.size - 1, tensor)
        tensor.copy_(self._everyones(tensor.clone())[group_src])

    def all_gather_object(self, items: list[Any], item: Any, *, group: Any) -> None:
        items[:] = copy.deepcopy(self._everyones(item))
        self._barrier.wait()

    def send(self, tensor: Tensor, to: int, *, group: Any) -> None:
        if self._own.rank not in self.silent:
            with self._counting:
                self.messages["send"] += 1
                self.bytes["send"] += tensor.nbytes
            self._box(self._own.rank, to).put(tensor.clone())

    isend = send

    def recv(self, tensor: Tensor, source: int, *, group: Any) -> None:
        if source in self.silent:
            raise RuntimeError("timed out")
        tensor.copy_(self._box(source, self._own.rank).get(timeout=60))

    def _box(self, source: int, to: int) -> queue.Queue[Tensor]:
        return self._boxes.setdefault((source, to), queue.Queue())

    def _everyones(self, mine: Any, made: Callable[[list[Any]], Any] = list) -> Any:
        """What rank 0 makes of everyone's; the same object on all."""
        self._slots[self._own.rank] = mine
        self._barrier.wait()
        if self._own.rank == 0:
            self._made = made(self._slots)
        self._barrier.wait()
        return self._made

    def _sent(self, what: str, messages: int, tensor: Tensor) -> None:
        if self._own.rank == 0:
            self.messages[what] += messages
            self.bytes[what] += messages * tensor.nbytes


@pytest.fixture
def many_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ManyRanks]:
    """Makes a `ManyRanks` that the code under test meets as `torch.distributed`."""

    def made(size: int, ranks_per_node: int = 8, silent: frozenset[int] = frozenset()) -> ManyRanks:
        found = ManyRanks(size, ranks_per_node, silent)
        monkeypatch.setattr(distributed, "dist", found)
        return found

    return made
