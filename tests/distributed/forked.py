"""Ranks forked from a warm process: a run without the seconds in which each rank imports torch and DeepSpeed.

    with Forked(script, arguments, ranks=[...], environment={...}) as run:
        os.kill(run.ranks[1], signal.SIGTERM)
        printed, _ = run.communicate(timeout=60)

A rank is what `python script arguments` is: the script runs as `__main__`, under the interpreter's own exit, with the
environment it is given and no other. Two things differ: modules are there already, and the hashes of texts are the same
on all ranks. Between server and ranks, a process of each run's own does what `torchrun` and `deepspeed` do: a rank that
fails ends the others, first by SIGTERM, and its status is the run's. A test about those launchers needs a real one.

This file is also the server, one for each process that starts runs; it ends with that process, and so do its runs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Optional

# What a run imports in its first seconds, some of it deep inside torch.
WARM = (
    "leap_dist.assembly", "leap_dist.wrapup", "leap_dist.data.streaming", "leap_dist.runtime.heartbeat", "boto3",
    "deepspeed.module_inject", "deepspeed.ops.op_builder.all_ops", "matplotlib.pyplot", "setuptools",
    "sklearn.datasets", "torch._dynamo", "torch.utils.tensorboard",
)  # fmt: skip
GRACE_S = 30.0  # that the others get to leave when a rank has failed, as under torchrun
MESSAGE_BYTES = 2**17


class Forked:
    """A run under way, to be used like a `subprocess.Popen` whose stdout and stderr are one pipe.

    Args:
        script, arguments: of every rank. ranks: for each, what its environment has besides `environment`.

    pid: of the group of all processes of the run. ranks: pids, in order. returncode: as a launcher's, None before the
    end.
    """

    def __init__(
        self, script: Path, arguments: Sequence[str], ranks: list[dict[str, str]], environment: dict[str, str]
    ) -> None:
        self.returncode: Optional[int] = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # read after the end
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        task = {"script": str(script), "arguments": arguments, "environment": environment, "ranks": ranks}
        with theirs:
            descriptors = [theirs.fileno(), self._output.fileno()]
            socket.send_fds(_server(), [json.dumps(task).encode()], descriptors)
        self.pid, *self.ranks = json.loads(self._line.recv(MESSAGE_BYTES))

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self, _kind: Optional[type[BaseException]], _error: Optional[BaseException], _trace: Optional[TracebackType]
    ) -> None:
        self.kill()

    def poll(self) -> Optional[int]:
        """The run's status if it is over."""
        return self._ended(0)

    def wait(self, timeout: Optional[float] = None) -> int:
        """Its status, when it is over. Raises subprocess.TimeoutExpired."""
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("ranks", timeout or 0, self._printed())
        return status

    def communicate(self, timeout: Optional[float] = None) -> tuple[str, None]:
        """`wait`, then all that ranks have printed."""
        self.wait(timeout)
        return self._printed().decode(), None

    def kill(self) -> None:
        """SIGKILL for all of its processes, if it is not over."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    def _ended(self, timeout: Optional[float]) -> Optional[int]:
        if self.returncode is None and wait([self._line], timeout):  # select knows no descriptor above 1023
            said = self._line.recv(MESSAGE_BYTES)
            self.returncode = json.loads(said) if said else -signal.SIGKILL
            self._line.close()
        return self.returncode

    def _printed(self) -> bytes:
        # Not by `read`: ranks write where this one offset stands.
        return os.pread(self._output.fileno(), os.fstat(self._output.fileno()).st_size, 0)


@functools.cache
def _server() -> socket.socket:
    """The way to this process's server, which starts with the first run."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    return ours


def serve(requests: socket.socket) -> Optional[dict[str, Any]]:
    """Fork a run for every request. Returns in the server, when nobody is left to ask: None; in a rank: its task."""
    for module in WARM:
        with contextlib.suppress(ImportError):  # whatever is not there and is needed, the ranks will miss
            importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    gc.collect()
    gc.freeze()  # so that collections of the ranks copy no pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # each run tells its end itself
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 2)
        if not message:
            return None
        if os.fork() == 0:
            requests.close()
            return launch(json.loads(message), socket.socket(fileno=descriptors[0]), descriptors[1])
        for descriptor in descriptors:
            os.close(descriptor)


def launch(task: dict[str, Any], line: socket.socket, output: int) -> dict[str, Any]:
    """Fork the ranks, watch over them and tell their end. Returns in the ranks only: their task."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pids = []
    for own in task["ranks"]:
        pid = os.fork()
        if pid == 0:
            line.close()
            become(task, own, output)
            return task
        pids.append(pid)
    line.send(json.dumps([os.getpid(), *pids]).encode())
    watch(pids, line)


def become(task: dict[str, Any], own: dict[str, str], output: int) -> None:
    """Make this process what a launcher would have started."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(task["environment"] | own)
    sys.argv[:] = [task["script"], *task["arguments"]]
    added = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    del sys.path[0]  # this file's folder
    sys.path[:0] = [str(Path(task["script"]).parent), *(path for path in added if path not in sys.path)]
    # As in every new process: a draw that nobody has seeded must not look as if somebody had.
    random.seed()
    sys.modules["numpy"].random.seed()


def watch(pids: list[int], line: socket.socket) -> NoReturn:
    """Until all ranks have ended; a rank that fails ends the others."""
    running = {os.pidfd_open(pid): pid for pid in pids}
    status, deadline = 0, float("inf")
    while running:
        patience = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        ready = select.select([line, *running], [], [], patience)[0]
        if line in ready:  # nobody waits for this run any more
            os.killpg(0, signal.SIGKILL)
        if not ready:
            end(running, signal.SIGKILL)
            deadline = float("inf")
        for descriptor in ready:
            ended = os.waitstatus_to_exitcode(os.waitpid(running.pop(descriptor), 0)[1])
            os.close(descriptor)
            if ended and not status:
                status, deadline = ended, time.monotonic() + GRACE_S
                end(running, signal.SIGTERM)
    line.send(json.dumps(status).encode())
    os._exit(0)


def end(running: dict[int, int], number: signal.Signals) -> None:
    """Send a signal to ranks that are not waited for yet, so that their pids are still theirs."""
    for pid in running.values():
        os.kill(pid, number)


if __name__ == "__main__":
    rank_task = serve(socket.socket(fileno=int(sys.argv[1])))
    if rank_task is not None:
        runpy.run_path(rank_task["script"], run_name="__main__")
