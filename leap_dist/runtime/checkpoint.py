"""Save, find and resume a run: model, optimizer, curriculum, progress and data position in one checkpoint.

    output/config.yaml                  the run this folder belongs to
    output/.lock                        held by the run that is at it, see `leap_dist.runtime.run_lock`
    output/checkpoints/step00000120/    DeepSpeed's files, config.yaml, and, sealed, run.json: what run and step it is
                                        of, and size and hash of every other file
    output/checkpoints/latest           name of the newest good checkpoint; written last, by renaming

In the folder of a step, a run with `students` has a folder for each with DeepSpeed's files of its engine.

`latest` moves on only when the step after a checkpoint has shown a finite loss (or the run ends there; or, before an
evaluation, the weights are finite): weights that the last update spoilt are never what a run is continued from.
Learning rate and random numbers are functions of the step, so they need no state of their own.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, Optional

import torch

from leap_dist.config import Config, abridged, differences, flat, load, members, to_yaml
from leap_dist.config.cohort import SECTIONS
from leap_dist.errors import UserError
from leap_dist.runtime.average import WeightAverage
from leap_dist.runtime.checkpoint_folder import (
    CONFIG,
    LATEST,
    RUN,
    Choice,
    check_has_none,
    checkpoints,
    choose,
    damage,
    fault_of,
    others,
    read_run,
    seal,
)
from leap_dist.runtime.checkpoint_writer import met_by_all
from leap_dist.runtime.distributed import World, gather_objects, is_lost_peer, on_first, on_main
from leap_dist.runtime.engine import expect_universal, gradscaler
from leap_dist.runtime.files import flush, refusal, write_text, writing
from leap_dist.runtime.frozen import load_frozen, save_frozen
from leap_dist.runtime.marks import Marks
from leap_dist.runtime.plain_checkpoint import require_plain
from leap_dist.runtime.reporting import is_lost_worker
from leap_dist.runtime.run_lock import Claim, require_shared
from leap_dist.runtime.running_stats import all_buffers, restore_buffers
from leap_dist.runtime.universal import remove_leftovers, universal_copy

log = logging.getLogger(__name__)


# What makes the weights of a checkpoint fit.
STUDENT = (
    "student.model", "student.kwargs", "student.remedy", "student.num_classes", "student.reduction",
    "student.image_size", "student.seed", "objective.head", "optim.name", "curriculum.mode",
)  # fmt: skip
# Beginnings of what no other run can go on with, see `Checkpoints.needs_conversion`.
ANOTHER_RUN = (
    *STUDENT, "seed", "engine.zero_stage", "engine.precision", "data.global_batch", "data.canonical_nodes",
    "data.image_size", "teacher.model", "teacher.kwargs", "teacher.dtype", "teacher.fp8_bound",
)  # fmt: skip


def find_resume(config: Config, world: World) -> Optional[Path]:
    """The checkpoint this run starts from, or None for a fresh start: rank 0 looks, and all ranks do as it says.

    Every byte of it that is going to be used has been found to be what was written. A damaged one is passed over for
    the one before, which rank 0 says; one that was asked for by its own path is refused.

    Raises:
        UserError: `output` holds a run and may not be touched, or another config, `resume` holds no checkpoint or a
            damaged one, none is whole, or a rank does not see the one that rank 0 found.
    """
    _require_one_config(config, world)
    damaged: dict[Path, str] = {}
    while True:
        choice = _told_by_main(lambda: _resume_from(config, damaged), world)
        if choice is None:
            return None
        require_shared(choice.path / RUN, Path(config.output), world)
        fault = damage(choice.path, world)
        if fault is None:
            break
        damaged[choice.path] = fault
    if choice.remark and world.is_main:
        log.warning(choice.remark)
    return choice.path


def _told_by_main(look: Callable[[], Optional[Choice]], world: World) -> Optional[Choice]:
    """What rank 0 finds, on all ranks, or the UserError that it meets. Collective."""
    found: tuple[str, Optional[Choice]] = ("", None)
    if world.is_main:
        try:
            found = "", look()
        except UserError as error:
            found = str(error), None
    fault, choice = gather_objects(found, world)[0]
    if fault:
        raise UserError(fault)
    return choice


def _require_one_config(config: Config, world: World) -> None:
    """Ranks with different configs would wait for each other in different places."""
    flats = gather_objects(flat(config), world)
    for rank, other in enumerate(flats):
        for key, value in other.items():
            if value != flats[0][key]:
                raise UserError(f"{key}: rank {rank} was started with {value}, rank 0 with {flats[0][key]}")


def _resume_from(config: Config, damaged: Mapping[Path, str]) -> Optional[Choice]:
    """damaged: see `choose`."""
    output = Path(config.output)
    if _is_of_a_cohort(output):
        raise UserError(f"output={output}: belongs to the cohort in {output.parent}; choose another output")
    held = _held_config(output)
    if held is not None:
        changed = differences(load(held, [f"resume={config.resume}"], check=False), config)
        if changed:
            way = "choose another output"
            if not any(_of_a_student(key).startswith(ANOTHER_RUN) for key in changed):
                way += f", or go on from it in a new one with output=NEW resume={output}"
            raise UserError(f"output={output}: holds a run of another config ({abridged(changed)}); {way}")
        if config.resume == "none":
            raise UserError(f"output={output}: holds a run; continue it with resume=auto, or choose another output")
        if config.resume != "auto" and _is_inside(Path(config.resume), output):
            return _meant(Path(config.resume), damaged)
        own = choose(output / "checkpoints", damaged)
        if own is None and config.resume == "auto":
            log.warning("output=%s: holds a run without a checkpoint; begins at step 0", output)
        if config.resume == "auto" or own is not None:
            return own  # a queue that starts the same command again must not begin at the other run's checkpoint again
    if config.resume in ("none", "auto"):
        return None
    return _meant(Path(config.resume), damaged)


def _is_of_a_cohort(output: Path) -> bool:
    """Whether the folder is that of a student of the run one folder up."""
    above = output.parent / CONFIG
    if not above.is_file():
        return False
    try:
        return output.name in load(above, [], check=False).students
    except UserError:  # no config of a run
        return False


def _of_a_student(change: str) -> str:
    """A change of students.NAME.SECTION.KEY as one of SECTION.KEY; one who comes or goes as a change of the model."""
    if not change.startswith("students."):
        return change
    own = re.search(rf"\.((?:{'|'.join(SECTIONS)})\..*)", change)
    return own[1] if own else STUDENT[0]


def _held_config(output: Path) -> Optional[Path]:
    """The config of the run that a folder holds: its own, or, where that is lost, a checkpoint's.

    Raises:
        UserError: there are checkpoints, and none says what run they are of.
    """
    of_checkpoints = [path / CONFIG for path in checkpoints(output / "checkpoints")]
    for path in (output / CONFIG, *of_checkpoints):
        if path.is_file() and path.stat().st_size:
            return path
    if of_checkpoints or (output / CONFIG).is_file():
        raise UserError(f"output={output}: holds a run whose {CONFIG} is missing or empty; put it back")
    check_has_none(output / "checkpoints")
    return None


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _meant(path: Path, damaged: Mapping[Path, str]) -> Choice:
    """A checkpoint from what a user may point at: itself, its `checkpoints` folder, or a run's folder."""
    is_step = path.name.startswith("step") and path.is_dir() and not (path / "checkpoints").is_dir()
    if is_step or (path / RUN).is_file():
        if fault := damaged.get(path) or fault_of(path):
            raise UserError(f"resume={path}: {fault}; {others(path)}")
        return Choice(path)
    found = choose(path, damaged) or choose(path / "checkpoints", damaged)
    if found is None:
        raise UserError(f"resume={path}: holds no checkpoint")
    return found


def _put(partial: Path, path: Path) -> None:
    """Give a finished checkpoint its name. One of that name, of a run that went back a few steps, stays until then."""
    replaced = path.with_name(f".{path.name}.replaced")
    if path.exists():
        path.rename(replaced)
    with writing(path.parent):
        partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _own_settings(engine: Any) -> Iterator[None]:
    """Load a checkpoint in this block: the optimizer's groups keep what the config says (weight decay, betas, ...).

    Any load replaces that by what was saved. At stage 3 a universal one takes the first group's for all, so that
    biases and norms would decay, and hands one step count to all of Adam's states, which then advances once per
    sub-group; at stages 1-3 it leaves the count on the host, where fused kernels must not find it (DeepSpeed 0.19).
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # inside ZeRO's
    mine = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, mine, strict=True):
        group.update(settings)
    fused = any(group.get("fused") for group in mine)
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = state["step"].to(parameter.device if fused else "cpu", copy=True)


@contextmanager
def without_crc() -> Iterator[None]:
    """Save tensors in this block: without the zip's CRCs, which cost torch three times what `seal`'s hash does, over
    the same bytes, and which it never looks at when it loads.
    """
    wanted = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(wanted)


def _scaler_state(engine: Any) -> Optional[dict[str, Any]]:
    """State of the fp16 loss scaler, which DeepSpeed leaves out of its checkpoints under autocast (0.19)."""
    scaler = gradscaler(engine)
    return None if scaler is None else scaler.state_dict()


def _average(engine: Any) -> Optional[WeightAverage]:
    """Of the student's weights, if the run has one."""
    return getattr(engine.module, "average", None)


class Checkpoints:
    """The checkpoints of one run; every method is called by all ranks.

    layout, contents: of the training set, whose positions the checkpoints hold; as `TrainLoader` has them.
    teacher: fingerprint of the weights that the student imitates.
    claim: on the output folder, if it has been made already.
    marks: of the teacher's weights, part by part.
    contents, order: what the samples of `layout` are, and the version of the order that they are taken in.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        layout: str,
        teacher: str,
        claim: Optional[Claim] = None,
        marks: Optional[Marks] = None,
        *,
        contents: str = "",
        order: int = 1,
    ) -> None:
        self.config = config
        self.world = world
        self.layout, self.contents, self.order = layout, contents, order
        self.teacher = teacher
        self.marks = marks or Marks("teacher.weights")
        self._unconfirmed: Optional[Path] = None
        self._good: Optional[Path] = None  # the last that was confirmed, or that this run was continued from
        self._claim = claim or Claim(Path(config.output), world)
        self.folder = Path(config.output) / "checkpoints"

    def claim_output(self) -> None:
        """Mark the output folder as this run's, when all is built (the demo's data may lie there already). Collective.

        Raises:
            UserError: see `Claim.mark`.
        """
        self._claim.mark(CONFIG, to_yaml(self.config))

    def release(self) -> None:
        """Let another run have the output folder; safe at any time."""
        self._claim.release()

    def save(self, engines: Mapping[str, Any], step: int, states: Mapping[str, dict[str, Any]]) -> Path:
        """Write a checkpoint named after `step`; `confirm` makes it the latest.

        engines, states: by student; "" is a run's only one.

        Raises:
            UserError: the disk refuses; the previous checkpoint stays the latest.
        """
        path = self.folder / f"step{step:08d}"
        partial = path.with_name(f".{path.name}.partial")
        if self.world.is_main:
            for left in self.folder.glob(".step*"):  # by a save that was killed
                shutil.rmtree(left, ignore_errors=True)
        if fault := gather_objects(self._claim.fault(), self.world)[0]:
            raise UserError(fault)
        marks = self._all_marks()
        fault = ""
        try:
            for name, engine in engines.items():
                buffers = all_buffers(engine.module, self.world)
                client = {"leap": states[name], "scaler": _scaler_state(engine), "running_stats": buffers}
                tag = str(Path(partial.name) / name)
                with without_crc(), met_by_all(engine):
                    engine.save_checkpoint(str(self.folder), tag=tag, client_state=client, save_latest=False)
                if (average := _average(engine)) is not None:
                    average.save(partial / name, self.world)
                if self.config.engine.zero_stage:
                    save_frozen(engine.module, partial / name, self.world)
            on_main(lambda: write_text(partial / CONFIG, to_yaml(self.config)), self.world)
            position = {"step": step, "world_size": self.world.size, "saved_at": time.time()}
            seal(partial, self._identity() | position | {"teacher_marks": marks}, self.world)
            flush(self.folder)
        except (OSError, RuntimeError, UserError) as error:
            if is_lost_peer(error) or is_lost_worker(error):
                raise
            fault = refusal(error, self.folder) or " ".join(str(error).split())[:300]
        self._agree(fault, path, partial)
        on_main(lambda: _put(partial, path), self.world)
        self._unconfirmed = path
        return path

    def _agree(self, fault: str, path: Path, partial: Path) -> None:
        """Raise UserError on every rank if one has a fault. Collective: nobody goes on before all have written."""
        faults = gather_objects(fault, self.world)
        if any(faults):
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)  # what little room there is
            told = next(filter(None, faults))
            raise UserError(f"checkpoint {path}: cannot be written ({told}); the previous one is intact")

    def confirm(self) -> None:
        """Make the checkpoint saved last the one that a resumed run starts from; drop what is older than wanted."""
        path, self._unconfirmed = self._unconfirmed, None
        if path is not None:
            self._good = path
            on_main(lambda: (write_text(self.folder / LATEST, path.name), self._prune(path)), self.world)

    def abandon(self) -> None:
        """Remove the checkpoint saved last, if it is not confirmed: the weights in it gave a bad loss."""
        path, self._unconfirmed = self._unconfirmed, None
        if path is not None and self.world.is_main:
            shutil.rmtree(path, ignore_errors=True)

    def needs_conversion(self, path: Path) -> bool:
        """Whether `path` is in parts for another number of ranks: ZeRO stages 1-3 save one per rank, stage 0 does not.

        Raises:
            UserError: saved with another ZeRO stage, precision, batch, seed, set, optimizer, student, mode or teacher,
                or it does not say with what.
        """
        try:
            saved = {"students": []} | read_run(path)
        except UserError as error:
            raise UserError(f"checkpoint {path}: {error}; {others(path)}") from None
        order = saved.get("order", 1)  # the first did not say so
        if order != self.order:
            raise UserError(
                f"checkpoint {path}: was saved by a version of leap_dist that takes the samples in another order "
                f"({order}, here {self.order}); go on with that version, or begin anew in another output"
            )
        for key, mine in self._identity().items():
            if saved.get(key, mine) != mine:
                raise UserError(
                    f"checkpoint {path}: saved with {key}={saved[key]}, this run has {key}={mine}; resume with the same"
                )
        self.marks.expect(saved.get("teacher_marks", {}), path)
        return self.config.engine.zero_stage > 0 and saved["world_size"] != self.world.size

    def load(self, engines: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
        """Restore the engines from `path` and return the students' states.

        Raises:
            UserError: as `needs_conversion`, or it is damaged or cannot be converted.
        """
        if self.world.is_main:
            remove_leftovers(self.folder)
        on_first(lambda: require_plain(path), self.world)
        self._good = path
        return {name: self._restored(engine, path, name) for name, engine in engines.items()}

    def restore_good(self, name: str, engine: Any) -> Optional[int]:
        """Give a student the weights of the newest checkpoint that has shown finite losses; its step, None if there is
        none. Collective.
        """
        if self._good is None:
            return None
        self._restored(engine, self._good, name)
        return read_run(self._good)["step"]

    def _restored(self, engine: Any, path: Path, name: str) -> dict[str, Any]:
        """Restore one student's engine from the checkpoint `path` and return its state. Collective."""
        part = path / name
        if not self.needs_conversion(path):
            return self._read(engine, part, part)
        saved_ranks = read_run(path)["world_size"]
        if self.world.is_main:
            log.info("converting %s from %d ranks to %d", part, saved_ranks, self.world.size)
        with universal_copy(part, saved_ranks, self.folder, self.world) as copy:
            return self._read(engine, part, copy)

    def _read(self, engine: Any, path: Path, files: Path) -> dict[str, Any]:
        """Restore the engine from `files`, which are the checkpoint `path` or its copy; return the run's state."""
        expect_universal(engine, files != path)
        try:
            with _own_settings(engine):
                loaded, client = engine.load_checkpoint(str(files.parent), tag=files.name)
            if (average := _average(engine)) is not None:
                average.load(path, self.world)
            load_frozen(engine.module, path, self.world)
        except Exception as error:  # torch, pickle, zip and DeepSpeed each raise their own
            if is_lost_peer(error) or is_lost_worker(error):
                raise
            reason = " ".join(str(error).split())[:300]
            if isinstance(error, (ImportError, AttributeError)) and "leap_dist" in reason:  # of what torch unpickles
                raise UserError(
                    f"checkpoint {path}: was saved by another version of leap_dist ({reason}); go on with that "
                    "version, or begin anew in another output"
                ) from error
            what = f"cannot be read ({type(error).__name__}: {reason})"
            raise UserError(f"checkpoint {path}: {what}; {others(path)}") from error
        if loaded is None:
            raise UserError(f"checkpoint {path}: cannot be read (DeepSpeed found no model state in it); {others(path)}")
        if client["scaler"] is not None:
            gradscaler(engine).load_state_dict(client["scaler"])
        restore_buffers(engine.module, client.get("running_stats", []), self.world)
        return client["leap"]

    def _all_marks(self) -> dict[str, str]:
        """The marks of the blocks that any rank has read. Collective."""
        return {part: mark for found in gather_objects(self.marks.found, self.world) for part, mark in found.items()}

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint's position, block and DeepSpeed's files mean anything for; not the number of ranks."""
        shared = {
            "zero_stage": self.config.engine.zero_stage,
            "precision": self.config.engine.precision,
            "global_batch": self.config.data.global_batch,
            "seed": self.config.seed,
            "canonical_nodes": self.config.data.canonical_nodes,
            "data.train": self.layout,
            "data.train's contents": self.contents,
            "order": self.order,
            "data.image_size": self.config.data.image_size,
            "teacher": self.teacher,
            "students": sorted(self.config.students),
        }
        own = {
            f"students.{name}.{key}" if name else key: str(attrgetter(key)(config))
            for name, config in members(self.config).items()
            for key in STUDENT
        }
        return shared | own

    def _prune(self, newest_path: Path) -> None:
        # By age, not by step: a run that went back to an earlier step leaves later ones behind.
        older = sorted(
            (path for path in self.folder.glob("step*") if path.is_dir() and path != newest_path),
            key=lambda path: path.stat().st_mtime_ns,
        )
        for path in older[: max(0, len(older) - (self.config.checkpoint.keep - 1))]:
            shutil.rmtree(path, ignore_errors=True)
