"""ZeRO checkpoints at another number of ranks, through DeepSpeed's universal format and around its defects (0.19).

Stages 1-3 save one part per rank. DeepSpeed's converter puts the parts of each parameter together again; every rank
then reads its share of the whole.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import shutil
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Optional
from uuid import uuid4

from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, barrier, gather_objects

PREFIX = ".universal-"  # of the temporary folders; no checkpoint is called so
PATIENCE_S = 20.0  # between two signs of life to the ranks that wait: far below any collective's timeout


@contextmanager
def universal_copy(source: Path, saved_ranks: int, folder: Path, world: World) -> Iterator[Path]:
    """The checkpoint `source`, saved by `saved_ranks` ranks, as a universal one under `folder`, while the block lasts.

    Rank 0 converts. The copy has the name of the source, for `engine.load_checkpoint(copy.parent, tag=copy.name)`.
    Collective.

    Raises:
        UserError: on all ranks, if it cannot be converted or a rank does not see the copy.
    """
    conversion = _Conversion(source, saved_ranks, folder) if world.is_main else None
    try:
        yield _finished(conversion, source, world)
        barrier(world)  # others may still read; not after an error, when they may never come
    finally:
        if conversion is not None:
            conversion.clean_up()


def _finished(conversion: Optional[_Conversion], source: Path, world: World) -> Path:
    """Wait with all ranks for rank 0's conversion, however long it takes, and return the copy."""
    done, fault, copy = False, "", source
    while not done:
        done, fault, copy = gather_objects(conversion.wait(PATIENCE_S) if conversion else None, world)[0]
    seen = gather_objects(bool(fault) or (copy / "zero" / "optimizer_state.pt").is_file(), world)
    if not all(seen):
        fault = f"rank {seen.index(False)} does not see {copy}; all ranks must share the folder"
    if fault:
        raise UserError(
            f"checkpoint {source}: cannot be converted for {world.size} ranks in {copy.parents[1]} ({fault})"
        )
    return copy


class _Conversion:
    """Rank 0's conversion, in a process of its own: DeepSpeed's converter prints, and forks, which CUDA forbids here.

    Its folder has a name of its own too: the process may outlive a rank that is killed.
    """

    def __init__(self, source: Path, saved_ranks: int, folder: Path) -> None:
        self._folder = folder / f"{PREFIX}{uuid4().hex}"
        self._copy = self._folder / source.name
        self._executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._future = self._executor.submit(_convert, source, saved_ranks, self._copy)

    def wait(self, seconds: float) -> tuple[bool, str, Path]:
        """Whether it is over, what went wrong (empty: nothing), and the copy."""
        if wait([self._future], seconds).not_done:
            return False, "", self._copy
        error = self._future.exception()
        return True, " ".join(f"{type(error).__name__}: {error}".split())[:300] if error else "", self._copy

    def clean_up(self) -> None:
        """Remove the copy, whatever became of it; a process that still converts is not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)


def _convert(source: Path, saved_ranks: int, copy: Path) -> None:
    """DeepSpeed's converter as its command line runs it; stages 1 and 2 lack a header that only Megatron models write.

    It takes the number of ranks from the files it finds, so what is lost must be noticed here.
    """
    parts = len(list(source.glob("*_optim_states.pt")))
    if parts != saved_ranks:
        raise FileNotFoundError(f"{parts} of {saved_ranks} ranks' parts are there")
    copy.mkdir(parents=True)
    # The parameters' parts and their wholes lie there together for a while; torch calls a full disk an iostream error.
    needed, free = 2 * sum(file.stat().st_size for file in source.iterdir()), shutil.disk_usage(copy).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it takes {needed / 2**20:.1f} MiB for a while, {free / 2**20:.1f} MiB are free")
    options = Namespace(
        input_folder=str(source),
        output_folder=str(copy),
        num_extract_workers=4,
        num_merge_workers=2,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from deepspeed.checkpoint import ds_to_universal  # speaks as well

        ds_to_universal.main(options)


def remove_leftovers(folder: Path) -> None:
    """Remove what conversions that were killed have left under `folder`."""
    for left in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
