"""Every timm architecture as a student: built, trained for a step, exported and read back (docs/students.md).

Random weights and two random images, at the smallest size that the architecture takes. What is refused is refused in
the words that a run would be.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from leap_dist.config import Config, DataConfig, ObjectiveConfig, OptimConfig, StudentConfig, TeacherConfig
from leap_dist.errors import UserError
from leap_dist.matching import Objective
from leap_dist.models import Features, Student, build_student, export_student, load_student
from leap_dist.runtime.distributed import World
from leap_dist.runtime.optim import build_optimizer

SIZES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 299, 331, 384, 448, 512)
BEGIN, END = "<!-- list of students -->", "<!-- end of the list -->"  # in the page
_ONE = World(0, 1, 0, 1, torch.device("cpu"))
_TEACHER_WIDTH, _TEACHER_GRID = 24, (4, 4)


@dataclass(frozen=True)
class Verdict:
    """What became of one architecture. kind: its class in timm; size: of its images, pixels; millions: of parameters.

    grid, width, cls: of the map, and how the class token is made; refusal: "" if it trains.
    """

    name: str
    kind: str
    millions: float
    size: int = 0
    grid: tuple[int, int] = (0, 0)
    width: int = 0
    cls: str = ""
    refusal: str = ""


@cache
def architectures(most: float) -> tuple[str, ...]:
    """timm's architectures with fewer than `most` parameters, each once, by name. Takes a minute or two."""
    return tuple(name for name in timm.list_models() if _outline(name)[1] < most)


@cache
def _outline(name: str) -> tuple[str, int]:
    """Class and number of parameters."""
    with torch.device("meta"):
        model = timm.create_model(name)
    return type(model).__name__, sum(parameter.numel() for parameter in model.parameters())


def evenly(names: Iterable[str], count: int) -> list[str]:
    """`count` of the names, evenly spread."""
    names = list(names)
    return [names[index * len(names) // count] for index in range(min(count, len(names)))]


def try_out(name: str) -> Verdict:
    """One architecture: a training step on the smallest images it takes, an export, and its tokens once more.

    Raises:
        AssertionError: a trained parameter has no gradient, or the export gives other tokens than the student.
    """
    kind, parameters = _outline(name)
    verdict = Verdict(name, kind, parameters / 1e6)
    student = smallest(name)
    if isinstance(student, str):
        return replace(verdict, refusal=student)
    size = student.recipe.map_at or student.recipe.kwargs["img_size"]
    torch.manual_seed(0)
    _train_a_step(student, torch.randn(2, 3, size, size))
    _check_export(student, torch.randn(2, 3, size, size))
    cls = student.about()["cls"]
    return replace(verdict, size=size, grid=student.grid, width=student.width, cls=cls)


def smallest(name: str, **options: Any) -> Student | str:
    """The student at the first of `SIZES`, or its own, at which it is accepted and gives more than one token.

    Otherwise what is said at the largest of them.
    """
    own = timm.models.get_pretrained_cfg(name, allow_unregistered=True).input_size[-1]
    found: Student | str = ""
    for size in sorted({size for size in SIZES if size < max(own, 64)} | {own}):
        torch.manual_seed(0)
        try:
            outline = build_student(StudentConfig(model=name, **options), size, device=torch.device("meta"))
            if outline.grid == (1, 1) and size < own:
                continue
            return build_student(StudentConfig(model=name, **options), size)
        except UserError as error:
            found = str(error)
    return found


def _train_a_step(student: Student, images: Tensor) -> None:
    objective = Objective(student, _TEACHER_WIDTH, _TEACHER_GRID, ObjectiveConfig(cls_weight=0.05)).train()
    optimizer = build_optimizer(OptimConfig(), objective)
    target = Features(torch.randn(len(images), 16, _TEACHER_WIDTH), torch.randn(len(images), _TEACHER_WIDTH))
    match = objective(images, [target])
    match.loss.backward()
    named = objective.named_parameters()
    missed = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
    assert not missed or not student.recipe.map_at, f"no gradient: {missed[:5]}"  # ViTs: see `VitStudent`
    assert match.loss.isfinite(), "the loss is not finite"
    optimizer.step()


@torch.no_grad()
def _check_export(student: Student, images: Tensor) -> None:
    recipe = student.recipe
    size = images.shape[-1]
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            output=folder,
            teacher=TeacherConfig(model="any"),
            student=StudentConfig(model=recipe.model),
            data=DataConfig(train="any", image_size=size),
        )
        path = export_student(SimpleNamespace(module=SimpleNamespace(student=student)), config, _ONE)
        student.eval()
        mine, again = student(images), load_student(path)(images)
        assert torch.equal(mine.patch, again.patch) and torch.equal(mine.cls, again.cls), "the export differs"
        plain = timm.create_model(recipe.model, **recipe.kwargs)
        plain.load_state_dict(load_file(Path(path)))
        cells = cells_of_timm(plain.eval(), images, student)
        assert torch.equal(cells, mine.patch), "plain timm differs"


def cells_of_timm(model: torch.nn.Module, images: Tensor, student: Student) -> Tensor:
    """What timm itself gives of `images` as cells (B, N, C), told by shape alone."""
    raw, (rows, columns) = model.forward_features(images), student.grid
    shape = tuple(raw.shape[1:]) if isinstance(raw, Tensor) else ()
    if shape == (student.width, rows, columns):
        return raw.flatten(2).mT
    if shape == (rows, columns, student.width):
        return raw.flatten(1, 2)
    if len(shape) == 2 and shape[1] == student.width and shape[0] >= rows * columns:
        return raw[:, shape[0] - rows * columns :]
    maps = model.forward_intermediates(
        images, indices=1, norm=_norms(model, images), output_fmt="NCHW", intermediates_only=True
    )
    return maps[-1].flatten(2).mT


def _norms(model: torch.nn.Module, images: Tensor) -> bool:
    try:
        model.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW")
    except (AssertionError, TypeError, RuntimeError):
        return False
    return True


def page_with(page: str, verdicts: list[Verdict]) -> str:
    """The page with the list between `BEGIN` and `END` made anew. UserError where it has no such place."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{listing(verdicts)}\n{END}{after}"


def listing(verdicts: list[Verdict]) -> str:
    """What became of them as Markdown: a line for every class of timm, and one for every refusal."""
    trained = [verdict for verdict in verdicts if not verdict.refusal]
    kinds: dict[str, list[Verdict]] = {}
    for verdict in sorted(trained, key=lambda verdict: (verdict.kind.lower(), verdict.name)):
        kinds.setdefault(verdict.kind, []).append(verdict)
    lines = [
        f"Tried with timm {timm.__version__}: {len(verdicts)}. Trained: {len(trained)}. "
        f"Refused: {len(verdicts) - len(trained)}.",
        "",
        "| class | class token | that train, with the size they were tried at |",
        "|---|---|---|",
    ]
    for kind, group in kinds.items():
        ways = ", ".join(sorted({verdict.cls for verdict in group}))
        names = ", ".join(f"`{verdict.name}` {verdict.size}" for verdict in group)
        lines.append(f"| {kind} | {ways} | {names} |")
    refused = sorted((verdict for verdict in verdicts if verdict.refusal), key=lambda verdict: verdict.name)
    if refused:
        lines += ["", "| refused | because |", "|---|---|"]
        lines += [f"| `{verdict.name}` | {verdict.refusal.replace('|', '/')} |" for verdict in refused]
    return "\n".join(lines) + "\n"
