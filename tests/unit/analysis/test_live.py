"""What the spectra in TensorBoard are of, and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from leap_dist.analysis.live import IMAGES, Spectroscope
from stubs import ONE, StubLoader, StubTeacher, scalars, stub_config, stub_trainer


def effective_rank(tokens: Tensor) -> float:
    """Of (B, N, D), by LAPACK's SVD; the mean over images."""
    rows = tokens.detach().double().numpy()
    sigma = np.linalg.svd(rows - rows.mean(1, keepdims=True), compute_uv=False)
    share = sigma / sigma.sum(-1, keepdims=True) + 1e-30
    return np.exp(-(share * np.log(share)).sum(-1)).mean()


def test_every_so_many_steps_student_tokens_and_target_are_looked_at(tmp_path: Path) -> None:
    """Six steps, blocks 1, 2, 3, 4, 4, 4; points in TensorBoard only every fourth step, spectra every second."""
    config = stub_config(tmp_path, "telemetry.spectra_every=2", "telemetry.every=4", "curriculum.threshold=-1")
    trainer = stub_trainer(config)
    with torch.no_grad():
        student = trainer.learner.engine.module.student(StubLoader().epoch(0).__next__().images).patch
    trainer.run()
    trainer.close()
    targets = [
        StubTeacher().at(block, list(StubLoader().epoch(epoch))[index].images).patch
        for block, epoch, index in ((1, 0, 0), (3, 0, 2), (4, 1, 1))
    ]
    expected = [effective_rank(target) for target in targets]
    assert scalars(tmp_path, "spectra/target/effective_rank") == pytest.approx(expected, rel=1e-4)
    shown = scalars(tmp_path, "spectra/student/effective_rank")
    assert shown[0] == pytest.approx(effective_rank(student), rel=1e-4) and len(shown) == 3
    tags = {tag.rpartition("/")[2] for tag in spectra_tags(tmp_path)}
    assert tags == {"dims_80", "dims_90", "dims_95", "dims_99", "effective_rank", "sep_50", "sep_90"}


def spectra_tags(output: Path) -> list[str]:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return [tag for tag in events.Tags()["scalars"] if tag.startswith("spectra/")]


def test_by_default_nothing_is_looked_at(tmp_path: Path) -> None:
    trainer = stub_trainer(stub_config(tmp_path))
    trainer.run()
    trainer.close()
    assert spectra_tags(tmp_path) == []


def test_a_look_is_at_the_first_images_of_the_first_patch_tokens_only(tmp_path: Path) -> None:
    head = torch.nn.Bilinear(5, 5, 1)  # any module of two inputs
    scope = Spectroscope(stub_config(tmp_path, "telemetry.spectra_every=1"), ONE, head)
    images = [torch.randn(2 * IMAGES, 6, 5) for _ in range(4)]
    scope.before(0)
    head(images[0][:, 0], images[1][:, 0])  # class tokens
    head(images[0], images[1])
    head(images[2], images[3])  # the next micro-batch
    found = scope.scalars()
    assert found["spectra/student/effective_rank"] == pytest.approx(effective_rank(images[0][:IMAGES]), rel=1e-5)
    assert found["spectra/target/effective_rank"] == pytest.approx(effective_rank(images[1][:IMAGES]), rel=1e-5)
    assert scope.scalars() == {} and not head._forward_pre_hooks


def test_only_rank_0_looks(tmp_path: Path) -> None:
    head = torch.nn.Bilinear(5, 5, 1)
    Spectroscope(stub_config(tmp_path, "telemetry.spectra_every=1"), replace(ONE, rank=1, size=2), head).before(0)
    assert not head._forward_pre_hooks
