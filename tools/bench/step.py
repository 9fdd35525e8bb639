"""One training step of ours at target blocks 1, L/4, L/2 and L, against the ideal and against a plain PyTorch loop.

python tools/bench/step.py                                     a teacher of ViT-g's width on CPU, minutes
python tools/bench/step.py --pair small                        ViT-S/14 -> ViT-T/14 at 112 px on CPU
python tools/bench/step.py --config launch_configs/vitg14/leap_vitg14_vits14_imagenet1k.yaml --batch 64 --steps 10 \\
    optim.name=adamw engine.precision=bf16                     ViT-g/14 -> ViT-S/14 at 224 px in bf16, on a GPU

ours   the trainer's own step, images on hand: decision on the step before, mixup, teacher, student, projector and loss,
       CKA, DeepSpeed engine (ZeRO 0, clipping, fused AdamW), telemetry on and writing.
ideal  timm's teacher cut after the block, and its final norm, without gradients; timm's student forward and backward
       from a fixed gradient of its tokens; nothing else. With the optimizer (fused AdamW over the student) and without.
plain  what the published LEAP code does, in plain PyTorch: mixup, the same cut teacher, nn.Linear, mean((P-T)^2), the
       same on the class token, CKA of the projected tokens by its three products and a number on the host in every
       step, clipping, torch.optim.AdamW's default.

cohort with --students N: a step of N students that share the teacher's pass, against one pass and what each student's
       step takes beside a pass of its own; in one process, in turns, at the last block.

All three take the same images and start from the same weights, in turns; medians of ratios of the same round. On CPU
one thread, and the process' own time: what else runs on the machine disturbs it less.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_dist.benchmarking.company import Company, measure_company
from leap_dist.benchmarking.harness import stopwatch, versions
from leap_dist.benchmarking.steps import (
    HeldTeacher,
    aim,
    batch_of,
    build_conducted,
    conduct,
    held_teacher,
    in_dtype,
    load_for_steps,
    random_images,
    require_deepspeed,
)
from leap_dist.config import Config, OptimConfig
from leap_dist.errors import UserError
from leap_dist.matching import Objective
from leap_dist.models import DTYPES, Student, build_model, on_grid
from leap_dist.runtime.distributed import World, device_name, initialise, shutdown
from leap_dist.runtime.optim import build_optimizer
from leap_dist.teacher.lazy_backbone import LazyBackbone


@dataclass(frozen=True)
class Pair:
    """Models that a CPU can step in seconds, and images per step."""

    overrides: tuple[str, ...]
    batch: int


TINY_STUDENT = ("student.model=vit_small_patch14_dinov2", "student.kwargs={embed_dim: 192, num_heads: 3}")
PAIRS = {
    # ViT-g's width and tokens in eight blocks -> ViT-T/14: matching is as wide as it gets.
    "wide": Pair(
        ("teacher.model=vit_giant_patch14_dinov2", "teacher.kwargs.depth=8", *TINY_STUDENT, "data.image_size=224"), 8
    ),
    # ViT-S/14 -> ViT-T/14 on small images: the pair with the least work per parameter.
    "small": Pair(("teacher.model=vit_small_patch14_dinov2", *TINY_STUDENT, "data.image_size=112"), 64),
    # The same teacher -> students that are no vision transformers.
    "convnext": Pair(
        ("teacher.model=vit_small_patch14_dinov2", "student.model=convnext_atto", "data.image_size=112"), 32
    ),
    "mobilenet": Pair(
        ("teacher.model=vit_small_patch14_dinov2", "student.model=mobilenetv4_conv_small", "data.image_size=112"), 32
    ),
}
MIN_DENOMINATOR = 1e-12
AGREEMENT = 1e-3  # relative difference of the losses above which the two loops do not do the same


@dataclass(frozen=True, kw_only=True)
class Row:
    """Times in milliseconds per step, medians over rounds; ratios are medians over rounds of ratios.

    ideal: with the optimizer; over_ideal, over_bare: share by which ours takes longer than the ideal with and without
    the optimizer; speedup: plain over ours.
    """

    block: int
    depth: int
    teacher: str
    ours: float
    ideal: float
    optimizer: float
    plain: float
    over_ideal: float
    over_bare: float
    speedup: float


# ---------------------------------------------------------------------------------------------------------------------
# The two others


class CutTeacher:
    """timm's model, which shares its weights with ours, cut after a block."""

    def __init__(self, config: Config, lazy: LazyBackbone) -> None:
        self.dtype = lazy.dtype
        size = config.data.image_size
        self.model = build_model(config.teacher.model, config.teacher.kwargs, size, device=lazy.device)
        state = dict(lazy.backbone.stem.state_dict())
        for index, block in enumerate(lazy.backbone.blocks):
            state |= {f"blocks.{index}.{name}": tensor for name, tensor in block.state_dict().items()}
        self.model.load_state_dict(state, assign=True)
        self.model.eval().requires_grad_(False)
        self.blocks = self.model.blocks

    def cut(self, block: int) -> None:
        """Run 1-indexed `block` last."""
        self.model.blocks = self.blocks[:block]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B,3,H,W) -> final-normed tokens (B,P+N,Dt)."""
        return self.model.forward_features(images.to(self.dtype))


class Ideal:
    """Teacher up to the block, student forward and backward from a gradient that is given; its optimizer apart."""

    def __init__(self, config: Config, teacher: CutTeacher, student: Student, images: Tensor) -> None:
        self.teacher, self.student, self.images = teacher, student, images
        self.autocast = lambda: autocast(config, images.device)
        self.optimizer = build_optimizer(config.optim, student)
        with torch.no_grad(), self.autocast():
            self.upstream = [torch.randn_like(tokens) for tokens in self._tokens()]

    def step(self) -> None:
        """With the optimizer; the gradients stay for `update`."""
        self.optimizer.zero_grad()
        self.teacher(self.images)
        with self.autocast():
            tokens = self._tokens()
        torch.autograd.backward(tokens, [given.to(x.dtype) for given, x in zip(self.upstream, tokens, strict=True)])
        self.optimizer.step()

    def _tokens(self) -> list[Tensor]:
        """Patch tokens and class token, where they have a gradient."""
        return list(self.student(self.images)[:2])

    def update(self) -> None:
        """The optimizer alone."""
        self.optimizer.step()


class Plain:
    """The published loop: its loss, its score, its host read; its curriculum is one comparison."""

    def __init__(self, config: Config, teacher: CutTeacher, objective: Objective, images: Tensor):
        self.config, self.teacher, self.images = config, teacher, images
        self.grid = objective.teacher_grid
        head = _linear(objective.heads[0])
        cls_head = head if objective.cls_head is None else _linear(objective.cls_head)
        student = copy.deepcopy(objective.student)
        self.model = nn.ModuleDict({"student": student, "head": head, "cls_head": cls_head})
        self.optimizer = plain_optimizer(config.optim, self.model)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.ema = 0.0

    def _mixed(self) -> Tensor:
        if not self.config.data.mixup:
            return self.images
        lam = torch.rand((), generator=self.generator).item()
        return torch.lerp(self.images[torch.randperm(len(self.images), generator=self.generator)], self.images, lam)

    def step(self) -> None:
        """One step, to the number on the host."""
        loss, score = self.loss_and_score(self._mixed())
        alpha = self.config.curriculum.ema_alpha
        self.ema = alpha * score + (1 - alpha) * self.ema
        assert self.ema < self.config.curriculum.threshold
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.engine.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.engine.clip)
        self.optimizer.step()

    def loss_and_score(self, images: Tensor) -> tuple[Tensor, float]:
        """0-d loss with its graph, and the CKA of the projected tokens."""
        target = self.teacher(images)
        with autocast(self.config, images.device):
            view = self.model["student"](images)
            patch = self.model["head"](on_grid(view.patch, self.model["student"].grid, self.grid))
        patch = patch.flatten(0, 1).float()
        target_patch = target[:, self.teacher.model.num_prefix_tokens :].flatten(0, 1).float()
        loss = F.mse_loss(patch, target_patch)
        if weight := self.config.objective.cls_weight:
            with autocast(self.config, images.device):
                cls = self.model["cls_head"](view.cls)
            loss = loss + weight * F.mse_loss(cls.float(), target[:, 0].float())
        return loss, three_product_cka(patch.detach(), target_patch)


def plain_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The run's groups; AdamW as torch gives it to who asks for nothing, which on a CPU is not the fused one."""
    optimizer = build_optimizer(config, module)
    if config.name != "adamw":
        return optimizer
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in optimizer.param_groups]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def three_product_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of x (M,Dt) and y (M,Dt) in float32 as the published code computes it, on the host."""
    x, y = x - x.mean(0), y - y.mean(0)
    cross, own_x, own_y = ((a.T @ b).square().sum() for a, b in ((x, y), (x, x), (y, y)))
    denominator = (own_x * own_y).sqrt()
    if denominator < MIN_DENOMINATOR:
        return 0.0
    return (cross / denominator).item()


def autocast(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """The student's precision."""
    precision = config.engine.precision
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


def measure(config: Config, world: World, *, rounds: int, steps: int) -> tuple[list[Row], str]:
    """Rows by block, the last once more with a bf16 teacher where the CPU has units for it; and what that costs."""
    images = random_images(config, world.device)
    lazy, teacher = held_teacher(config, world.device)
    trainer = build_conducted(config, world, teacher, batch_of(images))
    objective: Objective = trainer.learner.engine.module
    cut = CutTeacher(config, lazy)
    ideal = Ideal(config, cut, copy.deepcopy(objective.student), images)
    plain = Plain(config, cut, objective, images)
    _require_agreement(config, teacher, objective, plain, images)
    depth = teacher.spec.depth
    teachers, note = {"ours": teacher}, ""
    if config.teacher.dtype == "fp32" and has_amx(world.device):
        teachers["low"] = held_teacher(in_dtype(config, "bf16"), world.device)[1]
        note = f"bf16 teacher, block {depth}: features off by {feature_error(teacher, teachers['low'], images[:1])}"
    others = {"ideal": ideal.step, "optimizer": ideal.update, "plain": plain.step}
    times: dict[tuple[str, int], list[float]] = defaultdict(list)

    def script() -> Iterator[None]:
        for _ in range(rounds + 1):
            for block in sorted({1, max(1, depth // 4), max(1, depth // 2), depth}):
                for name in teachers if block == depth else ("ours",):
                    aim(trainer, teachers[name], block)
                    stop = stopwatch(world.device, time.process_time)
                    yield from [None] * steps
                    times[name, block].append(stop() / steps)
                cut.cut(block)
                for name, call in others.items():
                    stop = stopwatch(world.device, time.process_time)
                    for _ in range(steps):
                        call()
                    times[name, block].append(stop() / steps)

    conduct(trainer, script())
    counted = {key: values[1:] for key, values in times.items()}  # the first round warmed up
    rows = []
    for name, block in counted:
        if name in teachers:
            parts = {"ours": counted[name, block]} | {other: counted[other, block] for other in others}
            rows.append(row(block, depth, "bf16" if name == "low" else config.teacher.dtype, parts))
    return rows, note


def row(block: int, depth: int, teacher: str, times: Mapping[str, list[float]]) -> Row:
    """Medians, and medians of paired ratios. times: milliseconds of ours, ideal, optimizer and plain by round."""
    rounds = list(zip(*(times[name] for name in ("ours", "ideal", "optimizer", "plain")), strict=True))
    return Row(
        block=block,
        depth=depth,
        teacher=teacher,
        **{name: statistics.median(values) for name, values in times.items()},
        over_ideal=statistics.median(ours / ideal - 1 for ours, ideal, _, _ in rounds),
        over_bare=statistics.median(ours / (ideal - optimizer) - 1 for ours, ideal, optimizer, _ in rounds),
        speedup=statistics.median(plain / ours for ours, _, _, plain in rounds),
    )


def _linear(ours: nn.Linear) -> nn.Linear:
    """A plain layer with the weights of one of our heads."""
    head = nn.Linear(ours.in_features, ours.out_features, device=ours.weight.device)
    head.load_state_dict(ours.state_dict())
    return head


def _require_agreement(
    config: Config, teacher: HeldTeacher, objective: Objective, plain: Plain, images: Tensor
) -> None:
    """Raise where the two loops' losses of the first images differ: then they would not be doing the same."""
    teacher.retarget(teacher.spec.depth)
    with torch.no_grad(), autocast(config, images.device):
        mine = objective(images[:2], [teacher.features(images[:2])]).loss.item()  # batch norm cannot train on one
    with torch.no_grad():
        other = plain.loss_and_score(images[:2])[0].item()
    if abs(mine / other - 1) > AGREEMENT:
        raise RuntimeError(f"loss {mine} here and {other} in the plain loop, of the same weights and images")


def has_amx(device: torch.device) -> bool:
    """Whether this is a CPU with matrix units for bf16."""
    flags = Path("/proc/cpuinfo")
    return device.type == "cpu" and flags.is_file() and "amx_bf16" in flags.read_text()


def feature_error(exact: HeldTeacher, rounded: HeldTeacher, images: Tensor) -> str:
    """How far the patch tokens of `rounded` lie from those of `exact` at the last block, in words."""
    for teacher in (exact, rounded):
        teacher.retarget(teacher.spec.depth)
    right, wrong = (teacher.features(images).patch.float() for teacher in (exact, rounded))
    error = wrong - right
    return f"{error.abs().max().item():.3f} at most, {(error.norm() / right.norm()).item():.2%} in norm"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--pair", choices=PAIRS, default="wide", help="models for a CPU")
    models.add_argument("--config", type=Path, help="a run's YAML instead")
    parser.add_argument("--batch", type=int, help="images per step; default: the pair's, or 64")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each block; medians over them")
    parser.add_argument(
        "--steps", type=int, default=1, help="steps in a row at each turn; on a GPU take 10: they overlap"
    )
    parser.add_argument("--students", type=int, default=0, help="also time a cohort of so many; default: none")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over the YAML")
    return parser.parse_intermixed_args(argv)


def table(rows: list[Row]) -> str:
    """The rows for a terminal."""
    titles = ("block", "teacher", "ours ms", "ideal ms", "optimizer", "plain ms", "over ideal", "no optim.", "speed-up")
    lines = ["".join(f"{title:>11}" for title in titles)]
    for r in rows:
        times = "".join(f"{value:11.1f}" for value in (r.ours, r.ideal, r.optimizer, r.plain))
        ratios = f"{r.over_ideal:11.1%}{r.over_bare:11.1%}{r.speedup:10.3f}x"
        lines.append(f"{f'{r.block}/{r.depth}':>11}{r.teacher:>11}{times}{ratios}")
    return "\n".join(lines)


def company_line(found: Company) -> str:
    """The cohort's row."""
    alone = ", ".join(f"{value:.1f}" for value in found.alone)
    return (
        f"cohort of {found.students} at block {found.block}: {found.together:.1f} ms together; the teacher "
        f"{found.teacher:.1f} ms, each alone with it {alone} ms; {found.over:+.1%} over one pass and the students' own"
    )


def append_csv(path: Path, rows: list[Row], about: dict[str, str]) -> None:
    """Add the rows, each with what they were measured on."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*about, *(field.name for field in fields(Row))])
        if new:
            writer.writeheader()
        writer.writerows(about | asdict(row) for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit status."""
    args = parse(argv)
    try:
        require_deepspeed()
        with tempfile.TemporaryDirectory() as scratch:
            pair = Pair((), 64) if args.config else PAIRS[args.pair]
            batch, overrides = args.batch or pair.batch, [*pair.overrides, *args.overrides]
            config = load_for_steps(args.config, overrides, batch=batch, output=Path(scratch))
            if config.engine.precision == "fp16":
                raise UserError("engine.precision=fp16: the plain loop has no loss scaler; use bf16 or fp32")
            torch.set_num_threads(1)
            world = initialise()
            torch.set_num_threads(1)
            rows, note = measure(config, world, rounds=args.rounds, steps=args.steps)
            notes = [note] if note else []
            if args.students:
                found = measure_company(config, world, args.students, rounds=args.rounds, steps=args.steps)
                notes.append(company_line(found))
    except UserError as error:
        print(f"bench_step: error: {error}", file=sys.stderr)
        return 2
    about = {
        "device": device_name(world.device),
        "versions": versions("deepspeed", "timm"),
        "run": f"{config.teacher.model} -> {config.student.model}, {batch} x {config.data.image_size} px, "
        f"student {config.engine.precision}, {config.optim.name}, points every {config.telemetry.every} steps",
    }
    print("; ".join(about.values()), table(rows), *notes, sep="\n")
    if args.csv:
        append_csv(args.csv, rows, about)
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
