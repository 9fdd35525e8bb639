"""Makes the runs of a sweep's plan, some at a time: each is a process of its own with a log and a lock on it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Optional

from tqdm import tqdm

from leap_dist.config import to_yaml
from leap_dist.config.ranges import Range
from leap_dist.errors import UserError
from leap_dist.runtime.files import lock, write_text, writing
from leap_dist.sweeps.passes import Unit, units
from leap_dist.sweeps.plan import Plan, conflict, result, with_budget
from leap_dist.sweeps.results import write_results

ENTRY = Path(__file__).resolve().parents[1] / "train.py"
MOST_JOBS = Range(1, 1024)
POLL_S = 0.2
SAVE_S = 120.0  # that a run gets to save when the sweep is stopped
PATIENCE_S = 5.0  # between looks at a run that another sweep is making
COMPLAINT = re.compile(r"leap_dist \[rank \d+\]: error: (?!another rank is gone)(.*)")


class Job(NamedTuple):
    """A process that makes one run or a pass of several. begun: by the monotonic clock."""

    unit: Unit
    process: subprocess.Popen[bytes]
    slot: int
    begun: float


class Sweep:
    """Makes those of the `wanted` runs of a plan that are missing, `jobs` at a time.

    failures: run -> why it has not been finished, in a line.
    """

    def __init__(self, plan: Plan, jobs: int, wanted: Collection[str]) -> None:
        self.plan = plan
        self.failures: dict[str, str] = {}
        missing = {name for name in wanted if result(plan.runs[name], plan) is None}
        self._waiting = {name: unit for name, unit in units(plan).items() if missing & {run.name for run in unit.runs}}
        self._finished = len(wanted) - sum(len(unit.runs) for unit in self._waiting.values())
        self._jobs: list[Job] = []
        self._slots = list(range(jobs))
        self._look_again: dict[str, float] = {}  # run that another sweep is making -> when

    def make(self) -> None:
        """Until every run has finished or failed. Interrupted, it lets the running ones save."""
        total = self._finished + sum(len(unit.runs) for unit in self._waiting.values())
        with tqdm(total=total, initial=self._finished, unit="run", dynamic_ncols=True) as bar:
            try:
                while self._waiting or self._jobs:
                    while self._slots and (unit := self._next()):
                        self._begin(unit, bar)
                    for job in [job for job in self._jobs if job.process.poll() is not None]:
                        self._end(job, bar)
                    bar.set_postfix_str(", ".join(job.unit.name for job in self._jobs), refresh=sys.stderr.isatty())
                    time.sleep(POLL_S)
            finally:
                stop(self._jobs)

    def _next(self) -> Optional[Unit]:
        """The first waiting one that may start, no longer waiting."""
        open_units = [*self._waiting.values(), *(job.unit for job in self._jobs)]
        unsettled = {run.name for unit in open_units for run in unit.runs}
        for name, unit in self._waiting.items():
            needed = {needed for run in unit.runs for needed in run.needs()}
            if unsettled.isdisjoint(needed) and self._look_again.get(name, 0) <= time.monotonic():
                return self._waiting.pop(name)
        return None

    def _begin(self, unit: Unit, bar: tqdm) -> None:
        lost = [name for run in unit.runs for name in run.needs() if name in self.failures]
        if lost:
            self._close(unit, f"its epochs depend on {lost[0]}, which failed", bar)
            return
        faults = [fault for run in unit.runs if (fault := conflict(with_budget(run, self.plan)))]
        if faults or all(result(run, self.plan) is not None for run in unit.runs):  # another sweep made it meanwhile
            self._close(unit, faults[0] if faults else None, bar)
            return
        process = launch(unit, self.plan, self._slots[0])
        if process is None:
            self._waiting[unit.name] = unit
            self._look_again[unit.name] = time.monotonic() + PATIENCE_S
        else:
            self._jobs.append(Job(unit, process, self._slots.pop(0), time.monotonic()))

    def _end(self, job: Job, bar: tqdm) -> None:
        self._jobs.remove(job)
        self._slots.append(job.slot)
        bar.write(f"{job.unit.name}: {time.monotonic() - job.begun:.0f} s", file=sys.stderr)
        self._close(job.unit, complaint(job.unit.log, job.process.returncode), bar)

    def _close(self, unit: Unit, fault: Optional[str], bar: tqdm) -> None:
        """The process is over. fault: of those of its runs that have not finished."""
        for run in unit.runs:
            if result(run, self.plan) is None and fault:
                self.failures[run.name] = fault
                bar.write(f"{run.name}: {fault}", file=sys.stderr)
        bar.update(len(unit.runs))
        write_results(self.plan, self.failures)


def launch(unit: Unit, plan: Plan, slot: int) -> Optional[subprocess.Popen[bytes]]:
    """Start it, with its log as its output; None while processes of another sweep still hold that.

    UserError if the disk refuses the log.
    """
    with writing(unit.log.parent):
        return _launched(unit, plan, slot)


def _launched(unit: Unit, plan: Plan, slot: int) -> Optional[subprocess.Popen[bytes]]:
    unit.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The run's processes inherit the lock, and hold it also when the sweep is killed.
        log = lock(unit.log, patience=0, mode="ab")
    except BlockingIOError:
        return None
    with log:
        log.truncate(0)
        write_text(unit.asked, to_yaml(unit.config(plan)))
        return subprocess.Popen(
            [*start_line(plan.launcher, slot), str(ENTRY), "--config", str(unit.asked)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(), start_new_session=True,
        )  # fmt: skip


def start_line(launcher: str, slot: int) -> list[str]:
    """The words of `launcher`, its {port} and {slot} filled in."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [word.replace("{port}", str(port)).replace("{slot}", str(slot)) for word in shlex.split(launcher)]


def environment() -> dict[str, str]:
    """`python`, `deepspeed` and `torchrun` are those of this interpreter."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def check_launcher(launcher: str, jobs: int) -> None:
    """Raise UserError for a program that is not there, one whose jobs would meet on one port, or no jobs."""
    if not MOST_JOBS.holds(jobs):
        raise UserError(f"--jobs={jobs}: must be {MOST_JOBS.words}")
    program = shlex.split(launcher)[0]
    if shutil.which(program, path=environment()["PATH"]) is None:
        raise UserError(f"launcher={launcher}: {program} is not a program here")
    if jobs > 1 and "{port}" not in launcher and ("deepspeed" in launcher or "torchrun" in launcher):
        raise UserError(f"launcher={launcher}: --jobs={jobs} needs a port for each, e.g. --master_port {{port}}")


def complaint(log: Path, status: int) -> str:
    """Why a run ended with `status` and unfinished: the line it says so in, or else its last one."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [found[1] for line in lines if (found := COMPLAINT.search(line))]
    return (told or lines[-1:] or [f"exit status {status}, without a word"])[0]


def stop(jobs: Sequence[Job]) -> None:
    """Let running runs save and leave; end those that take too long.

    A run is over when nobody holds its log any more: the deepspeed launcher ends before its ranks do.
    """
    for job in jobs:
        signal_group(job.process, signal.SIGTERM)
    deadline = time.monotonic() + SAVE_S
    for job in jobs:
        try:
            lock(job.unit.log, deadline - time.monotonic(), mode="a").close()
            job.process.wait(max(0.0, deadline - time.monotonic()))
        except (BlockingIOError, subprocess.TimeoutExpired):
            signal_group(job.process, signal.SIGKILL)


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """To the launcher and all its ranks."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """In this block."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
