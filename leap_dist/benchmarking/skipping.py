"""What skipping teacher blocks saves: every target block of a run's config, timed without training.

Takes the trainer's own steps (teacher, student, loss, score, optimizer, telemetry) on random images. Rounds over the
blocks, so that a busy moment of the machine hits all alike; medians.

    FLOPs saved      1 - F(k) / F(L)     F(k): of a step at block k, teacher up to k plus student (three forwards)
    time saved       1 - t(k) / t(L)
    skip efficiency  time saved / FLOPs saved; 1 is the ideal line (LEAP, arXiv 2606.19483: 21 % / 25.1 % = 0.84)
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Optional

from leap_dist.benchmarking.harness import peak_watch, stopwatch
from leap_dist.benchmarking.steps import aim, batch_of, build_conducted, conduct, held_teacher, random_images
from leap_dist.config import Config, flat
from leap_dist.errors import UserError
from leap_dist.models import step_flops
from leap_dist.runtime.distributed import World
from leap_dist.teacher import build_teacher

TRAIN_PASSES = 3  # a training step of the student costs that many of its forward passes
WARMUP = 2


class Sample(NamedTuple):
    """Milliseconds of one step, and of the teacher within it."""

    step: float
    teacher: float


class Memory(NamedTuple):
    """MiB: of the teacher's weights, and of a step beyond all that was held before it."""

    weights: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One target block. student_ms: all of the step but the teacher; FLOPs are per image; shares are of a full step."""

    block: int
    images_per_s: float
    step_ms: float
    teacher_ms: float
    student_ms: float
    teacher_weights_mib: float
    step_peak_mib: float
    teacher_flops: int
    step_flops: int
    flops_saved: float
    time_saved: float
    skip_efficiency: Optional[float]
    ideal_images_per_s: float


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


def measure(
    config: Config, world: World, blocks: Sequence[int], *, rounds: int, steps: int
) -> tuple[dict[int, Memory], dict[int, list[Sample]]]:
    """Memory of each 1-indexed block, with none deeper than it loaded; then its samples by round, with all loaded."""
    growing = build_teacher(config.teacher, config.data.image_size, world.device)
    trainer = build_conducted(config, world, growing, batch_of(random_images(config, world.device)))
    memory: dict[int, Memory] = {}
    samples: dict[int, list[Sample]] = {block: [] for block in blocks}

    def script() -> Iterator[None]:
        for block in blocks:
            aim(trainer, growing, block)
            yield  # optimizer states, and the allocator's first pages
            peak = peak_watch(world.device)
            yield
            memory[block] = Memory(growing.resident_bytes() / 2**20, peak())
        growing.retarget(1)  # lets go of the rest: the device holds the whole teacher once
        teacher = held_teacher(config, world.device)[1]
        for index in range(rounds + WARMUP):
            for block in blocks:
                aim(trainer, teacher, block)
                seconds, stop = trainer.timer.totals().get("teacher", 0.0), stopwatch(world.device)
                yield from [None] * steps
                milliseconds = stop(), 1e3 * (trainer.timer.totals()["teacher"] - seconds)
                if index >= WARMUP:
                    samples[block].append(Sample(*(value / steps for value in milliseconds)))

    conduct(trainer, script())
    return memory, samples


def rows(
    config: Config, samples: Mapping[int, Sequence[Sample]], memory: Mapping[int, Memory], batch: int
) -> list[Row]:
    """Medians and what follows from them. The last of the blocks is the whole teacher."""
    flops = step_flops(config)
    teacher, student = flops.teacher, TRAIN_PASSES * flops.student.forward
    medians = {
        block: Sample(*(statistics.median(values) for values in zip(*found, strict=True)))
        for block, found in samples.items()
    }
    last = max(medians)
    full_time, full_flops = medians[last].step, teacher.upto(last) + student
    table = []
    for block, (step, teacher_ms) in sorted(medians.items()):
        flops = teacher.upto(block) + student
        flops_saved, time_saved = 1 - flops / full_flops, 1 - step / full_time
        table.append(
            Row(
                block=block,
                images_per_s=1e3 * batch / step,
                step_ms=step,
                teacher_ms=teacher_ms,
                student_ms=step - teacher_ms,
                teacher_weights_mib=memory[block].weights,
                step_peak_mib=memory[block].peak,
                teacher_flops=teacher.upto(block),
                step_flops=flops,
                flops_saved=flops_saved,
                time_saved=time_saved,
                skip_efficiency=time_saved / flops_saved if flops_saved else None,
                ideal_images_per_s=1e3 * batch / (full_time * flops / full_flops),
            )
        )
    return table


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def write(out: Path, table: Sequence[Row], config: Config, about: str) -> None:
    """CSV, PNG and TensorBoard into the folder `out`."""
    from torch.utils.tensorboard import SummaryWriter

    out.mkdir(parents=True, exist_ok=True)
    with (out / "skip.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in table)
    figure = draw(table, about)
    figure.savefig(out / "skip.png", dpi=120)
    with SummaryWriter(str(out)) as board:
        for row in table:
            for name, value in asdict(row).items():
                if name != "block" and value is not None:
                    board.add_scalar(f"skip/{name}", value, row.block)
        board.add_text("skip/measured", about)
        board.add_figure("skip/figure", figure, table[-1].block)
        board.add_hparams(options(config), results(table), run_name=".")


def options(config: Config) -> dict[str, Any]:
    """The config as TensorBoard takes it."""
    values = flat(config)
    return {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in values.items()}


def results(table: Sequence[Row]) -> dict[str, float]:
    """The sweep in three numbers."""
    first, last = table[0], table[-1]
    found = {
        "result/images_per_s_first_block": first.images_per_s,
        "result/images_per_s_last_block": last.images_per_s,
    }
    efficiencies = [row.skip_efficiency for row in table if row.skip_efficiency is not None]
    return found | ({"result/worst_skip_efficiency": min(efficiencies)} if efficiencies else {})


def draw(table: Sequence[Row], about: str) -> Any:
    """Figure: saved time over saved FLOPs with the ideal line, images/s, where a step's time goes, memory."""
    from matplotlib.figure import Figure

    blocks = [row.block for row in table]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(about, fontsize=9)
    (saved, speed), (time, space) = figure.subplots(2, 2)
    saved.plot([0, 1], [0, 1], ":", color="grey", label="ideal: time follows FLOPs")
    saved.plot([row.flops_saved for row in table], [row.time_saved for row in table], "o-", label="measured")
    for row in table[:: max(1, len(table) // 8)]:
        saved.annotate(str(row.block), (row.flops_saved, row.time_saved), xytext=(4, -10), textcoords="offset points")
    saved.set(xlabel="share of the full step's FLOPs saved", ylabel="share of its time saved", xlim=(0, 1), ylim=(0, 1))
    speed.plot(blocks, [row.ideal_images_per_s for row in table], ":", color="grey", label="ideal")
    speed.plot(blocks, [row.images_per_s for row in table], "o-", label="measured")
    speed.set(xlabel="target block", ylabel="images/s", ylim=(0, None))
    parts = {name: [getattr(row, f"{name}_ms") for row in table] for name in ("teacher", "student")}
    time.stackplot(blocks, *parts.values(), labels=parts, alpha=0.8)
    time.set(xlabel="target block", ylabel="ms per step")
    space.plot(blocks, [row.teacher_weights_mib for row in table], "o-", label="teacher weights")
    space.plot(blocks, [row.step_peak_mib for row in table], "s-", label="peak of a step beyond what it found")
    space.set(xlabel="target block", ylabel="MiB", ylim=(0, None))
    for axes in (saved, speed, time, space):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return figure


def shown(table: Sequence[Row]) -> str:
    """The rows for a terminal."""
    titles = (
        "block",
        "images/s",
        "step ms",
        "teacher",
        "student",
        "weights",
        "peak MiB",
        "FLOPs -",
        "time -",
        "effic.",
    )
    lines = ["".join(f"{title:>10}" for title in titles)]
    for r in table:
        numbers = (r.images_per_s, r.step_ms, r.teacher_ms, r.student_ms, r.teacher_weights_mib, r.step_peak_mib)
        efficiency = "-" if r.skip_efficiency is None else f"{r.skip_efficiency:.3f}"
        shares = f"{r.flops_saved:10.1%}{r.time_saved:10.1%}{efficiency:>10}"
        lines.append(f"{r.block:10}" + "".join(f"{number:10.1f}" for number in numbers) + shares)
    return "\n".join(lines)


def chosen_blocks(text: str, depth: int) -> list[int]:
    """'all' or '1,4,8' -> 1-indexed blocks in order, always with the last. UserError for one that is not there."""
    if text == "all":
        return list(range(1, depth + 1))
    try:
        blocks = {int(part) for part in text.split(",")}
    except ValueError:
        raise UserError(f"--blocks {text}: expected all, or numbers such as 1,4,8") from None
    for block in sorted(blocks):
        if not 1 <= block <= depth:
            raise UserError(f"--blocks {text}: the teacher has {depth} blocks; use 1 to {depth}")
    return sorted(blocks | {depth})
