"""What a piece of work asks of a device: kernels launched, and values that the host waits for.

On a GPU the driver's own calls are counted. Without one the operations are, as torch's profiler records them: each that
has a kernel of its own counts once, whatever it calls inside; a composite one counts as what it is made of. Views,
allocations and other bookkeeping launch nothing. Of compiled code each generated kernel counts once, and each library
call. So the count on a CPU is that of a GPU but for operations which a GPU takes in several kernels (a reduction to a
mean, an update of a hundred tensors), and for those that choose another way there (the matching op).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch.profiler import ProfilerActivity, profile

OTHER = "other"  # work outside all named ranges
_DRIVER = re.compile(r"(cuda|cu|hip)(Extension)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch|Memcpy|Memset)")
_WAITS = re.compile(r"(cuda|hip)(StreamSynchronize|DeviceSynchronize|EventSynchronize)")
_COMPILED = re.compile(r"(graph_\d+_)?(cpp|triton)_.*(fused|kernel|tem)")  # Inductor's kernels, `enable_kernel_profile`
# Make or describe memory and compute nothing.
_BOOKKEEPING = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_", "resize_as_",
    "set_", "set_data", "is_pinned", "record_stream", "resolve_conj", "resolve_neg", "result_type", "can_cast",
    "_unsafe_view", "is_same_size", "sym_size", "sym_stride", "sym_numel", "_has_compatible_shallow_copy_type",
    "_local_scalar_dense",
}  # fmt: skip
# One kernel to a GPU; on a CPU they are registered as made of others.
_WHOLE = ("copy_", "convolution", "convolution_backward", "_foreach_", "_fused_")
# On a GPU the host has their result only when the device has come to it.
_READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave",
}  # fmt: skip


@dataclass
class Counts:
    """launches, reads: by the named range that they lie in, the innermost of those asked for.

    Without a GPU no reads are counted outside the ranges: there values may have been the host's all along.
    device_ms: milliseconds in which a GPU worked on anything; None without one.
    """

    launches: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    device_ms: Optional[float] = None


@contextmanager
def counted(ranges: Iterable[str] = ()) -> Iterator[Counts]:
    """Counts of the body, complete when it is over. ranges: names of `record_function` by which to tell them apart.

    Compiled code shows its kernels on a CPU only where it was compiled inside `showing_kernels`.
    """
    counts, names = Counts(), frozenset(ranges)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as recorder:
        yield counts
    events = recorder.events()
    by_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    on_gpu = len(by_host) < len(events)
    for event in by_host:
        if event.cpu_parent is None:
            (_count_calls if on_gpu else _count_operations)(event, OTHER, names, counts)
    if on_gpu:
        spans = [event.time_range for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        counts.device_ms = covered([(span.start, span.end) for span in spans]) / 1e3


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line spans cover, (begin, end), where they overlap once."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total


@contextmanager
def showing_kernels() -> Iterator[None]:
    """What is compiled in the body for a CPU tells the profiler of each of its kernels."""
    from torch._inductor import config  # a second to import

    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


def _count_operations(event: Any, where: str, names: frozenset[str], counts: Counts) -> None:
    name = event.name.removeprefix("aten::")
    where = event.name if event.name in names else where
    if _COMPILED.match(event.name):
        counts.launches[where] += 1
        return
    if event.name.startswith("aten::"):
        if name in _READS and where != OTHER:
            counts.reads[where] += 1
        if _has_kernel(event.name):
            counts.launches[where] += 1
            return
    for child in event.cpu_children:
        _count_operations(child, where, names, counts)


def _count_calls(event: Any, where: str, names: frozenset[str], counts: Counts) -> None:
    where = event.name if event.name in names else where
    counts.launches[where] += bool(_DRIVER.match(event.name))
    counts.reads[where] += bool(_WAITS.match(event.name))
    for child in event.cpu_children:
        _count_calls(child, where, names, counts)


@functools.cache
def _has_kernel(name: str) -> bool:
    """Whether an operation is one kernel to a device: not a view, not made of others, not bookkeeping."""
    bare = name.removeprefix("aten::")
    if bare in _BOOKKEEPING:
        return False
    if bare in _WHOLE or bare.startswith(_WHOLE[-2:]):
        return True
    packet = getattr(torch.ops.aten, bare, None)
    names = () if packet is None else packet.overloads()
    overloads = [overload for overload in (getattr(packet, name) for name in names) if _is_dispatched(overload)]
    if any(_is_view(overload._schema) for overload in overloads):
        return False
    return any(overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU) for overload in overloads)


def _is_dispatched(overload: Any) -> bool:
    """Whether an operation is more than a name to TorchScript."""
    return torch._C._dispatch_has_kernel(overload.name())


def _is_view(schema: Any) -> bool:
    """Whether what it returns is memory that it was given, and did not write."""
    aliases = (result.alias_info for result in schema.returns)
    return any(alias is not None and not alias.is_write for alias in aliases)
