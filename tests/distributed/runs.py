"""Real runs of the entry point, and what they left in TensorBoard."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from forked import Forked

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "leap_dist" / "train.py"
HANG_S = 400  # what takes longer hangs: the same work took 110 to 275 s on one machine within minutes

# Small enough for seconds, real in every part: digits as MDS shards, a 6-block teacher, a 2-block student.
TINY = {
    "epochs": 1,
    "teacher": {
        "model": "vit_tiny_patch16_224",
        "weights": "random",
        "kwargs": {"patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3},
    },
    "student": {
        "model": "vit_tiny_patch16_224",
        "kwargs": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    },
    "curriculum": {"start": 1, "threshold": 0.6},
    "data": {
        "train": "digits",
        "image_size": 16,
        "global_batch": 64,
        "workers": 0,
        "canonical_nodes": 1,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    "optim": {"lr": 2e-3, "batch_reference": None},
    "telemetry": {"every": 1, "progress": False, "report": False},
}


def write_config(folder: Path, **sections: dict) -> Path:
    """TINY with `sections` merged over it, as a YAML in `folder`."""
    merged = {"output": str(folder / "run"), **TINY}
    for name, values in sections.items():
        merged[name] = {**TINY.get(name, {}), **values} if isinstance(values, dict) else values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(merged))
    return path


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def command(config: Path, *overrides: str, processes: int = 2, launcher: str) -> list[str]:
    """The command line a user would type, with this interpreter and a free port."""
    if launcher == "deepspeed":
        start = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(processes), "--master_port", free_port()]
    elif launcher == "torchrun":
        start = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={free_port()}"]
    else:
        start = []
    return [sys.executable, *start, str(ENTRY), "--config", str(config), *overrides]


def environment() -> dict[str, str]:
    """One thread per rank, and this interpreter's scripts first on the PATH."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def require_gpus(processes: int) -> None:
    """Skip the test where runs are to be on CUDA and there are fewer GPUs than ranks."""
    if os.environ.get("DS_ACCELERATOR") == "cuda" and (there := torch.cuda.device_count()) < processes:
        pytest.skip(f"needs {processes} GPUs, and there {'is' if there == 1 else 'are'} {there}")


def fork(script: Path, *arguments: str, processes: int) -> Forked:
    """A script on ranks that need not import torch, under way."""
    require_gpus(processes)
    size = str(processes)
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return Forked(script, arguments, ranks, environment() | common)


def start(
    config: Path, *overrides: str, processes: int = 2, launcher: str = "forked"
) -> subprocess.Popen[str] | Forked:
    """A run under way, in a process group of its own; stdout and stderr are one pipe.

    launcher: deepspeed, torchrun, python; forked, for tests that are about the run and not about what started it.
    """
    require_gpus(processes)
    if launcher == "forked":
        return fork(ENTRY, "--config", str(config), *overrides, processes=processes)
    return subprocess.Popen(
        command(config, *overrides, processes=processes, launcher=launcher),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(run: subprocess.Popen[str] | Forked, timeout: float = HANG_S) -> subprocess.CompletedProcess[str]:
    """Wait for the end; stdout and stderr together in `.stdout`. What takes longer than `timeout` seconds is killed."""
    try:
        printed, _ = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess([], run.returncode, printed)


def launch(
    config: Path, *overrides: str, processes: int = 2, launcher: str = "forked", timeout: float = HANG_S
) -> subprocess.CompletedProcess[str]:
    """`start`, then `finish`."""
    return finish(start(config, *overrides, processes=processes, launcher=launcher), timeout)


def run_ok(config: Path, *overrides: str, processes: int = 2, launcher: str = "forked", timeout: float = HANG_S) -> str:
    """`launch`, which must succeed; returns what it printed."""
    done = launch(config, *overrides, processes=processes, launcher=launcher, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def on_ranks(ranks: int, worker: str, *arguments: str) -> str:
    """Run a worker script of this folder on ranks, which must succeed; returns what it printed."""
    done = finish(fork(Path(__file__).with_name(worker), *arguments, processes=ranks))
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def scalars(run: Path, tag: str) -> dict[int, float]:
    """Step -> value of a TensorBoard tag, the newest where a step was written twice."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}
