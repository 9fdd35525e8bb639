"""The parts of `tools/gpu_check.py`: what must be known of a GPU first, in the order of what is worth most.

Every part runs in a process of its own and hands back a `Finding`. Dry, all sizes are tiny and the device is the CPU.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leap_dist.benchmarking.device_check import FINDING, Finding, Part, hand_over
from leap_dist.benchmarking.device_runs import demo, resume, two_ranks
from leap_dist.benchmarking.drawn import DrawnBackbone
from leap_dist.benchmarking.harness import interleaved, quantiles, versions
from leap_dist.config import Config, TeacherConfig
from leap_dist.runtime.distributed import device_name, initialise

ROOT = Path(__file__).resolve().parents[2]
VIT_G = ROOT / "launch_configs" / "vitg14" / "leap_vitg14_vits14_imagenet1k.yaml"
SMALL = (
    "teacher.model=vit_tiny_patch16_224", "teacher.kwargs={patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3}",
    "student.model=vit_tiny_patch16_224", "student.kwargs={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "teacher.weights=random", "data.train=digits", "data.image_size=32",
)  # fmt: skip
# Bars: relative errors of float32 sums, and rates on one H100 or H200.
FLOAT32 = 1e-4
FASTER_THAN_EAGER, FASTER_THAN_COMPILED, MEMORY_OF_EAGER = 2.0, 1.2, 0.25
STEP_MS, SKIP_EFFICIENCY, VIT_G_RATE = 10.0, 0.9, 800.0
PUBLISHED = {"rows": 65536, "student": 384, "teacher": 1536}


def device_of(dry: bool) -> torch.device:
    """Where the parts work."""
    return torch.device("cpu" if dry else "cuda")


def relative(found: Tensor, right: Tensor) -> float:
    """Error in norm, over the norm of what is right."""
    right = right.double().cpu()
    return float((found.double().cpu() - right).norm() / right.norm().clamp_min(1e-30))


# -- what is there ----------------------------------------------------------------------------------------------------


def environment(dry: bool, folder: Path) -> Finding:
    """Device, driver, compilers, and whether Triton can build its driver."""
    device = device_of(dry)
    facts = {
        "device": device_name(device),
        "versions": versions("deepspeed", "timm"),
        "python": sys.version.split()[0],
        "CUDA of torch": torch.version.cuda,
        "gcc": shutil.which("gcc") or "missing",
        "cores": len(os.sched_getaffinity(0)),
        "shared memory, GiB": shutil.disk_usage("/dev/shm").total / 2**30,
    }
    failures = []
    if device.type == "cuda":
        from triton.runtime import driver

        driver.active.get_current_target()  # raises what Triton is missing
        free, total = torch.cuda.mem_get_info()
        facts |= {"compute capability": ".".join(map(str, torch.cuda.get_device_capability()))}
        facts |= {"memory, GiB": total / 2**30, "free, GiB": free / 2**30}
        if free < 0.9 * total:
            failures.append("another process holds memory of this GPU, so no figure below is to be trusted")
    rows = [{"what": what, "is": value} for what, value in facts.items()]
    return Finding(f"{facts['device']}, torch {torch.__version__}", failures, {"Environment": rows})


# -- right ------------------------------------------------------------------------------------------------------------


def kernels(dry: bool, folder: Path) -> Finding:
    """Loss, gradients and moments of the matching op against float64, beside plain PyTorch in the same dtype."""
    from leap_kernels import Moments, feature_match

    device, (m, ds, dt) = device_of(dry), (96, 16, 24) if dry else (8192, 384, 1536)
    dtypes = (torch.float32,) if dry else (torch.float32, torch.bfloat16, torch.float16)
    names = ("loss", "student", "weight", "bias", *Moments._fields[1:])
    rows: list[dict[str, Any]] = []

    def outcome(tensors: list[Tensor], impl: str, objective: str) -> list[Tensor]:
        student, weight, bias = (x.detach().clone().requires_grad_() for x in tensors[:3])
        loss, moments = feature_match(student, weight, bias, tensors[3], impl=impl, objective=objective, moments=True)
        loss.backward()
        return [loss, student.grad, weight.grad, bias.grad, *moments[1:]]

    for dtype in dtypes:
        for objective in ("mse", "normalised", "cosine"):
            torch.manual_seed(0)
            shapes = ((m, ds), (dt, ds), (dt,), (m, dt))
            tensors = [(torch.randn(shape, device=device) + (i == 0)).to(dtype) for i, shape in enumerate(shapes)]
            right = outcome([x.double() for x in tensors], "reference", objective)
            plain, ours = (outcome(tensors, impl, objective) for impl in ("reference", "auto"))
            for name, exact, theirs, mine in zip(names, right, plain, ours, strict=True):
                row = {"dtype": str(dtype)[6:], "objective": objective, "of": name}
                rows.append(row | {"error": relative(mine, exact), "plain PyTorch's": relative(theirs, exact)})
    allowed = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}
    bad = [row for row in rows if not row["error"] <= 2 * row["plain PyTorch's"] + allowed[row["dtype"]]]
    failures = [f"{row['of']} of {row['objective']} in {row['dtype']} is {row['error']:.1e} off" for row in bad]
    worst = max(row["error"] for row in rows)
    return Finding(f"worst relative error {worst:.1e}", failures, {"Kernels against float64": rows})


def one_step(dry: bool, folder: Path) -> Finding:
    """Loss, score and gradients of one step in float32 on the GPU against the CPU's."""
    from leap_dist.benchmarking.steps import load_for_steps, random_images

    config = load_for_steps(VIT_G, list(SMALL), batch=8, output=folder)
    config = replace(config, teacher=replace(config.teacher, dtype="fp32"))
    images = random_images(config, torch.device("cpu"))
    right, found = (_outcome(config, images, torch.device(kind)) for kind in ("cpu", "cpu" if dry else "cuda"))
    rows = [{"of": name, "relative error": relative(found[name], value)} for name, value in right.items()]
    failures = [
        f"{row['of']} is {row['relative error']:.1e} off" for row in rows if not row["relative error"] <= FLOAT32
    ]
    return Finding(f"worst {max(row['relative error'] for row in rows):.1e}", failures, {"One step, CPU and GPU": rows})


def _outcome(config: Config, images: Tensor, device: torch.device) -> dict[str, Tensor]:
    from leap_dist.assembly import build_objective
    from leap_dist.teacher import build_teacher

    teacher = build_teacher(config.teacher, config.data.image_size, device)
    teacher.retarget(2)
    objective = build_objective(config, teacher.spec).to(device).eval()
    match = objective(images.to(device), [teacher.features(images.to(device))], True)
    match.loss.backward()
    gradients = [parameter.grad.flatten() for parameter in objective.parameters() if parameter.grad is not None]
    score = match.evidence[0].score()
    return {"loss": match.loss.detach(), "score": score.detach(), "gradients": torch.cat(gradients)}


def no_wait(dry: bool, folder: Path) -> Finding:
    """Steps under torch's sync debug mode "error": nothing may make the host wait for the device."""
    from leap_dist.benchmarking.host import raw_batch
    from leap_dist.benchmarking.steps import aim, build_conducted, conduct, held_teacher, load_for_steps

    rows = []
    for precision, optimizer in (("bf16", "lars"), ("bf16", "adamw"), ("fp16", "lars")):
        more = [f"engine.precision={precision}", f"optim.name={optimizer}", "teacher.kwargs.depth=4"]
        config = load_for_steps(VIT_G, [*SMALL, *more], batch=8, output=folder)
        world = initialise()
        teacher = held_teacher(config, world.device)[1]
        trainer = build_conducted(config, world, teacher, raw_batch(config))

        def script(trainer: Any = trainer, teacher: Any = teacher) -> Iterator[None]:
            aim(trainer, teacher, 2)
            yield from [None] * 4  # kernels are compiled, states are made
            torch.cuda.set_sync_debug_mode("error")
            yield from [None] * 3

        waits = ""
        try:
            conduct(trainer, script())
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "leap_dist" in frame.filename]
            waits = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        rows.append({"precision": precision, "optimizer": optimizer, "waits at": waits or "nothing"})
    failures = [
        f"{row['precision']} with {row['optimizer']} waits at {row['waits at']}"
        for row in rows
        if row["waits at"] != "nothing" and row["precision"] != "fp16"  # whose scaler reads a flag, by torch's design
    ]
    return Finding("nothing waits in bf16", failures, {"What makes the host wait": rows})


def colours(dry: bool, folder: Path) -> Finding:
    """The colour jitter of a batch on the GPU against the CPU, value by value."""
    from leap_dist.benchmarking.host import raw_batch
    from leap_dist.benchmarking.steps import load_for_steps
    from leap_dist.data import Feed

    batch_size, size = (4, 32) if dry else (64, 224)
    config = load_for_steps(VIT_G, [*SMALL, f"data.image_size={size}"], batch=batch_size, output=folder)
    batch = raw_batch(config)
    right = Feed(config.data, torch.device("cpu")).images(batch)
    device = device_of(dry)
    feed = Feed(config.data, device)
    found = feed.images(next(iter(feed.ahead([batch]))))
    sent = list(feed.ahead([batch] * 8))
    times = interleaved({"colours": lambda: lambda: feed.images(sent[0])}, device, 5)["colours"]
    step = 1 / 255 / min(config.data.std)  # a whole number on the scale of bytes
    apart = (found.cpu() - right).abs()
    share = float((apart > step / 2).float().mean())
    failures = [f"{share:.2%} of the values are another whole number"] if share > 1e-3 else []
    row = {"values apart": share, "most": float(apart.max()) / step, "ms": quantiles(times)[0], "images": batch_size}
    return Finding(f"{share:.2%} of values apart, {row['ms']:.2f} ms", failures, {"Colours, CPU and GPU": [row]})


# -- fast -------------------------------------------------------------------------------------------------------------


def match(dry: bool, folder: Path) -> Finding:
    """The matching op against eager PyTorch, the same under torch.compile, and the roofline."""
    from leap_dist.benchmarking.matching import COMPILED, EAGER, Problem, measure

    device, (m, ds, dt) = device_of(dry), (96, 8, 24) if dry else PUBLISHED.values()
    names = [EAGER, "auto"] if dry else [EAGER, COMPILED, "auto", "gram"]
    rows = measure(Problem(m, ds, dt, "fp32" if dry else "autocast", device), names, 2 if dry else 10)
    full = {row.name: row for row in rows if row.part == "full"}
    table = [
        {"step": row.name, "ms": row.median, "MiB": row.memory, "TFLOP/s": row.tflops, "of the roofline": row.roofline}
        for row in full.values()
    ]
    ours, eager = full["auto + CKA"], full[f"{EAGER} + CKA"]
    speed, memory = eager.median / ours.median, ours.memory / eager.memory
    failures = []
    if not dry:
        over_compiled = full[f"{COMPILED} + CKA"].median / ours.median
        failures += [f"{speed:.2f}x eager, below {FASTER_THAN_EAGER}"] * (speed < FASTER_THAN_EAGER)
        failures += [f"{over_compiled:.2f}x compiled"] * (over_compiled < FASTER_THAN_COMPILED)
        failures += [f"{memory:.0%} of eager's memory"] * (memory > MEMORY_OF_EAGER)
    return Finding(f"{speed:.2f}x eager at {memory:.0%} of its memory", failures, {"Matching": table})


def teachers(dry: bool, folder: Path) -> Finding:
    """Images/s of ViT-g and ViT-7B by depth, in bf16 and in FP8."""
    device, rows = device_of(dry), []
    giants = [("vit_giant_patch14_reg4_dinov2", 224, 64), ("vit_7b_patch16_dinov3", 224, 32)]
    if dry:
        giants = [("vit_tiny_patch16_224", 32, 2)]
    for model, size, batch in giants:
        for dtype, compiled in (("bf16", False),) if dry else (("bf16", True), ("fp8", True), ("bf16", False)):
            row: dict[str, Any] = {"teacher": model, "dtype": dtype, "compiled": compiled, "images": batch}
            try:
                rows.append(row | _rates(model, size, batch, dtype, compiled, device))
            except Exception as error:  # a dtype that fails does not hide what the others give
                rows.append(row | {"error": repr(error)[:200]})
            hand_over(_of_teachers(rows), folder / FINDING)  # a giant takes long, and may be cut
            torch.cuda.empty_cache()
    return _of_teachers(rows)


def _of_teachers(rows: list[dict[str, Any]]) -> Finding:
    giant = [row for row in rows if "giant" in row["teacher"] and row["dtype"] == "bf16"]
    best = max((row.get("images/s at the last", 0.0) for row in giant), default=0.0)
    failures = [f"ViT-g at {best:.0f} images/s, below {VIT_G_RATE:.0f}"] * (bool(giant) and best < VIT_G_RATE)
    failures += [f"{row['teacher']} in {row['dtype']}: {row['error']}" for row in rows if "error" in row]
    return Finding(f"ViT-g {best:.0f} images/s in bf16" if best else "done", failures, {"Teachers": rows})


@torch.no_grad()
def _rates(
    model: str, size: int, batch: int, dtype: str, compiled: bool, device: torch.device
) -> dict[str, float | int]:
    config = TeacherConfig(model=model, weights="random", dtype=dtype, compile=compiled, fp8_bound=-1.0)
    lazy = DrawnBackbone(config, size, device)
    depth = lazy.spec.depth
    lazy.judge(depth)
    lazy.hold(range(depth))
    images = lazy.to_teacher(torch.randn(batch, 3, size, size))
    blocks = {"first": 1, "quarter": max(1, depth // 4), "half": max(1, depth // 2), "last": depth}
    calls = {name: lambda block=block: lambda: lazy.backbone(images, block) for name, block in blocks.items()}
    times = interleaved(calls, device, 3)
    return {f"images/s at the {name}": 1e3 * batch / min(values) for name, values in times.items()}


def steps(dry: bool, folder: Path) -> Finding:
    """Whole steps at 32 images by target block: launches, idle share of the device, images/s."""
    from leap_dist.benchmarking.host import measure
    from leap_dist.benchmarking.skipping import TRAIN_PASSES
    from leap_dist.benchmarking.steps import HeldTeacher, load_for_steps
    from leap_dist.models import step_flops

    batch = 4 if dry else 32
    own = [*SMALL, "engine.precision=bf16"] if dry else ["data.train=digits", "data.val=null", "engine.precision=bf16"]
    config = load_for_steps(VIT_G, own, batch=batch, output=folder)
    world = initialise()
    teacher = HeldTeacher(DrawnBackbone(config.teacher, config.data.image_size, world.device))
    depth = teacher.spec.depth
    blocks = sorted({1, *(block for block in (10, 20) if block < depth), depth})
    found = measure(config, world, blocks, rounds=1 if dry else 3, steps=1 if dry else 5, teacher=teacher)
    flops, rows = step_flops(config), []
    cost = {block: flops.teacher.upto(block) + TRAIN_PASSES * flops.student.forward for block in blocks}
    full = found[-1]
    for row in found:
        saved = 1 - cost[row.block] / cost[depth]
        rows.append(
            {"block": row.block, "step ms": row.host_ms, "images/s": 1e3 * batch / row.host_ms}
            | {"launches": row.launches, "reads": row.reads}
            | {"device idle": "" if row.device_ms is None else 1 - min(1.0, row.device_ms / row.host_ms)}
            | {"skip efficiency": (1 - row.host_ms / full.host_ms) / saved if saved else ""}
        )
    failures = []
    if not dry:
        failures += [f"{found[0].host_ms:.1f} ms at block 1, above {STEP_MS:.0f}"] * (found[0].host_ms > STEP_MS)
        least = min(row["skip efficiency"] for row in rows if row["skip efficiency"] != "")
        failures += [f"skip efficiency {least:.2f}, below {SKIP_EFFICIENCY}"] * (least < SKIP_EFFICIENCY)
    first = f"block 1: {found[0].host_ms:.1f} ms, {found[0].launches} launches"
    return Finding(first, failures, {"Whole steps": rows})


PARTS = (
    Part("environment", "Environment", 30, environment),
    Part("kernels", "Kernels against float64", 60, kernels),
    Part("one_step", "One step on CPU and GPU", 40, one_step, on_cpu=False),
    Part("no_wait", "Nothing waits", 60, no_wait, on_cpu=False),
    Part("colours", "Colours on CPU and GPU", 30, colours, on_cpu=False),
    Part("match", "Matching: eager, compiled, roofline", 60, match),
    Part("teachers", "Teachers by depth, bf16 and FP8", 110, teachers),
    Part("steps", "Whole steps by block", 90, steps),
    Part("demo", "The demo", 90, demo),
    Part("resume", "Kill and resume", 60, resume),
    Part("two_ranks", "Two ranks: ZeRO stages and placements", 90, two_ranks),
)
