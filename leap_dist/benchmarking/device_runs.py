"""The parts of `tools/gpu_check.py` that are whole runs: the demo, a kill and a resume, two ranks on one device."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from leap_dist.benchmarking.device_check import FINDING, Finding, hand_over
from leap_dist.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[2]
README_ACCURACY = 0.90  # the demo's kNN on the mean patch token is 95 % on CPUs
SAME_SCORE = 1e-3  # of two runs of one program on a GPU, whose sums may change their order
# A run that has a score at every step, and is there for its scores.
_SCORED = (
    "teacher.weights=random", "data.val=null", "telemetry.progress=false", "curriculum.start=1",
    "curriculum.threshold=0.99",
)  # fmt: skip


def train(output: Path, *overrides: str, dry: bool) -> list[str]:
    """The command of a run of the demo with overrides."""
    few = ("teacher.kwargs.depth=3", "student.kwargs.depth=1", "epochs=0.5") if dry else ()
    return [sys.executable, str(ROOT / "leap_dist" / "train.py"), f"output={output}", *overrides, *few]


def environment_of(dry: bool) -> dict[str, str]:
    """For runs that a part starts."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | ({"DS_ACCELERATOR": "cpu"} if dry else {})


def scores(run: Path) -> dict[int, float]:
    """By step, those of a run's ledger so far."""
    with suppress(OSError):
        lines = [json.loads(text) for text in (run / "curriculum.jsonl").read_text().splitlines() if text.endswith("}")]
        return {one["step"]: one["score"] for one in lines if one.get("score") is not None}
    return {}


def apart(found: dict[int, float], right: dict[int, float]) -> float:
    """The most by which scores of the same step differ; infinite where a step is missing."""
    if not right or found.keys() != right.keys():
        return float("inf")
    return max(abs(found[step] - right[step]) for step in right)


def _finish(command: list[str], dry: bool) -> None:
    done = subprocess.run(command, env=environment_of(dry), stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode} of {' '.join(command[1:])}")


def demo(dry: bool, folder: Path) -> Finding:
    """`make demo` in one process; its accuracies are near README's."""
    output = folder / f"demo-{os.getpid()}"
    _finish(train(output, *(_SCORED if dry else ("telemetry.progress=false",)), dry=dry), dry)
    summary = json.loads((output / "summary.json").read_text())
    wanted = (
        "student_cls_knn",
        "student_patch_knn",
        "teacher_patch_knn",
        "seconds",
        "teacher_flops_saved",
        "time_saved",
    )
    rows = [{"what": name, "is": summary[name]} for name in wanted if summary.get(name) is not None]
    failures, knn = [], summary.get("student_patch_knn")
    if not dry and (knn is None or knn < README_ACCURACY):
        failures.append(f"kNN of the mean patch token is {knn}, and README has 95 %")
    return Finding("done" if knn is None else f"kNN {knn:.1%}", failures, {"Demo": rows})


def resume(dry: bool, folder: Path) -> Finding:
    """A run that is told to stop in its middle and goes on has the scores of one that is not."""
    whole, cut = folder / f"whole-{os.getpid()}", folder / f"cut-{os.getpid()}"
    _finish(train(whole, *_SCORED, "epochs=10", dry=dry), dry)
    command = train(cut, *_SCORED, "epochs=10", "resume=auto", "checkpoint.every_steps=4", dry=dry)
    child = subprocess.Popen(command, env=environment_of(dry), stdin=subprocess.DEVNULL)
    while child.poll() is None and not list(cut.glob("checkpoints/latest")):
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    status, before = child.wait(), len(scores(cut))
    _finish(command, dry)
    right, found = scores(whole), scores(cut)
    off = apart(found, right)
    failures = [f"status {status} after SIGTERM"] if status else []
    failures += ["the run was over before the signal came"] * (not dry and before == len(right))
    failures += [f"scores differ by {off:.1e}"] if not off <= SAME_SCORE else []
    row = {"steps": len(right), "before the stop": before, "scores differ by": off}
    return Finding(f"scores differ by {off:.1e}", failures, {"Kill and resume": [row]})


# -- two ranks --------------------------------------------------------------------------------------------------------

_PLACED = ("teacher.placement=sharded", "teacher.placement=pipelined")
VARIANTS: dict[str, tuple[str, ...]] = {
    "ZeRO 0": (), "ZeRO 1": ("engine.zero_stage=1",), "ZeRO 2": ("engine.zero_stage=2",),
    "ZeRO 3": ("engine.zero_stage=3",), "sharded": _PLACED[:1], "pipelined": _PLACED[1:],
}  # fmt: skip


def two_ranks(dry: bool, folder: Path) -> Finding:
    """Two ranks on one device over gloo: ZeRO stages and placements have the scores of stage 0, replicated."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = folder / "ranks.json"
    found.unlink(missing_ok=True)
    code = "import sys; from leap_dist.benchmarking.device_runs import rank; rank(sys.argv[1:])"
    ranks = []
    for number in range(2):
        ours = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", code, str(folder), "dry" if dry else "", str(os.getpid())]
        ranks.append(subprocess.Popen(command, env=environment_of(dry) | ours, stdin=subprocess.DEVNULL))
    while any(one.poll() is None for one in ranks):
        time.sleep(0.1)
        if found.is_file():
            hand_over(_judged(json.loads(found.read_text())), folder / FINDING)
    if any(one.returncode for one in ranks) and not found.is_file():
        raise RuntimeError("the ranks failed before the first run was done")
    return _judged(json.loads(found.read_text()))


def _judged(by_variant: dict[str, Any]) -> Finding:
    right = {int(step): score for step, score in by_variant["ZeRO 0"].get("scores", {}).items()}
    rows, failures = [], []
    for name, one in by_variant.items():
        off = apart({int(step): score for step, score in one.get("scores", {}).items()}, right)
        rows.append({"run": name, "steps": len(one.get("scores", {})), "scores differ by": off, "error": one["error"]})
        if one["error"]:
            failures.append(f"{name}: {one['error']}")
        elif not off <= SAME_SCORE:
            failures.append(f"{name}: scores differ by {off:.1e}")
    done = sum(not row["error"] for row in rows)
    return Finding(f"{done} of {len(VARIANTS)} ran", failures, {"Two ranks on one device": rows})


def rank(arguments: list[str]) -> None:
    """One of the ranks: every variant in turn, in one process. arguments: folder, "dry" or "", name of this session."""
    from leap_dist.runtime.distributed import initialise

    folder, dry, session = Path(arguments[0]), bool(arguments[1]), arguments[2]
    # NCCL refuses two ranks on one device. LOCAL_RANK, 0 on both, is the device's number to us and to DeepSpeed.
    world = initialise(backend="gloo")
    world = replace(world, local_rank=world.rank)
    found: dict[str, Any] = {}
    for name, overrides in VARIANTS.items():
        output = folder / f"{name.replace(' ', '-')}-{session}"
        error = ""
        try:
            _run_variant(output, overrides, dry, world)
        except Exception as fault:
            error = " ".join(repr(fault).split())[:200]
            print(f"{name}: {error}", flush=True)
        found[name] = {"scores": scores(output), "error": error}
        if world.is_main:
            write_json(folder / "ranks.json", found)


def _run_variant(output: Path, overrides: tuple[str, ...], dry: bool, world: Any) -> None:
    from leap_dist.assembly import build_trainer
    from leap_dist.config import load
    from leap_dist.runtime.run_lock import Claim

    config = load(ROOT / "launch_configs" / "demo.yaml", train(output, *_SCORED, "epochs=2", *overrides, dry=dry)[2:])
    config = replace(config, engine=replace(config.engine, silence_s=0))
    with Claim(Path(config.output), world) as claim:
        trainer = build_trainer(config, world, claim)[1]
        try:
            trainer.run()
        finally:
            trainer.close()
