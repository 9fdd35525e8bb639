"""What the C library does with the memory of freed tensors on the host: keeps it for the next ones, or returns it.

Only glibc can be told; with another C library nothing happens here.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """Have freed tensors make room for new ones, as on a GPU.

    By default glibc hands the end of its heap back after every step, and every tensor above 32 MiB when it is freed;
    the next step faults all those pages in again. In a step of ViT-S/14 -> ViT-T/14 that was 52,000 pages, some 60 of
    1640 ms; with a teacher of ViT-g's width 89,000, some 400 of 6330 ms (a virtual machine, where a fault is dear).
    """
    _call("mallopt", _MMAP_MAX, 0)
    _call("mallopt", _TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Have large tensors leave memory when they are freed.

    By default glibc takes tensors of up to 32 MiB from heaps that it keeps: of a 300 M-parameter teacher split over two
    ranks (579 MiB each), ranks held 0.7 to 2.1 GiB after four passes, and 0.6 GiB after this.
    """
    _call("mallopt", _MMAP_THRESHOLD, 4 * 2**20)


def trim() -> None:
    """Return what is free now."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
