"""Where a rank stands among the others: what must hold of all together."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError

from leap_dist.errors import UserError
from leap_dist.runtime import distributed
from leap_dist.runtime.distributed import (
    World,
    check_gpus,
    check_nodes,
    fair_share,
    hint_of_communication,
    is_lost_peer,
    normalise_environment,
)

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


ALL, HALVES = set(range(12)), (set(range(6)), set(range(6, 12)))


@pytest.mark.parametrize(
    ("everyones", "shares"),
    [
        ([ALL], [12]),
        ([ALL] * 2, [6, 6]),
        ([ALL] * 6, [2] * 6),  # in floats 12 / 6 would come out below 2
        ([ALL] * 24, [1] * 24),
        (HALVES, [6, 6]),  # bound to cores of their own: not to be divided again
        ([HALVES[0]] * 3 + [HALVES[1]], [2, 2, 2, 6]),  # three to a socket, and one to the other
        ([ALL, {0}], [11, 1]),
    ],
)
def test_cores_are_divided_among_those_who_may_use_them(everyones: list[set[int]], shares: list[int]) -> None:
    assert [fair_share(mine, everyones) for mine in everyones] == shares


def test_ranks_of_other_hosts_take_no_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [("here", ALL), ("here", ALL), ("there", ALL)]
    monkeypatch.setattr(distributed, "gather_objects", lambda item, world: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: ALL)
    for rank, (host, _) in enumerate(found):
        monkeypatch.setattr(distributed.socket, "gethostname", lambda host=host: host)
        assert distributed._own_cores(World(rank, 3, rank % 2, 2, CPU)) == (6 if host == "here" else 12)


THREADS = """
import os, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from leap_dist.runtime.distributed import initialise, shutdown
torch.set_num_threads(3)
initialise()
shutdown()
print("threads:", torch.get_num_threads())
"""


@pytest.mark.seconds
@pytest.mark.parametrize(("told", "threads"), [(None, 1), ("3", 3)])
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="takes a core to leave out")
def test_a_process_has_no_more_threads_than_cores_it_may_use(told: str | None, threads: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} | ({"OMP_NUM_THREADS": told} if told else {})
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert f"threads: {threads}" in done.stdout.splitlines(), done.stdout + done.stderr


def test_more_processes_than_gpus_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("DS_ACCELERATOR")
    check_gpus(0)
    with pytest.raises(UserError, match=r"LOCAL_RANK=3, but this process sees 1 GPU:.*no --gpus-per-task"):
        check_gpus(3)


@pytest.mark.parametrize(
    ("there", "asked", "refused"),
    [
        (True, {}, True),
        (True, {"CUDA_VISIBLE_DEVICES": ""}, False),
        (True, {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0,1"}, False),  # as DeepSpeed's launcher starts it
        (False, {}, False),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu_unasked(
    there: bool, asked: dict[str, str], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidiactl").touch()
    if there:
        (tmp_path / "nvidia3").touch()
    monkeypatch.setattr(distributed, "GPUS", str(tmp_path / Path(distributed.GPUS).name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="needs a newer driver") if refused else nullcontext():
        check_gpus(0)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `normalise_environment` sees and changes instead of this process's own variables."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", variables)
    return variables


def test_srun_without_torchrun_is_refused(environment: dict[str, str]) -> None:
    environment["SLURM_STEP_NUM_TASKS"] = "8"
    with pytest.raises(UserError, match="do not know of each other"):
        normalise_environment()
    environment |= {"RANK": "3", "LOCAL_RANK": "3", "LOCAL_SIZE": "8"}
    normalise_environment()
    assert environment["LOCAL_WORLD_SIZE"] == "8"


@pytest.mark.parametrize(("nccl", "gloo"), [("lo", "lo"), ("^docker", None), (None, None), ("=no-such", None)])
def test_gloo_takes_the_interface_that_nccl_is_given_by_name(
    nccl: str | None, gloo: str | None, environment: dict[str, str]
) -> None:
    environment |= {} if nccl is None else {"NCCL_SOCKET_IFNAME": nccl}
    normalise_environment()
    assert environment.get("GLOO_SOCKET_IFNAME") == gloo


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:9"), None),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv"), None),
        (DistBackendError("NCCL error: remote process exited or there was a network error"), None),
        (DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"), None),
        (DistNetworkError("failed to recv, got 0 bytes"), None),
        (DistBackendError("NCCL error in: x.cpp:1, unhandled system error. Last error: Error while creating shared "
                          "memory segment /dev/shm/nccl-aB3 (size 9637888)"), "--shm-size"),
        (DistBackendError("NCCL error. Last error: Bootstrap : no socket interface found"), "NCCL_SOCKET_IFNAME"),
        (RuntimeError("[gloo/transport/tcp/device.cc:84] Unable to resolve address"), "NCCL_SOCKET_IFNAME"),
        (DistBackendError("NCCL error: invalid usage. Duplicate GPU detected : rank 1 and 0"), "one process a GPU"),
        (DistBackendError("NCCL error: unhandled cuda error"), "NCCL_DEBUG=INFO"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ""),
        (ValueError("Connection closed by peer"), ""),
    ],
)  # fmt: skip
def test_a_lost_rank_is_told_from_what_ranks_cannot_do(error: Exception, said: str | None) -> None:
    """said: part of the hint; None = a rank is lost."""
    assert is_lost_peer(error) is (said is None)
    if said is not None:
        hint = hint_of_communication(error)
        assert said in hint and bool(said) == bool(hint)
