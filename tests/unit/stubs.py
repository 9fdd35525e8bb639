"""Stand-ins with which the training loop runs in-process, in milliseconds, and leaves a trace of what it did."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from leap_dist.config import Config, load, members
from leap_dist.curriculum.coordinator import Coordinator
from leap_dist.curriculum.ledger import replayed_schedule
from leap_dist.curriculum.policy import build_curriculum
from leap_dist.data import BadSamples, Batch
from leap_dist.evaluation.periodic import Validation
from leap_dist.learner import StudentParts
from leap_dist.matching.objective import Objective
from leap_dist.models.features import Features
from leap_dist.models.flops import StepFlops, StudentFlops, TeacherFlops
from leap_dist.models.student import build_student
from leap_dist.runtime.checkpoint import Checkpoints
from leap_dist.runtime.distributed import World
from leap_dist.runtime.marks import Marks
from leap_dist.runtime.optim import build_optimizer
from leap_dist.runtime.progress import total_steps
from leap_dist.runtime.timing import PhaseTimer
from leap_dist.teacher import TeacherSpec
from leap_dist.trainer import Parts, Trainer

ONE = World(0, 1, 0, 1, torch.device("cpu"))
DEPTH, WIDTH, GRID = 4, 12, (2, 2)
SPEC = TeacherSpec("stub", DEPTH, WIDTH, GRID, True, True, (0.5,) * 3, (0.5,) * 3)


@dataclass
class StubTeacher:
    """Block k gives fixed linear features of the image, different for each k."""

    block: int = 1
    asked: list[int] = field(default_factory=list)
    spec: TeacherSpec = SPEC
    blocks: torch.nn.ModuleList = field(
        default_factory=lambda: torch.nn.ModuleList(torch.nn.Identity() for _ in range(DEPTH))
    )
    stem: torch.nn.Module = field(default_factory=torch.nn.Identity)
    fingerprint: str = "stub"
    marks: Marks = field(default_factory=lambda: Marks("stub"))

    def at(self, block: int, images: Tensor) -> Features:
        generator = torch.Generator().manual_seed(block)
        cells = torch.nn.functional.adaptive_avg_pool2d(images, GRID).flatten(2).transpose(1, 2)
        patch = cells @ torch.randn(3, WIDTH, generator=generator)
        return Features(patch, patch.mean(1))

    def features(self, images: Tensor) -> Features:
        return self.features_of(images, [self.block])[self.block]

    def features_of(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Features]:
        self.asked.append(self.block)
        return {block: self.at(block, images) for block in blocks}

    def sweep(self, images: Tensor, until: Optional[int] = None) -> Iterator[Features]:
        return (self.at(block, images) for block in range(1, (until or DEPTH) + 1))

    def retarget(self, block: int) -> None:
        self.block = block


@dataclass
class StubLoader:
    """Micro-batches keyed by (epoch, index)."""

    length: int = 3

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, len(self)):
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(100 * epoch + index))
            yield Batch(images, torch.zeros(4, dtype=torch.long), torch.arange(4), torch.arange(4))

    def close(self) -> None:
        pass


class StubEngine:
    """What the loop uses of a DeepSpeed engine, over plain torch."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer
        self.eval, self.train = module.eval, module.train
        self.torch_autocast_z0_gradscaler = self.checkpoint_engine = None
        self._config = SimpleNamespace()

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def get_global_grad_norm(self) -> None:
        """It does not clip."""

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        path = Path(folder) / tag
        path.mkdir(parents=True)
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "client": client_state}
        torch.save(state, path / "state.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        state = torch.load(Path(folder) / tag / "state.pt", weights_only=False)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        return folder, state["client"]


def stub_config(output: Path, *overrides: str) -> Config:
    """A ViT of 1 block on 8-pixel images, three steps an epoch."""
    defaults = [
        "teacher.model=stub", "teacher.weights=random", "student.model=vit_tiny_patch16_224", "data.train=digits",
        "data.image_size=8", "data.global_batch=4", "data.mixup=false", "epochs=2", "optim.batch_reference=null",
        "telemetry.every=1", "telemetry.progress=false", "curriculum.start=1", f"output={output}",
    ]  # fmt: skip
    shape = ["patch_size=4", "embed_dim=6", "depth=1", "num_heads=1"]
    return load(None, [*defaults, *(f"student.kwargs.{item}" for item in shape), *overrides])


def stub_trainer(config: Config, teacher: StubTeacher | None = None, length: int = 3) -> Trainer:
    """A trainer whose student, objective, curriculum and optimizer are real. length: micro-batches an epoch."""
    parts = Parts(
        teacher=teacher or StubTeacher(),
        students={name: stub_student(own, length) for name, own in members(config).items()},
        loader=StubLoader(length),
        bad_samples=BadSamples(Path(config.output) / "bad_samples.jsonl", 0, ONE),
        checkpoints=Checkpoints(config, ONE, layout="12", teacher="stub"),
        timer=PhaseTimer(ONE.device),
    )
    return Trainer(config, ONE, parts)


def stub_student(config: Config, length: int) -> StudentParts:
    let_a_second_begin(Path(config.output) / "tensorboard")
    torch.manual_seed(config.student_seed)
    timer, replay = PhaseTimer(ONE.device), config.curriculum.replay
    schedule = replayed_schedule(replay, DEPTH, total_steps(config.epochs, length), ONE)
    student = build_student(config.student, config.data.image_size, WIDTH)
    objective = Objective(student, WIDTH, GRID, config.objective, config.curriculum.metric)
    return StudentParts(
        config=config,
        engine=StubEngine(objective, build_optimizer(config.optim, objective)),
        coordinator=Coordinator(build_curriculum(config.curriculum, DEPTH), ONE, schedule, timer),
        flops=StepFlops(TeacherFlops(0, (10,) * DEPTH, 0), StudentFlops(4, 8), match=3, evidence=2, cka=1),
        timer=timer,
        validation=Validation(config, ONE),
    )


def let_a_second_begin(tensorboard: Path) -> None:
    """Make a continued run's event file sort behind those of `tensorboard`.

    Their names hold the second and then a counter of the process, and 10 sorts before 9: real runs are continued by
    another process in another second.
    """
    while any(int(path.name.split(".")[3]) >= int(time.time()) for path in tensorboard.glob("events.out.tfevents.*")):
        time.sleep(0.05)


def scalars(output: Path, tag: str) -> list[float]:
    """The values of a TensorBoard tag, by step."""
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def dies_at(loader: StubLoader, epoch: int, index: int) -> Any:
    """Its `epoch`, cut short as by a kill: it ends when micro-batch `index` of `epoch` is asked for."""
    inner = loader.epoch

    def stream(number: int, start: int = 0) -> Any:
        for position, batch in enumerate(inner(number, start), start):
            if (number, position) == (epoch, index):
                raise KeyboardInterrupt
            yield batch

    return stream
