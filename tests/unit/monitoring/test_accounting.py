"""FLOPs, seconds and savings of a run, against sums by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from leap_dist.analysis import token_summary
from leap_dist.models.flops import StepFlops, StudentFlops, TeacherFlops
from leap_dist.monitoring.accounting import PARTS, Accountant, Costs, configured_peaks, peak_tflops
from leap_dist.monitoring.dashboard import layout
from leap_dist.runtime.timing import PHASES
from stubs import stub_config

# Per image: teacher 10, 10, 15, 10 and 2 around them, student 4 + 8, match 3; a score 2 an image and 1 a step. Batch 4.
FLOPS = StepFlops(TeacherFlops(2, (10, 10, 15, 10), 0), StudentFlops(4, 8), match=3, evidence=2, cka=1)


def test_steps_are_charged_for_the_blocks_that_ran(tmp_path: Path) -> None:
    accountant, costs = Accountant(stub_config(tmp_path), FLOPS, 1, None), Costs()
    accountant.charge(costs, block=1, scored=True)
    accountant.charge(costs, block=3, scored=False)
    assert costs.flops == {"teacher": 4 * (12 + 37), "student": 4 * 24, "match": 4 * (3 + 2) + 1 + 4 * 3}
    assert costs.full_flops == 4 * 2 * 47
    assert costs.teacher_saved == pytest.approx(1 - 49 / 94)
    assert costs.flops_saved == pytest.approx(180 / (180 + 196 + 96 + 33))


def test_every_layer_saves_nothing(tmp_path: Path) -> None:
    config = stub_config(tmp_path, "curriculum.mode=all_layers", "curriculum.start=null")
    accountant, costs = Accountant(config, FLOPS, 1, None), Costs()
    accountant.charge(costs, block=2, scored=True)
    assert costs.teacher_saved == 0.0 and costs.flops["teacher"] == 4 * 47


def test_points_are_per_step_since_the_last_point_and_savings_of_the_whole_run(tmp_path: Path) -> None:
    accountant = Accountant(stub_config(tmp_path), FLOPS, 2, dict.fromkeys(PARTS, 100.0))
    costs = Costs(seconds=50.0, phases={"teacher": 30.0})
    costs.flops["teacher"], costs.full_flops = 1000.0, 3000.0
    accountant.begin(10, costs)
    for _ in range(2):
        accountant.charge(costs, block=2, scored=False)
    costs.seconds, costs.phases = 54.0, {"teacher": 33.0, "data": 0.5}
    points = accountant.scalars(11, 2, costs)
    assert points["images_per_s"] == 2 * 4 / 4.0
    assert points["time/step"] == 2.0
    assert (points["time/teacher"], points["time/data"], points["time/match"]) == (1.5, 0.25, 0.0)
    assert points["flops/teacher"] == pytest.approx(4 * 22e-12)
    assert points["total_seconds/teacher"] == 33.0 and points["total_seconds/all"] == 54.0
    spent = 1000 + 2 * 4 * 22
    assert points["total_pflops/teacher"] == pytest.approx(spent * 1e-15)
    per_flop, spared = 33.0 / spent, 3000 + 2 * 4 * 47 - spent
    assert points["savings/time_estimate"] == pytest.approx(spared * per_flop / (spared * per_flop + 54.0))
    assert points["savings/flops"] == pytest.approx(spared / (spared + spent + 2 * 4 * (12 + 3)))
    assert points["savings/efficiency_estimate"] == points["savings/time_estimate"] / points["savings/flops"]
    assert points["time/next_block_adds"] == pytest.approx(4 * 15 * per_flop)  # block 3
    # Two ranks, 100 FLOP/s each: 8 images of 22 + 12 + 3 FLOPs in 4 seconds.
    assert points["speed/mfu"] == pytest.approx(8 * 37 / 4.0 / 200)


def test_a_calibration_says_nothing_about_the_speed_of_steps(tmp_path: Path) -> None:
    """It took 30 s, mostly to read the teacher; a step's teacher takes 0.1 s at block 1 of 12 FLOPs for 47."""
    accountant, costs = Accountant(stub_config(tmp_path), FLOPS, 1, None), Costs()
    accountant.charge_calibration(costs, until=4)
    for _ in range(100):
        accountant.charge(costs, block=1, scored=True)
    costs.phases, costs.seconds = {"calibration": 30.0, "teacher": 10.0}, 60.0
    assert costs.teacher_seconds_per_flop == pytest.approx(0.1 / (4 * 12))
    saved = 100 * 0.1 * (47 / 12 - 1) - 30.0
    assert costs.time_saved_estimate == pytest.approx(saved / (saved + 60.0))
    assert accountant.scalars(99, 1, costs)["total_seconds/calibration"] == 30.0


def test_the_last_block_has_no_next_one_and_an_unknown_peak_no_utilisation(tmp_path: Path) -> None:
    accountant, costs = Accountant(stub_config(tmp_path), FLOPS, 1, None), Costs()
    accountant.charge(costs, block=4, scored=False)
    costs.seconds, costs.phases = 1.0, {"teacher": 0.5}
    points = accountant.scalars(0, 4, costs)
    assert points["savings/flops"] == points["savings/time_estimate"] == 0.0
    assert not {"time/next_block_adds", "speed/mfu", "savings/efficiency_estimate"} & points.keys()


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156.0),
        ("NVIDIA A10", "fp16", False, 125.0),
        ("NVIDIA A10G", "fp16", False, 70.0),
        ("NVIDIA H100 80GB HBM3", "fp32", False, 67.0),
        ("NVIDIA H100 PCIe", "bf16", False, 756.0),
        ("NVIDIA H100 80GB HBM2e", "bf16", False, None),
        ("NVIDIA L40S", "bf16", False, 362.0),
        ("NVIDIA T1000", "bf16", False, None),
        ("NVIDIA H200", "bf16", False, 989.0),
        ("NVIDIA H200 NVL", "bf16", False, 835.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", False, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", False, None),
    ],
)
def test_peaks_are_known_or_not_guessed(name: str, dtype: str, tf32: bool, tflops: float | None) -> None:
    assert peak_tflops(name, dtype, tf32) == tflops


def test_a_configured_peak_holds_on_any_device(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert configured_peaks(stub_config(tmp_path), cpu) is None
    assert configured_peaks(stub_config(tmp_path, "telemetry.peak_tflops=2"), cpu) == dict.fromkeys(PARTS, 2e12)


def test_parts_in_different_dtypes_have_their_own_peaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    peaks = configured_peaks(stub_config(tmp_path, "teacher.dtype=bf16"), torch.device("cuda"))
    assert peaks == {"teacher": 989e12, "student": 67e12, "match": 67e12}


def test_every_chart_of_the_layout_shows_a_tag_that_is_written(tmp_path: Path) -> None:
    """And every tag that the accountant writes is on some chart."""
    accountant, costs = Accountant(stub_config(tmp_path), FLOPS, 1, dict.fromkeys(PARTS, 1.0)), Costs()
    accountant.charge(costs, block=1, scored=True)
    costs.seconds, costs.phases = 1.0, dict.fromkeys(PHASES, 0.1)
    written = accountant.scalars(0, 1, costs).keys()
    trainers = {"loss/total", "loss/patch", "loss/cls", "loss/ce", "loss/kd", "lr", "memory/peak_gib"}
    trainers |= {"curriculum/block", "curriculum/cka", "curriculum/ema", "curriculum/threshold", "evaluation/patch_knn"}
    trainers |= {"update/grad_norm"}
    trainers |= {
        f"spectra/{side}/{name}" for side in ("student", "target") for name in token_summary(torch.eye(4)[None])
    }
    everything = ["telemetry.spectra_every=1", "telemetry.peak_tflops=1", "student.num_classes=2"]
    config = stub_config(tmp_path, *everything, "evaluation.every_epochs=1", "data.val=digits")
    patterns = [tag for charts in layout(config).values() for _, tags in charts.values() for tag in tags]
    for pattern in patterns:
        assert any(re.match(pattern, tag) for tag in written | trainers), pattern
    for tag in written:
        assert any(re.match(pattern, tag) for pattern in patterns), tag
