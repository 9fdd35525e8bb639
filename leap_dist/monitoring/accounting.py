"""What a run costs and saves: FLOPs by part, seconds by phase, utilisation, and what the early exits saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional

import torch

from leap_dist.config import Config, flat
from leap_dist.models import StepFlops
from leap_dist.runtime.timing import CALIBRATION, PHASES

# Dense peaks in TFLOP/s of the vendors' data sheets: bf16 and fp16, TF32, fp32 outside the tensor cores. A name is
# matched as a whole or by its beginning, the longest first ("NVIDIA A10" is not "NVIDIA A100").
PEAKS = {
    "NVIDIA A100": (312.0, 156.0, 19.5),
    "NVIDIA A10": (125.0, 62.5, 31.2),
    "NVIDIA A10G": (70.0, 35.0, 35.0),
    "NVIDIA L4": (121.0, 60.0, 30.3),
    "NVIDIA L40S": (362.0, 183.0, 91.6),
    "NVIDIA H100 80GB HBM3": (989.0, 494.0, 67.0),
    "NVIDIA H100 PCIe": (756.0, 378.0, 51.0),
    "NVIDIA H100 NVL": (835.0, 417.0, 60.0),
    "NVIDIA H200": (989.0, 494.0, 67.0),
    "NVIDIA H200 NVL": (835.0, 417.0, 60.0),
    "NVIDIA GH200": (989.0, 494.0, 67.0),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6, 35.6),
    "NVIDIA GeForce RTX 4090": (165.0, 82.6, 82.6),
}
# Other chips, or a slice of one, under the beginning of another's name.
VARIANTS = {"MIG", "Laptop", "Max-Q", "Ti", "SUPER", "D", "NVL"}
PARTS = ("teacher", "student", "match")
# What a step's seconds depend on among what may change when a run goes on.
TIMED_BY = (
    "engine.accumulation", "objective.impl", "student.compile", "teacher.compile", "teacher.memory_budget",
    "teacher.microbatches", "teacher.placement", "teacher.rebalance", "teacher.stages",
)  # fmt: skip


def peak_tflops(gpu: str, dtype: str, tf32: bool) -> Optional[float]:
    """Dense peak of a GPU in `dtype` (fp32, bf16, fp16, fp8), or None where it is not known. tf32: fp32 may use it."""
    known = [name for name in PEAKS if gpu == name or gpu.startswith((f"{name} ", f"{name}-"))]
    if not known:
        return None
    name = max(known, key=len)
    if VARIANTS & set(gpu.removeprefix(name).split()):
        return None
    half, tf32_peak, single = PEAKS[name]
    if dtype == "fp8":
        return 2 * half  # on all GPUs that have it
    return half if dtype != "fp32" else tf32_peak if tf32 else single


def configured_peaks(config: Config, device: torch.device) -> Optional[dict[str, float]]:
    """FLOP/s that one rank could at best do in each of PARTS; None where a part's is not known."""
    dtypes = (config.teacher.dtype, config.engine.precision, config.engine.precision)
    if config.telemetry.peak_tflops is not None:
        tflops: list[Optional[float]] = [config.telemetry.peak_tflops] * len(PARTS)
    elif device.type == "cuda":
        name, tf32 = torch.cuda.get_device_name(device), torch.backends.cuda.matmul.fp32_precision == "tf32"
        tflops = [peak_tflops(name, dtype, tf32) for dtype in dtypes]
    else:
        return None
    return {part: 1e12 * peak for part, peak in zip(PARTS, tflops, strict=True) if peak} if all(tflops) else None


@dataclass
class Costs:
    """What a run has cost so far, over all its sessions; saved in every checkpoint.

    flops: of teacher (calibration included), student and match, over all ranks; full_flops: of the teacher, had every
    step run all of it; calibration_flops: of the teacher, in the calibration. seconds: of wall time; phases: seconds of
    rank 0 by phase. settings: what the steps were made with, each once (`Accountant.setting`).
    """

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    full_flops: float = 0.0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    calibration_flops: float = 0.0
    settings: list[str] = field(default_factory=list)

    @property
    def total_flops(self) -> float:
        """Of all parts."""
        return sum(self.flops.values())

    @property
    def teacher_saved(self) -> float:
        """Share of the teacher's FLOPs not spent."""
        return 1 - self.flops["teacher"] / self.full_flops if self.full_flops else 0.0

    @property
    def flops_saved(self) -> float:
        """Share of all FLOPs not spent."""
        spared = self.full_flops - self.flops["teacher"]
        return spared / (spared + self.total_flops) if self.full_flops else 0.0

    @property
    def teacher_seconds_per_flop(self) -> float:
        """Measured on rank 0, in steps, per FLOP of all ranks."""
        flops = self.flops["teacher"] - self.calibration_flops
        return self.phases.get("teacher", 0.0) / flops if flops else 0.0

    @property
    def time_saved_estimate(self) -> float:
        """Share of wall time not spent, at the measured seconds per FLOP of the teacher so far."""
        flops = self.full_flops - self.flops["teacher"] + self.calibration_flops
        spared = flops * self.teacher_seconds_per_flop - self.phases.get(CALIBRATION, 0.0)
        return spared / (spared + self.seconds) if self.seconds else 0.0


class Accountant:
    """Charges steps to a run's `Costs` and says what the last ones cost.

    peaks: see `configured_peaks`. device: in words. setting: in words, what this session's seconds depend on.
    """

    def __init__(
        self, config: Config, flops: StepFlops, ranks: int, peaks: Optional[Mapping[str, float]], device: str = "CPU"
    ) -> None:
        options = flat(config)
        self.setting = ", ".join([f"{ranks} x {device}", *(f"{key}={options[key]}" for key in TIMED_BY)])
        self._flops = flops
        self._batch = config.data.global_batch
        self._every_layer = config.curriculum.mode == "all_layers"
        self._ranks = ranks
        self._peaks = peaks
        self._depth = len(flops.teacher.blocks)
        self._last = (0, Costs())

    def begin(self, step: int, costs: Costs) -> None:
        """Rates of the next point are over what comes after this moment."""
        self._last = (step, Costs(dict(costs.flops), costs.full_flops, costs.seconds, dict(costs.phases)))

    def charge(self, costs: Costs, block: int, scored: bool) -> None:
        """One step with 1-indexed `block` as the target."""
        flops = self._flops
        deepest = self._depth if self._every_layer else block
        costs.flops["teacher"] += flops.teacher.upto(deepest) * self._batch
        costs.flops["student"] += flops.student_step() * self._batch
        costs.flops["match"] += (flops.match + scored * flops.evidence) * self._batch + scored * flops.cka
        costs.full_flops += flops.teacher.upto(self._depth) * self._batch
        if self.setting not in costs.settings:
            costs.settings.append(self.setting)

    def charge_calibration(self, costs: Costs, until: int) -> None:
        """One pass over the teacher up to 1-indexed block `until`, and the score of each block on the way."""
        flops = self._flops
        costs.calibration_flops = flops.teacher.upto(until) * self._batch
        costs.flops["teacher"] += costs.calibration_flops
        costs.flops["student"] += flops.student.forward * self._batch
        costs.flops["match"] += until * ((flops.match // 3 + flops.evidence) * self._batch + flops.cka)

    def scalars(self, step: int, block: int, costs: Costs) -> dict[str, float]:
        """TensorBoard tag -> value: per step since the last call (or `begin`), and of the run so far.

        step: that has just ended, 0-based. Tags are explained in `leap_dist.monitoring.dashboard`.
        """
        last_step, last = self._last
        self.begin(step + 1, costs)
        steps, seconds = max(1, step + 1 - last_step), costs.seconds - last.seconds
        flops = {part: costs.flops[part] - last.flops[part] for part in PARTS}
        phases = {phase: costs.phases.get(phase, 0.0) - last.phases.get(phase, 0.0) for phase in PHASES}
        return (
            {"images_per_s": steps * self._batch / seconds, "time/step": seconds / steps}
            | {f"time/{phase}": value / steps for phase, value in phases.items()}
            | {f"flops/{part}": value / steps / 1e12 for part, value in flops.items()}
            | {f"total_seconds/{phase}": costs.phases.get(phase, 0.0) for phase in (*PHASES, CALIBRATION)}
            | {f"total_pflops/{part}": costs.flops[part] / 1e15 for part in PARTS}
            | self._savings(block, costs)
            | self._utilisation(flops, seconds)
        )

    def _savings(self, block: int, costs: Costs) -> dict[str, float]:
        time_saved, flops_saved = costs.time_saved_estimate, costs.flops_saved
        values = {
            "total_seconds/all": costs.seconds,
            "flops/teacher_saved_fraction": costs.teacher_saved,
            "savings/flops": flops_saved,
            "savings/time_estimate": time_saved,
        }
        if flops_saved > 0:
            values["savings/efficiency_estimate"] = time_saved / flops_saved
        if block < self._depth and not self._every_layer:
            more = self._flops.teacher.blocks[block] * self._batch
            values["time/next_block_adds"] = more * costs.teacher_seconds_per_flop
        return values

    def _utilisation(self, flops: Mapping[str, float], seconds: float) -> dict[str, float]:
        """Seconds the devices would need at their peaks, over those it took: MFU, also where parts differ in dtype."""
        if self._peaks is None:
            return {}
        ideal = sum(flops[part] / self._peaks[part] for part in PARTS) / self._ranks
        return {"speed/mfu": ideal / seconds}
