"""Students that are no vision transformers, as runs: every ZeRO stage, two ranks, a cut and a resume to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from leap_dist.models import load_student
from runs import launch, run_ok, scalars, write_config

# With batch norms, and hierarchical. Both see the teacher's 16 pixels at 64, so that their grids are 2 x 2, not 1 x 1.
KINDS = {
    "batchnorm": {"model": "test_resnet", "kwargs": {}, "image_size": 64, "ema_decay": 0.5},
    "hierarchical": {"model": "swin_tiny_patch4_window7_224", "image_size": 64,
                     "kwargs": {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}},
}  # fmt: skip
# A convolution behind the pooling, which is in the class token alone.
FROZEN_PART = {"model": "mobilenetv4_conv_small_035", "kwargs": {}, "image_size": 64}
SHORT = ("epochs=0.26", "checkpoint.every_steps=3", "checkpoint.keep=9", "curriculum.threshold=0.2")


def cut_at_step_3(run: Path, copy: Path) -> None:
    """A copy of a run as a kill after the third step would have left it."""
    shutil.copytree(run, copy)
    for later in (copy / "checkpoints").glob("step*"):
        if later.name != "step00000003":
            shutil.rmtree(later)
    (copy / "checkpoints" / "latest").write_text("step00000003")


def resumed_is_uncut(tmp_path: Path, kind: str, *overrides: str) -> Path:
    """Run, cut, resume; every file that the run exports must be the same to the bit. Returns the run's folder."""
    config = write_config(tmp_path, student=KINDS[kind], data={"val": "digits"})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_ok(config, f"output={whole}", *SHORT, *overrides)
    cut_at_step_3(whole, cut)
    run_ok(config, f"output={cut}", "resume=auto", *SHORT, *overrides)
    exports = sorted(path.name for path in whole.glob("student*.safetensors"))
    assert exports == ["student.safetensors"] + ["student_ema.safetensors"] * (kind == "batchnorm")
    for name in exports:
        theirs = load_file(cut / name)
        for key, tensor in load_file(whole / name).items():
            assert torch.equal(tensor, theirs[key]), (name, key)
    assert scalars(whole, "loss/total")[5] == scalars(cut, "loss/total")[5]
    return whole


@pytest.mark.slow
def test_a_student_with_batch_norms_continues_to_the_bit(tmp_path: Path) -> None:
    """On two ranks at ZeRO stage 2; the average of its weights is judged by itself."""
    run = resumed_is_uncut(tmp_path, "batchnorm", "engine.zero_stage=2", "evaluation.probe_epochs=1")
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["student_ema_patch_knn"] <= 1 and 0 <= summary["student_ema_patch_probe"] <= 1
    mine, averaged = load_file(run / "student.safetensors"), load_file(run / "student_ema.safetensors")
    assert mine.keys() == averaged.keys()
    assert any(not torch.equal(mine[key], averaged[key]) for key in mine if key.endswith("weight"))
    about = json.loads((run / "student.json").read_text())
    assert (about["cls"], about["grid"], about["image_size"]) == ("pooled", [2, 2], 64)
    student = load_student(run)
    assert student(torch.zeros(1, 3, 16, 16)).patch.shape == (1, 4, student.width)  # it resizes them itself


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (1, "fp32"), (3, "fp32")]
)
def test_every_stage_and_precision_continues_to_the_bit(kind: str, stage: int, precision: str, tmp_path: Path) -> None:
    resumed_is_uncut(
        tmp_path, kind, f"engine.zero_stage={stage}", f"engine.precision={precision}", "evaluation.probe_epochs=1"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["frozen", "hierarchical"])
@pytest.mark.parametrize(("stage", "threshold"), [(0, 0), (2, 0), (3, 0), (3, 10**9)])  # of what stage 3 leaves whole
@pytest.mark.parametrize(("ranks", "others"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_has_weights_averages_and_running_statistics(
    kind: str, stage: int, threshold: int, ranks: int, others: int, tmp_path: Path
) -> None:
    """A run that is over exports what its last checkpoint holds: all of it, whoever reads it.

    The one with batch norms also has a part that is not trained, since no loss reaches it, and that no seed gives.
    A cut one goes on: the hierarchical student, whose numbers do not depend on who has which image, with the losses of
    the uncut one but for rounding; batch norms normalise by a rank's own images, so theirs go on another way.
    """
    sharding = {"zero_optimization": {"stage3_param_persistence_threshold": threshold}} if stage == 3 else {}
    student = {**FROZEN_PART, "weights": str(tmp_path / "start.pth")} if kind == "frozen" else KINDS[kind]
    torch.save(timm.create_model(student["model"], **student["kwargs"]).state_dict(), tmp_path / "start.pth")
    config = write_config(
        tmp_path, student={**student, "ema_decay": 0.5}, objective={"cls_weight": 0.0},
        engine={"zero_stage": stage, "deepspeed": sharding},
    )  # fmt: skip
    run, cut = tmp_path / "run", tmp_path / "cut"
    run_ok(config, *SHORT, processes=ranks)
    cut_at_step_3(run, cut)
    exported = {path.name: load_file(path) for path in run.glob("student*.safetensors")}
    assert len(exported) == 2 and all(
        tensor.isfinite().all() for tensor in exported["student_ema.safetensors"].values()
    )
    for name in exported:
        (run / name).unlink()
    run_ok(config, *SHORT, "resume=auto", processes=others)
    for name, tensors in exported.items():
        again = load_file(run / name)
        assert again.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, again[key]), (name, key)
    run_ok(config, *SHORT, f"output={cut}", "resume=auto", processes=others)
    losses, uncut = scalars(cut, "loss/total"), scalars(run, "loss/total")
    assert losses.keys() == uncut.keys()
    if kind == "hierarchical":
        assert max(abs(losses[step] - uncut[step]) for step in uncut) < 1e-3
    assert all(tensor.isfinite().all() for name in exported for tensor in load_file(cut / name).values())


@pytest.mark.seconds
def test_batch_norms_are_not_synchronised_without_gpus(tmp_path: Path) -> None:
    config = write_config(tmp_path, student=KINDS["batchnorm"])
    done = launch(config, "student.sync_batchnorm=true", processes=1)
    assert done.returncode != 0 and "torch synchronises batch norms on GPUs only" in done.stdout
    assert "Traceback" not in done.stdout
