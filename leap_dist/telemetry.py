"""What a run shows while it goes on: TensorBoard, the progress bar, and where the time of a step goes.

Only rank 0 writes. Nothing here waits for the device: phases on CUDA are timed by events read after they are done.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from tqdm import tqdm

from leap_dist.config import Config, flat, to_yaml

PHASES = ("data", "teacher", "student", "match")  # match: the share of student that loss, gradients and CKA take


class PhaseTimer:
    """Seconds spent in named phases of the step; device time on CUDA, wall time on CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def phase(self, name: str, host: bool = False) -> Iterator[None]:
        """Time the body. `host`: wall time also on CUDA, for work the device has no part in."""
        if self.on_cuda and not host:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._open.append((name, begin, end))
        else:
            begin_s = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - begin_s

    def watch(self, module: nn.Module, name: str) -> None:
        """Time every forward pass of `module` as phase `name`, wherever it is called from."""
        running: list[AbstractContextManager[None]] = []

        def begin(*_: Any) -> None:
            running.append(self.phase(name))
            running[-1].__enter__()

        def end(*_: Any) -> None:
            running.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    def totals(self) -> dict[str, float]:
        """Seconds so far by phase, of everything the device has finished; does not wait for the rest."""
        while self._open and self._open[0][2].query():
            name, begin, end = self._open.popleft()
            self.seconds[name] += begin.elapsed_time(end) / 1e3
        return dict(self.seconds)


def bar_interval() -> float:
    """Seconds between redraws of a progress bar: lively on a terminal, sparse in a log file."""
    return 0.5 if sys.stderr.isatty() else 10.0


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on the device, or the peak resident set of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Telemetry:
    """TensorBoard and the terminal of one run; built on rank 0 only.

    Args:
        first_step: where a resumed run continues; later points of the interrupted one are hidden.
    """

    def __init__(self, config: Config, total_steps: int, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.config = config
        self.writer = SummaryWriter(str(Path(config.output) / "tensorboard"), purge_step=first_step)
        self.writer.add_text("config", f"```yaml\n{to_yaml(config)}```", first_step)
        self.bar = tqdm(
            total=total_steps * config.data.global_batch,
            initial=first_step * config.data.global_batch,
            unit=" images",
            unit_scale=True,
            disable=not config.telemetry.progress,
            mininterval=bar_interval(),
            dynamic_ncols=True,
        )
        self._last_seconds: dict[str, float] = {}
        self._last = (first_step, time.perf_counter())

    def is_due(self, step: int) -> bool:
        """Whether the 0-based `step` gets TensorBoard points."""
        return step % self.config.telemetry.every == 0

    def step(self, step: int, shown: dict[str, str], scalars: dict[str, float], seconds: dict[str, float]) -> None:
        """Close a step: move the bar, and write its points if it is due.

        shown: short texts for the bar. scalars: TensorBoard tag -> value. seconds: `PhaseTimer.totals()`.
        """
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(self.config.data.global_batch)
        if not self.is_due(step):
            return
        for tag, value in (scalars | self._rates(step, seconds)).items():
            self.writer.add_scalar(tag, value, step)

    def _rates(self, step: int, seconds: dict[str, float]) -> dict[str, float]:
        """Images/s and seconds per step of each phase since the last point."""
        (last_step, last_time), now = self._last, time.perf_counter()
        steps = max(1, step + 1 - last_step)
        rates = {"images_per_s": steps * self.config.data.global_batch / (now - last_time)}
        for phase in PHASES:
            rates[f"time/{phase}"] = (seconds.get(phase, 0.0) - self._last_seconds.get(phase, 0.0)) / steps
        self._last, self._last_seconds = (step + 1, now), dict(seconds)
        return rates

    def say(self, line: str) -> None:
        """One line on the terminal, above the bar."""
        self.bar.write(line, file=sys.stderr)

    def finish(self, summary: dict[str, Any], trajectory: list[tuple[int, int]], depth: int) -> None:
        """Write hparams with the run's results, and the figure of target block over steps."""
        metrics = {f"result/{key}": value for key, value in summary.items() if isinstance(value, (int, float))}
        options = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in flat(self.config).items()
        }
        self.writer.add_hparams(options, metrics, run_name=".")
        figure = block_figure(trajectory, summary["steps"], depth)
        figure.savefig(Path(self.config.output) / "curriculum.png", dpi=120)
        self.writer.add_figure("curriculum/block_over_steps", figure, summary["steps"])

    def close(self) -> None:
        self.bar.close()
        self.writer.close()


def block_figure(trajectory: list[tuple[int, int]], steps: int, depth: int) -> Any:
    """Figure of the target block over optimizer steps. trajectory: (first step on the block, block), in order."""
    from matplotlib.figure import Figure

    firsts = [step for step, _ in trajectory]
    blocks = [block for _, block in trajectory]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.step([*firsts, steps], [*blocks, blocks[-1]], where="post", linewidth=2)
    axes.axhline(depth, linestyle=":", color="grey", label="last teacher block")
    axes.set(xlabel="optimizer step", ylabel="target block", ylim=(0, depth + 1), xlim=(0, max(1, steps)))
    axes.legend(loc="lower right", frameon=False)
    return figure


def table(rows: list[tuple[str, Optional[str]]]) -> str:
    """Two aligned columns; rows without a value are left out."""
    kept = [(name, value) for name, value in rows if value is not None]
    width = max(len(name) for name, _ in kept)
    rule = "-" * (width + 2 + max(len(value) for _, value in kept))
    return "\n".join([rule, *(f"{name:<{width}}  {value}" for name, value in kept), rule])
