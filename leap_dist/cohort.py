"""The students of a run, in step with each other: each takes what it wants from one pass of the teacher.

A run with one student is a cohort of one. What a student computes does not depend on who else is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from leap_dist.analysis.album import Album, Sitter
from leap_dist.config import Config, to_yaml
from leap_dist.curriculum.coordinator import NonFiniteLoss
from leap_dist.data import BadSamples
from leap_dist.errors import UserError, one_line
from leap_dist.learner import Learner, Retired
from leap_dist.models import Features
from leap_dist.monitoring import Bar
from leap_dist.monitoring.company import bar_words
from leap_dist.monitoring.history import History
from leap_dist.runtime.distributed import World, on_main
from leap_dist.runtime.engine import LostScale
from leap_dist.runtime.files import write_text
from leap_dist.runtime.progress import Progress
from leap_dist.runtime.timing import CALIBRATION
from leap_dist.teacher import Teacher
from leap_dist.teacher.lookahead import Work

# From the deepest block wanted to images in chunks, each with the features of all blocks up to that.
Sweep = Callable[[int], Iterator[tuple[Tensor, list[Features]]]]


class Settled(NamedTuple):
    """What a closed step has shown. stop: a rank was told to stop; failed: students that cannot go on, and why."""

    stop: bool
    failed: dict[str, UserError]


class Cohort:
    """Keeps the learners of a run, by name, at one step; the name of a run's only student may be ""."""

    def __init__(self, config: Config, world: World, learners: Mapping[str, Learner]) -> None:
        self.config = config
        self.world = world
        self.learners = dict(learners)
        self.span = next(iter(learners.values())).span
        self.bar: Optional[Bar] = None
        self.history: Optional[History] = None

    @property
    def active(self) -> dict[str, Learner]:
        """Those that train."""
        return {name: learner for name, learner in self.learners.items() if learner.retired is None}

    @property
    def progress(self) -> Progress:
        """Where the run is: where those are that train, or, if none does, the last that did."""
        progress = [learner.progress for learner in (self.active or self.learners).values()]
        return max(progress, key=lambda found: found.step)

    @property
    def engines(self) -> dict[str, Any]:
        """Of all, by name."""
        return {name: learner.engine for name, learner in self.learners.items()}

    # -- from session to session --------------------------------------------------------------------------------------

    def state_dicts(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint holds of each, as of now."""
        for learner in self.active.values():
            learner.read_clocks()
        return {name: learner.state_dict() for name, learner in self.learners.items()}

    def load_state_dicts(self, states: Mapping[str, dict[str, Any]], run: Path) -> None:
        """Continue from the `state_dicts` of the run in the folder `run`."""
        for name, learner in self.learners.items():
            learner.load_state_dict(states[name], run / name)

    def open(self) -> None:
        """Begin to write."""
        if self.world.is_main:
            self.bar = Bar(self.config, self.span.total_steps, self.progress.step)
            self.history = History(Path(self.config.output))
            self.history.start(self.world, self.progress.step, self.span.total_steps)
        for name, learner in self.learners.items():
            if name:
                self._write_config(learner)
            learner.open(self.bar)

    def _write_config(self, learner: Learner) -> None:
        """A student's own, in its folder. UserError on every rank if the disk refuses it."""
        path = Path(learner.config.output) / "config.yaml"
        on_main(lambda: write_text(path, to_yaml(learner.config)), self.world)

    def close(self) -> None:
        """Give the terminal back; safe at any time."""
        self.end_bar()
        for learner in self.learners.values():
            learner.journal.close()
        if self.history is not None:
            self.history.close()

    def end_bar(self) -> None:
        """The last step is done."""
        if self.bar is not None:
            self.bar.end()

    def ended(self, how: str, why: Optional[str] = None) -> None:
        """For the history: end, stop or failure, and why."""
        if self.history is not None:
            self.history.note(how, step=self.progress.step, **({} if why is None else {"text": one_line(why)}))

    def say(self, line: str) -> None:
        """A line on the terminal, on rank 0."""
        if self.bar is not None:
            self.bar.say(line)

    # -- one step -----------------------------------------------------------------------------------------------------

    def choose_start(self, sweep: Sweep) -> None:
        """First step of the run: those that calibrate do so in one pass over the teacher. Collective."""
        searches = {name: found for name, one in self.active.items() if (found := one.calibration()) is not None}
        best: dict[str, int] = {}
        if searches:
            lasts = {name: self.learners[name].curriculum.climbs_to for name in searches}
            with ExitStack() as timers:
                timers.enter_context(self.span.timer.only(CALIBRATION))
                for learner in self.learners.values():
                    timers.enter_context(learner.timer.muted())
                for images, features in sweep(max(lasts.values())):
                    for name, search in searches.items():
                        search.show(images, features[: lasts[name]])
                best = {name: search.best() for name, search in searches.items()}
        for name, learner in self.active.items():
            learner.start(best.get(name))

    def wanted(self, step: int, begun: bool = False) -> dict[str, Sequence[int]]:
        """The blocks that each student's step matches, if its work begins now.

        begun: it may have begun before, in an earlier session.
        """
        return {name: learner.wanted(step, begun) for name, learner in self.active.items()}

    def step(self, work: Work) -> None:
        """One optimizer step of each."""
        learners = self.active
        for name, learner in learners.items():
            learner.begin(work.wanted[name])
        for batch in work.micro_batches:
            for learner in learners.values():
                learner.train_on(batch)
        for learner in learners.values():
            learner.progress.step += 1
            learner.progress.step_in_epoch += 1

    def settle(self, stop: bool, bad_samples: BadSamples) -> Optional[Settled]:
        """Read and decide on the last step's numbers, student by student. None if there is no such step. Collective.

        stop: this rank was asked to end the run.
        """
        failed: dict[str, UserError] = {}
        decisions = []
        for name, learner in self.active.items():
            try:
                decisions.append(learner.settle(stop, bad_samples))
            except (NonFiniteLoss, LostScale) as error:
                failed[name] = error
        found = [decision for decision in decisions if decision is not None]
        if not found and not failed:
            return None
        if self.bar is not None:
            self._move_bar(self.bar)
        return Settled(any(decision.stop for decision in found), failed)

    def _move_bar(self, bar: Bar) -> None:
        if "" in self.learners:
            bar.step(self.learners[""].journal.shown)
            return
        deepest = max((learner.curriculum.block for learner in self.active.values()), default=0)
        shown = {name: learner.journal.shown for name, learner in self.active.items()}
        bar.step(bar_words(shown, f"{deepest}/{self.span.depth}", bar.columns()))

    def draw(self, album: Album, teacher: Teacher) -> None:
        """Pictures of those that train, each beside the block that its last step matched. The run's clock stands.

        Collective.
        """
        sitters = {
            name: Sitter(learner.engine, learner.progress.trajectory[-1][1], Path(learner.config.output))
            for name, learner in self.active.items()
        }
        if not sitters:
            return
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # what is queued is training
        self.span.clock.pause()
        deepest = max(sitter.block for sitter in sitters.values())
        if teacher.block < deepest:  # the run was done when it was resumed
            teacher.retarget(deepest)
        for name, picture in album.draw(teacher, sitters, self.progress.step).items():
            self.learners[name].journal.picture(self.progress.step - 1, "tokens/teacher_and_student", picture)
        self.span.clock.go_on()

    def end_epoch(self) -> None:
        """The curricula's end-of-epoch checks."""
        for learner in self.active.values():
            learner.end_epoch()
            learner.progress.epoch += 1
            learner.progress.step_in_epoch = 0

    def retire(self, name: str, why: str, step: int, weights_of: Optional[int]) -> None:
        """A student trains no more; its engine holds the weights that are to stay."""
        learner = self.learners[name]
        learner.retired = Retired(step, why, weights_of)
        kept = "it has no good weights" if weights_of is None else f"its weights of step {weights_of} stay"
        learner.journal.say(f"{why}; it trains no more, {kept}")

    def require_sound(self) -> None:
        """Raise UserError if a student was retired."""
        failed = [f"{name} ({one.retired.why})" for name, one in self.learners.items() if one.retired is not None]
        if failed:
            others = f"; done: {', '.join(self.active)}" if self.active else ""
            raise UserError(f"students failed: {', '.join(failed)}{others}")
