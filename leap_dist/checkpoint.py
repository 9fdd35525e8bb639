"""Save, find and resume a run: model, optimizer, curriculum, progress and data position in one checkpoint.

    output/config.yaml                  the run this folder belongs to
    output/checkpoints/step00000120/    DeepSpeed's files, config.yaml, run.json (step, world size, ZeRO stage)
    output/checkpoints/latest           name of the newest whole checkpoint; written last, by renaming

Learning rate and random numbers are functions of the step, so they need no state of their own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Optional

from leap_dist.config import Config, differences, load, to_yaml
from leap_dist.distributed import World, barrier
from leap_dist.errors import UserError
from leap_dist.files import write_json, write_text

LATEST, CONFIG, RUN = "latest", "config.yaml", "run.json"


def find_resume(config: Config) -> Optional[Path]:
    """The checkpoint this run starts from, or None for a fresh start.

    Raises:
        UserError: `output` holds a run and may not be touched, or another config, or `resume` holds no checkpoint.
    """
    output = Path(config.output)
    if (output / CONFIG).is_file():
        changed = differences(load(output / CONFIG, [f"resume={config.resume}"], check=False), config)
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(f"output={output}: holds a run of another config ({'; '.join(changed[:3])}{more})")
        if config.resume == "none":
            raise UserError(f"output={output}: holds a run; continue it with resume=auto, or choose another output")
        if config.resume == "auto":
            return newest(output / "checkpoints")
    if config.resume in ("none", "auto"):
        return None
    return _named(Path(config.resume))


def newest(folder: Path) -> Optional[Path]:
    """The newest whole checkpoint under a `checkpoints` folder, or None."""
    latest = folder / LATEST
    return folder / latest.read_text().strip() if latest.is_file() else None


def _named(path: Path) -> Path:
    """A checkpoint from what a user may point at: itself, its `checkpoints` folder, or a run's folder."""
    found = path if (path / RUN).is_file() else newest(path) or newest(path / "checkpoints")
    if found is None or not (found / RUN).is_file():
        raise UserError(f"resume={path}: holds no checkpoint")
    return found


class Checkpoints:
    """The checkpoints of one run; every method is called by all ranks."""

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.world = world
        self.folder = Path(config.output) / "checkpoints"

    def claim_output(self) -> None:
        """Mark the output folder as this run's. The first thing written, once everything has been built."""
        if self.world.is_main:
            write_text(Path(self.config.output) / CONFIG, to_yaml(self.config))

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint named after `step`; only when all of it is there does `latest` name it.

        Raises:
            UserError: the disk refuses; the previous checkpoint stays the latest.
        """
        path = self.folder / f"step{step:08d}"
        if self.world.is_main:
            shutil.rmtree(path, ignore_errors=True)  # what a killed save left
        barrier(self.world)
        try:
            engine.save_checkpoint(str(self.folder), tag=path.name, client_state={"leap": state}, save_latest=False)
            if self.world.is_main:
                write_text(path / CONFIG, to_yaml(self.config))
                write_json(path / RUN, self._identity() | {"step": step})
        except OSError as error:
            raise UserError(f"checkpoint {path}: cannot be written ({error}); the previous one is intact") from error
        barrier(self.world)
        if self.world.is_main:
            write_text(self.folder / LATEST, path.name)
            self._prune(path)
        return path

    def load(self, engine: Any, path: Path) -> dict[str, Any]:
        """Restore the engine from `path` and return the run's state.

        Raises:
            UserError: saved at another world size or ZeRO stage, or damaged.
        """
        saved = json.loads((path / RUN).read_text())
        for key, mine in self._identity().items():
            if saved[key] != mine:
                raise UserError(
                    f"checkpoint {path}: saved with {key}={saved[key]}, this run has {key}={mine}; resume with the same"
                )
        try:
            loaded, client = engine.load_checkpoint(str(path.parent), tag=path.name)
        except Exception as error:  # torch, pickle, zip and DeepSpeed each raise their own
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"checkpoint {path}: cannot be read ({type(error).__name__}: {reason})") from error
        if loaded is None:
            raise UserError(f"checkpoint {path}: cannot be read (DeepSpeed found no model state in it)")
        return client["leap"]

    def _identity(self) -> dict[str, int]:
        return {"world_size": self.world.size, "zero_stage": self.config.engine.zero_stage}

    def _prune(self, newest_path: Path) -> None:
        older = sorted(path for path in self.folder.glob("step*") if path.is_dir() and path != newest_path)
        for path in older[: max(0, len(older) - (self.config.checkpoint.keep - 1))]:
            shutil.rmtree(path, ignore_errors=True)
