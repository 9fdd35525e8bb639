"""What the benchmarks share: interleaved timing, peak memory, the machine's measured peaks, rows and their CSV."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; times in milliseconds, memory in MiB beyond what was allocated before the call."""

    device: str
    versions: str
    shape: str
    precision: str
    name: str
    part: str
    median: float
    p20: float
    p80: float
    memory: float
    tflops: float
    roofline: float


def versions(*more: str) -> str:
    """Versions of torch, triton and `more` packages, of those that are installed."""
    found = [f"torch {torch.__version__}"]
    for name in ("triton", *more):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def interleaved(
    calls: Mapping[str, Callable[[], Callable[[], object]]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of every call, `repeats` times in turn, so that a busy moment of the machine hits all alike.

    Each call is a set-up that returns what is timed; the first two rounds warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 2):
        for name, prepare in calls.items():
            timed = prepare()
            stop = stopwatch(device)
            timed()
            elapsed = stop()
            if i >= 2:
                times[name].append(elapsed)
    return times


def stopwatch(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Starts now; what it returns gives the milliseconds to the end of the device's work up to that call.

    clock: seconds; used on CPU (wall time, or the process' own).
    """
    if device.type != "cuda":
        begin = clock()
        return lambda: (clock() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def stop() -> float:
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    start.record()
    return stop


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return statistics.median(times), deciles[1], deciles[7]


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """MiB allocated at the peak of `call` beyond what was there before."""
    stop = peak_watch(device)
    call()
    return stop()


def peak_watch(device: torch.device) -> Callable[[], float]:
    """Starts now; what it returns gives the MiB allocated at the peak since then beyond what was there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - before) / 2**20
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    recorder.__enter__()

    def stop() -> float:
        recorder.__exit__(None, None, None)
        events = [e for e in recorder.profiler.kineto_results.events() if e.name() == "[memory]"]
        level = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return peak / 2**20

    return stop


def peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine reaches: TFLOP/s of a large square product in `dtype`, and TB/s of a copy."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    big = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(big)
    times = interleaved(
        {"product": lambda: lambda: torch.mm(a, b, out=out), "copy": lambda: lambda: target.copy_(big)}, device, 10
    )
    product, copy = (min(times[name]) * 1e-3 for name in ("product", "copy"))
    return 2 * n**3 / product / 1e12, 2 * big.numel() * 4 / copy / 1e12


def report(rows: list[Row], path: Path | None) -> None:
    """Print the rows as a table, and append them to a CSV file if one is named."""
    first = rows[0]
    print(f"{first.device}; {first.versions}; {first.shape}; {first.precision}")
    print(f"{'':22}{'part':10}{'median ms':>10}{'p20':>9}{'p80':>9}{'MiB':>9}{'TFLOP/s':>9}{'roofline':>9}")
    for row in rows:
        times = "".join(f"{x:9.2f}" for x in (row.p20, row.p80))
        rates = f"{row.tflops:9.2f}{row.roofline:9.0%}" if row.part == "full" else ""
        print(f"{row.name:22}{row.part:10}{row.median:10.2f}{times}{row.memory:9.1f}{rates}")
    if path is None:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
