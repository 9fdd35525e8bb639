"""What a run shows while it goes on: TensorBoard and the progress bar. Only rank 0 writes."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from leap_dist.config import Config, hyperparameters, to_yaml
from leap_dist.errors import UserError
from leap_dist.monitoring.board import Board
from leap_dist.monitoring.climb import draw, read
from leap_dist.monitoring.dashboard import CARDS, layout
from leap_dist.runtime.files import write_whole
from leap_dist.runtime.reporting import STDERR

FIGURE = "curriculum.png"  # in the run folder


def bar_interval() -> float:
    """Seconds between redraws of a progress bar: lively on a terminal, sparse in a log file."""
    return 0.5 if sys.stderr.isatty() else 10.0


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on the device, or the peak resident set of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Bar:
    """A run's progress on the terminal, and what is said above it; built on rank 0 only.

    first_step: where a resumed run continues.
    """

    def __init__(self, config: Config, total_steps: int, first_step: int) -> None:
        self._images = config.data.global_batch
        self._bar = tqdm(
            total=total_steps * self._images,
            initial=first_step * self._images,
            unit=" images",
            unit_scale=True,
            disable=not config.telemetry.progress,
            mininterval=bar_interval(),
            dynamic_ncols=True,
            file=STDERR,
        )

    def step(self, shown: Mapping[str, str]) -> None:
        """Move by a step. shown: short texts beside the bar."""
        self._bar.set_postfix(dict(shown), refresh=False)
        self._bar.update(self._images)

    def columns(self) -> int:
        """Width of the terminal, or of a log file's lines."""
        return shutil.get_terminal_size().columns

    def say(self, line: str) -> None:
        """One line on the terminal, above the bar while there is one."""
        self._bar.write(line, file=STDERR)

    def end(self) -> None:
        """Leave the bar as it is: what comes after the last step is not its time. Safe at any time."""
        self._bar.close()


class Telemetry:
    """TensorBoard of one student; built on rank 0 only.

    first_step: where a resumed run continues; later points of the interrupted one are hidden.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        self.config = config
        self.board = Board(Path(config.output) / "tensorboard", purge_step=first_step)
        self.board.write(lambda writer: self._explain(writer, first_step))

    def _explain(self, writer: Any, first_step: int) -> None:
        writer.add_text("config", f"```yaml\n{to_yaml(self.config)}```", first_step)
        writer.add_custom_scalars(layout(self.config))
        for name, text in CARDS.items():
            writer.add_text(f"what the charts mean/{name}", text.strip(), first_step)

    def is_due(self, step: int) -> bool:
        """Whether the 0-based `step` gets TensorBoard points."""
        return step % self.config.telemetry.every == 0

    def points(self, step: int, scalars: dict[str, float]) -> None:
        """Write TensorBoard points: tag -> value at the 0-based `step`."""

        def add(writer: Any) -> None:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step)

        self.board.write(add)

    def picture(self, step: int, tag: str, pixels: NDArray[np.uint8]) -> None:
        """Write an image (H, W, 3) at the 0-based `step`."""
        self.board.write(lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))

    def finish(self, summary: dict[str, Any], results: str) -> Optional[str]:
        """Write hparams with the run's results, the table of `results`, and the figure of the climb by the ledger.

        Returns a line where there is no figure: why.
        """
        metrics = {f"result/{key}": value for key, value in summary.items() if isinstance(value, (int, float))}
        options = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in hyperparameters(self.config).items()
        }
        self.board.write(lambda writer: writer.add_hparams(options, metrics, run_name="."))
        self.board.write(lambda writer: writer.add_text("result", f"```text\n{results}\n```", summary["steps"]))
        self.board.write(lambda writer: writer.flush())  # what draws the run's page reads these files
        output = Path(self.config.output)
        try:
            figure = draw(read(output))
            write_whole(output / FIGURE, lambda partial: figure.savefig(partial, dpi=120, format="png"))
        except UserError as error:  # no ledger, or no room: no reason to end without the results
            return f"no {FIGURE}: {error}"
        self.board.write(lambda writer: writer.add_figure("curriculum/climb", figure, summary["steps"]))
        return None

    def close(self) -> None:
        self.board.close()


def table(rows: list[tuple[str, Optional[str]]]) -> str:
    """Two aligned columns; rows without a value are left out."""
    kept = [(name, value) for name, value in rows if value is not None]
    width = max(len(name) for name, _ in kept)
    rule = "-" * (width + 2 + max(len(value) for _, value in kept))
    return "\n".join([rule, *(f"{name:<{width}}  {value}" for name, value in kept), rule])
