"""Process group and collectives. Every collective of the project goes through this module.

With one process nothing here communicates, so the rest of the code never asks how many ranks there are.
"""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import Any, NamedTuple, Optional, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from leap_dist.errors import UserError

_T = TypeVar("_T")
_LABEL_BYTES, _ROW = 96, 8
ROW_BYTES = _LABEL_BYTES + 8 * _ROW  # of what a rank says of itself at a decision
PATIENCE = timedelta(minutes=30)  # of every group: a first compilation or a slow disk on one rank is no fault
GPUS = "/dev/nvidia[0-9]*"  # a container may show any of them


@dataclass(frozen=True)
class World:
    """Where this process stands.

    rank, size: over all nodes; local_rank, local_size: on this node; device: the one this rank owns.
    control: a gloo group for host-side decisions, so that they never wait in the device's stream (None if size is 1).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that decides, writes and prints."""
        return self.rank == 0


def normalise_environment() -> None:
    """Give `deepspeed`, `torchrun` and plain `python` the same environment variables.

    The deepspeed launcher sets LOCAL_SIZE but not LOCAL_WORLD_SIZE, without which mosaicml-streaming takes
    every rank for a node of its own and dies on the second one.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise UserError(
                "srun started several processes that do not know of each other: start one a node, and let that be "
                "torchrun, as launch_configs/slurm/leap.sbatch does"
            )
        # Port 0: the one process listens where there is room, and so do children that inherit this.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    # gloo listens where the host's name leads, on Ubuntu to the host itself. NCCL also takes patterns, gloo names only.
    interface = os.environ.get("NCCL_SOCKET_IFNAME")
    if interface in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def initialise(backend: Optional[str] = None) -> World:
    """Join the process group through DeepSpeed and return this rank's `World`.

    backend: None: NCCL on CUDA, gloo on CPU. gloo on CUDA lets ranks share a device, slowly.
    """
    normalise_environment()
    import deepspeed  # seconds to import: only once the config is known to be good

    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    check_gpus(local_rank)
    if uses_gpus():
        device, backend = torch.device("cuda", local_rank), backend or "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # Its C++ all-reduce needs a compiler at run time and leaves 69 MB per rank in /dev/shm (DeepSpeed 0.19).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=PATIENCE, verbose=False)
    except dist.DistNetworkError as error:
        raise UserError(_unmet(error)) from error
    size = dist.get_world_size()
    control = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    world = World(dist.get_rank(), size, local_rank, local_size, device, control)
    cores = _own_cores(world)  # on every rank: it is collective, and OMP_NUM_THREADS may be set on some only
    if "OMP_NUM_THREADS" not in os.environ:
        # More threads than cores cost 2-3x in a ViT forward; beside a GPU they cast the blocks that an advance reads.
        torch.set_num_threads(cores)
    return world


def _unmet(error: BaseException) -> str:
    """Why ranks have not found each other, in a line."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in str(error) or "in use" in str(error).lower():
        return (
            f"port {port} is in use on this machine, by another run perhaps: choose another with --master_port "
            "(deepspeed) or --master-port (torchrun)"
        )
    words = " ".join(str(error).partition("Exception raised from")[0].split())[:300]
    return f"rank {os.environ['RANK']} cannot meet the others at {address}:{port} (MASTER_ADDR, MASTER_PORT): {words}"


def device_name(device: torch.device) -> str:
    """The device in words; on CPU with its threads, without which a time means nothing."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def uses_gpus() -> bool:
    """Whether this process is to use CUDA: where there is a GPU, unless DeepSpeed's own variable says otherwise."""
    return torch.cuda.is_available() and not _is_cpu_wanted()


def _is_cpu_wanted() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") == ""


def check_gpus(local_rank: int) -> None:
    """Raise UserError unless this process can have GPU `local_rank`, or its node shows no GPU, or none is wanted."""
    if uses_gpus():
        seen = torch.cuda.device_count()
        if local_rank >= seen:
            raise UserError(
                f"LOCAL_RANK={local_rank}, but this process sees {seen} GPU{'s' * (seen > 1)}: start no more processes "
                "a node than it has GPUs, and let each see all of them (SLURM: no --gpus-per-task, no --gpu-bind)"
            )
    elif glob.glob(GPUS) and not _is_cpu_wanted():
        raise UserError(
            f"this node has a GPU that torch {torch.__version__} cannot use: its CUDA {torch.version.cuda} needs a "
            "newer driver (or install a torch for an older CUDA); DS_ACCELERATOR=cpu trains on the CPU"
        )


def _own_cores(world: World) -> int:
    """This rank's part of the cores it may run on, which other ranks of its host may share. Collective.

    Not all of a machine's cores need be the run's (a cpuset of SLURM or a container), so `os.cpu_count()` is no guide.
    And nothing in a rank itself tells whether what it may run on is the cpuset of all ranks of the node (torchrun, the
    deepspeed launcher) or its own part of it already (srun with a task per rank): so they tell each other.
    """
    host, mine = socket.gethostname(), os.sched_getaffinity(0)
    everyone = gather_objects((host, mine), world)
    return fair_share(mine, [cores for name, cores in everyone if name == host])


def fair_share(mine: set[int], everyones: list[set[int]]) -> int:
    """How many cores are left for one who may use `mine`, if each is divided among those who may use it; at least 1.

    everyones: the cores that each may use, mine among them.
    """
    sharers = Counter(core for cores in everyones for core in cores)
    return max(1, int(sum(Fraction(1, sharers[core]) for core in mine)))


def shutdown() -> None:
    """Leave the process group; safe to call twice or without one."""
    if dist.is_initialized():
        dist.destroy_process_group()


# What gloo, NCCL and torch's store say when the other side is gone, or has not come within the timeout; in lower case.
_LOST = (
    "connection closed by", "connection reset by", "broken pipe", "read error", "nccl async error", "got 0 bytes",
    "remote process exited", "timed out waiting", "collective operation timeout", "likely closed", "wait timeout",
    "communicator was aborted",
)  # fmt: skip
# What they say of faults that have nothing to do with other ranks, and what helps.
_HINTS = (
    (("shared memory", "/dev/shm"), "/dev/shm is too small: df -h /dev/shm; in a container --shm-size or --ipc=host"),
    (("duplicate gpu",), "two ranks use one GPU: start one process a GPU, and let each see all of them"),
    (("out of memory",), "a GPU has no memory left for NCCL's buffers: smaller batches, or another process is on it"),
    (("socket interface", "no route", "unreachable", "connect", "resolve", "bootstrap", "enetunreach", "gloo"),
     "set NCCL_SOCKET_IFNAME to the interface that joins the nodes, as `ip addr` names it"),
    (("nccl", "cuda"), "NCCL_DEBUG=INFO says more; often /dev/shm is too small or NCCL_SOCKET_IFNAME is not set"),
)  # fmt: skip


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has gone, which is not this rank's own fault."""
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)


def hint_of_communication(error: BaseException) -> str:
    """What may help where ranks cannot communicate though none is lost; empty for any other error."""
    text = str(error).lower()
    if not isinstance(error, dist.DistError) and "gloo/" not in text:
        return ""
    return next((hint for words, hint in _HINTS if any(word in text for word in words)), "see below")


@dataclass(frozen=True)
class Pipeline:
    """The group of ranks that share one pipelined teacher. rank, size: in the group; handle: torch's process group."""

    rank: int
    size: int
    handle: Any


def build_pipeline(world: World, size: int, active: Optional[int] = None) -> Pipeline:
    """Cut the ranks into pipelines of `size` neighbours and return this rank's. Collective over all ranks.

    active: only so many ranks of each, from its first on, form a group; the others' handle is not to be used.
    """
    barrier(world)  # with NCCL the wait for a late rank would hold Python's lock, and the heartbeat with it
    length = active or size
    members = (list(range(first, first + length)) for first in range(0, world.size, size))
    groups = [dist.new_group(ranks, timeout=PATIENCE) for ranks in members]
    return Pipeline(world.rank % size, length, groups[world.rank // size])


def own_group(world: World) -> Any:
    """A group of all ranks with a communicator that waits for no other's work; None if alone. Collective."""
    barrier(world)  # see `build_pipeline`
    return dist.new_group(timeout=PATIENCE) if world.size > 1 else None


def be_patient(group: Any) -> None:
    """Give a group that a library has made as long as our own: NCCL's usual 10 minutes are those of a slow advance."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Public from torch 2.12 on.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(PATIENCE, group)


def gather_on_first(tensor: Tensor, pipeline: Pipeline) -> list[Tensor]:
    """Every rank's `tensor`, all of one shape, by rank, on the pipeline's first rank; empty elsewhere."""
    parts = [torch.empty_like(tensor) for _ in range(pipeline.size)] if pipeline.rank == 0 else []
    dist.gather(tensor.contiguous(), parts or None, group=pipeline.handle, group_dst=0)
    return parts


def scatter_from(source: int, parts: list[Tensor], like: Tensor, pipeline: Pipeline) -> Tensor:
    """Part i of the pipeline's rank `source`, on rank i; shaped as `like`, whose values do not matter."""
    mine = torch.empty_like(like)
    dist.scatter(mine, parts or None, group=pipeline.handle, group_src=source)
    return mine


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """All-reduce (sum) `tensor` in place over all ranks and return it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(row: Tensor, world: World) -> Tensor:
    """Stack every rank's 1-D host tensor `row` to (size, len), over the control group. Blocks the host only.

    Rank 0 collects and hands out: gloo's own all_gather passes every row round the ring, 2 (size - 1) waits in a row.
    """
    if world.control is None:
        return row[None]
    rows = collect(row, world)
    table = torch.stack(rows) if rows else row.new_empty(world.size, *row.shape)
    dist.broadcast(table, group_src=0, group=world.control)
    return table


def checked_gather(label: str, row: list[float], world: World) -> Tensor:
    """Every rank's `row` of up to 8 numbers, (size, 8) in float64 with zeros behind, over the control group.

    label: where this rank is, in at most 96 bytes; ranks that meet with different ones would from then on wait for each
    other in different places.

    Raises:
        UserError: they do; on every rank, in the same words.
    """
    if world.control is None:
        return torch.tensor([row + [0.0] * (_ROW - len(row))], dtype=torch.float64)
    said = torch.tensor(list(label.encode().ljust(_LABEL_BYTES)[:_LABEL_BYTES]), dtype=torch.uint8)
    numbers = torch.tensor(row + [0.0] * (_ROW - len(row)), dtype=torch.float64)
    rows = gather_rows(torch.cat([said, numbers.view(torch.uint8)]), world)
    apart = rows_apart(rows)
    if apart.any():
        rank = int(apart.nonzero()[0])
        first, other = (bytes(rows[i, :_LABEL_BYTES].tolist()).decode().rstrip() for i in (0, rank))
        raise UserError(f"ranks drifted apart: rank {rank} is at {other}, rank 0 at {first}")
    return rows[:, _LABEL_BYTES:].contiguous().view(torch.float64)


def rows_apart(rows: Tensor) -> Tensor:
    """Which rows (R, ROW_BYTES) of ranks have another label than rank 0's: (R,) bool."""
    return (rows[:, :_LABEL_BYTES] != rows[0, :_LABEL_BYTES]).any(1)  # at once: rank by rank, 512 take 2 ms


def check_nodes(world: World) -> None:
    """Check that nodes have equally many processes, numbered node by node. Collective.

    Shares of the data and pipelines are laid out by that, by each rank for itself: where it does not hold, some images
    would be trained on twice and others never, and nobody would notice.

    Raises:
        UserError: it does not hold; on every rank, in the same words.
    """
    places = gather_objects((world.local_rank, world.local_size), world)
    sizes = sorted({local_size for _, local_size in places})
    if len(sizes) > 1:
        raise UserError(
            f"nodes have {' and '.join(map(str, sizes))} processes: every node needs the same number "
            "(slots of the hostfile, --nproc-per-node)"
        )
    for rank, (local_rank, local_size) in enumerate(places):
        if local_rank != rank % local_size or world.size % local_size:
            raise UserError(
                f"rank {rank} of {world.size} has LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_size}: ranks must "
                "be numbered node by node, all of the first node before those of the second"
            )


class LostRank(RuntimeError):
    """A rank did not come to the roll call. rank: which."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} did not answer")
        self.rank = rank


class Roll(NamedTuple):
    """Host-side groups for `call_roll`: a timeout in one spoils all of a gloo group's connections, so it takes two."""

    collect: Any
    tell: Any


def build_roll(silence_s: float) -> Roll:
    """Groups that wait `silence_s` at most. Collective over all ranks."""
    patience = timedelta(seconds=silence_s)
    return Roll(
        dist.new_group(backend="gloo", timeout=0.75 * patience), dist.new_group(backend="gloo", timeout=patience)
    )


def call_roll(row: list[int], roll: Roll, world: World) -> list[list[int]]:
    """Every rank's `row` of numbers >= 0, by rank; rank 0 collects them and hands them out.

    Raises:
        LostRank: one did not come in time, or its connections are closed; the same one on all ranks.
    """
    table = torch.full((world.size, len(row)), -1)
    table[world.rank] = torch.tensor(row)
    if world.is_main:
        absent = _collect(table, roll)
        for rank in range(1, world.size):
            if rank != absent:  # a send waits for its receiver
                with contextlib.suppress(RuntimeError):  # another one lost is found at the next call
                    dist.send(table, rank, group=roll.tell)
    else:
        own = table[world.rank].clone()
        with contextlib.suppress(RuntimeError):  # rank 0 has missed another rank already, and is about to tell
            sending = dist.isend(own, 0, group=roll.collect)  # noqa: F841  kept until rank 0 has answered
        try:
            dist.recv(table, 0, group=roll.tell)
        except RuntimeError as error:
            raise LostRank(0) from error
    for rank, answered in enumerate((table[:, 0] >= 0).tolist()):
        if not answered:
            raise LostRank(rank)
    return table.tolist()


def _collect(table: Tensor, roll: Roll) -> Optional[int]:
    """Fill in the rows of all ranks; returns the first that does not send its own, at which this stops."""
    for rank in range(1, len(table)):
        try:
            dist.recv(table[rank], rank, group=roll.collect)
        except RuntimeError:
            table[rank:] = -1
            return rank
    return None


def gather_objects(item: Any, world: World) -> list[Any]:
    """Every rank's picklable `item`, by rank."""
    if world.control is None:
        return [item]
    items: list[Any] = [None] * world.size
    dist.all_gather_object(items, item, group=world.control)
    return items


def collect(tensor: Tensor, world: World) -> list[Tensor]:
    """Every rank's host `tensor`, of one shape on all, by rank, on rank 0; an empty list elsewhere."""
    if world.control is None:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world.size)] if world.is_main else []
    dist.gather(tensor.contiguous(), parts or None, group_dst=0, group=world.control)
    return parts


def collect_objects(item: Any, world: World) -> list[Any]:
    """Every rank's picklable `item`, by rank, on rank 0; an empty list elsewhere."""
    if world.control is None:
        return [item]
    items: list[Any] = [None] * world.size if world.is_main else []
    dist.gather_object(item, items or None, group_dst=0, group=world.control)
    return items


def barrier(world: World) -> None:
    """Wait for every rank (host side)."""
    if world.control is not None:
        dist.barrier(group=world.control)


def on_first(work: Callable[[], _T], world: World) -> _T:
    """Run `work` on the first rank of every node and give its result on rank 0 to all. Collective.

    For checks of what a node's ranks share, such as its files: one of them looks, and all hear of it.

    Raises:
        UserError: on every rank, the one of the first node on which `work` raised it.
    """
    return _told_to_all(work, world.local_rank == 0, world)


def on_main(work: Callable[[], _T], world: World) -> _T:
    """Run `work` on rank 0 and give its result to all. Collective. For what one rank writes.

    Raises:
        UserError: on every rank, if `work` raised it.
    """
    return _told_to_all(work, world.is_main, world)


def _told_to_all(work: Callable[[], _T], chosen: bool, world: World) -> _T:
    result: Optional[_T] = None
    fault: Optional[str] = None
    if chosen:
        try:
            result = work()
        except UserError as error:
            fault = str(error)
    outcomes = gather_objects((result, fault), world)
    for _, found in outcomes:
        if found is not None:
            raise UserError(found)
    return outcomes[0][0]


def join_barrier() -> None:
    """Come to a barrier of all ranks at which the others wait already, on the device's own group."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
