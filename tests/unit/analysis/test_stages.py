"""Hierarchical models under analysis: every stage at its own width and grid, against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from leap_dist.analysis import SurveyOptions, survey, timm_subject
from leap_dist.analysis.spectra import LEVELS
from leap_dist.config import TeacherConfig
from leap_dist.data import Batch
from stubs import ONE

SWIN = "swin_small_patch4_window7_224"
SMALL = {"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}
VIT = {"patch_size": 16, "embed_dim": 18, "depth": 2, "num_heads": 2}
IMAGES = torch.randn(10, 3, 64, 64, generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


class Loader:
    """All images at once."""

    num_samples = len(IMAGES)

    def __iter__(self):
        ids = torch.arange(len(IMAGES))
        yield Batch(IMAGES, torch.zeros_like(ids), ids, ids)

    def __len__(self) -> int:
        return 1


def dims_at(squares: np.ndarray) -> np.ndarray:
    share = squares.cumsum(-1) / squares.sum(-1, keepdims=True)
    return np.stack([(share >= level - 1e-9).argmax(-1) + 1 for level in LEVELS], -1)


def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "swin.safetensors"
    save_file(timm.create_model(SWIN, num_classes=0, img_size=64, **SMALL).state_dict(), path)
    return path


def test_every_stage_is_timms_and_the_last_is_normed(tmp_path: Path) -> None:
    subject = timm_subject(TeacherConfig(model=SWIN, kwargs=SMALL, weights=str(weights(tmp_path))), "s", 64, CPU)
    torch.manual_seed(3)
    model = timm.create_model(SWIN, num_classes=0, img_size=64, **SMALL).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(IMAGES, output_fmt="NCHW", intermediates_only=True)
        final = model.forward_features(IMAGES)
    found = subject.layers(IMAGES)
    assert subject.grids == ((16, 16), (8, 8), (4, 4), (2, 2)) and subject.grid == (2, 2)
    for tokens, truth in zip(found, maps[:-1], strict=False):
        assert torch.equal(tokens, truth.flatten(2).mT)
    assert torch.equal(found[-1], final.flatten(1, 2)) and len(found) == len(maps)


def test_the_last_stage_of_a_swin_by_the_papers_definitions(tmp_path: Path) -> None:
    """SVD of every image, energy in the shared basis, SEP along the channels: what its table has of Swin-Small."""
    subject = timm_subject(TeacherConfig(model=SWIN, kwargs=SMALL, weights=str(weights(tmp_path))), "s", 64, CPU)
    teacher = TeacherConfig(model="vit_tiny_patch16_224", kwargs=VIT, weights="random")
    reference = timm_subject(teacher, "t", 64, CPU)
    analysis = survey([subject], reference, Loader(), ONE, SurveyOptions(pairs=2, k=2, batch=10, shuffles=1))
    view = analysis.models[0].blocks[-1].views["uncentred"]
    rows = subject.layers(IMAGES)[-1].double().numpy()
    svd = dims_at(np.linalg.svd(rows, compute_uv=False) ** 2)
    np.testing.assert_allclose(view.dims.mean, svd.mean(0))
    _, sigma, axes = np.linalg.svd(rows.reshape(-1, rows.shape[-1]), full_matrices=False)
    np.testing.assert_array_equal(view.dataset_dims, dims_at(sigma**2))
    captured = dims_at(((rows[[0, 2, 5, 7]] @ axes.T) ** 2).sum(1))  # of the four images that are looked at again
    np.testing.assert_allclose(view.captured_dims.mean, captured.mean(0))
    power = np.abs(np.fft.fft(rows, axis=-1)) ** 2
    share = (power.cumsum(-1) / power.sum(-1, keepdims=True)).mean((0, 1))
    np.testing.assert_allclose(view.sep_curve, share, atol=1e-6)


def test_cka_of_stages_is_taken_on_the_teachers_grid(tmp_path: Path) -> None:
    subject = timm_subject(TeacherConfig(model=SWIN, kwargs=SMALL, weights="random"), "s", 64, CPU)
    reference = timm_subject(TeacherConfig(model="vit_tiny_patch16_224", kwargs=VIT, weights="random"), "t", 64, CPU)
    analysis = survey([subject], reference, Loader(), ONE, SurveyOptions(pairs=2, k=2, batch=10, shuffles=1))
    matrix = analysis.cka[0].matrix
    assert matrix.shape == (4, 2)
    for stage, (tokens, grid) in enumerate(zip(subject.layers(IMAGES), subject.grids, strict=True)):
        image = tokens.mT.unflatten(2, grid)
        x = F.interpolate(image, (4, 4), mode="bilinear").flatten(2).mT.flatten(0, 1).double()
        y = reference.layers(IMAGES)[-1].flatten(0, 1).double()
        x, y = x - x.mean(0), y - y.mean(0)
        cka = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
        assert matrix[stage, 1] == pytest.approx(cka.item(), abs=1e-5)
