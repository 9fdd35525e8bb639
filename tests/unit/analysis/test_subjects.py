"""What the analyses are given: timm's own tokens of every block, through the final norm, without prefix tokens."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from leap_dist.analysis import Preprocessing, exported_at, exported_subject, native_image_size, timm_subject
from leap_dist.config import StudentConfig, TeacherConfig
from leap_dist.errors import UserError
from leap_dist.models import build_student

CPU = torch.device("cpu")
SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **SMALL).eval()


@pytest.mark.parametrize("exported", [False, True])
def test_layers_are_timms(model: torch.nn.Module, tmp_path: Path, exported: bool) -> None:
    path = tmp_path / "student.safetensors"
    save_file(model.state_dict(), path)
    if exported:
        about = {"model": "vit_tiny_patch16_224", "kwargs": {"num_classes": 0, "img_size": 32, **SMALL}}
        path.with_suffix(".json").write_text(
            json.dumps(about | {"image_size": 32, "mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.9})
        )
        subject = exported_subject(path, "mine", CPU)
        assert subject.preprocessing == Preprocessing((0.1,) * 3, (0.2,) * 3, 0.9)
    else:
        config = TeacherConfig(model="vit_tiny_patch16_224", kwargs=SMALL, weights=str(path))
        subject = timm_subject(config, "mine", 32, CPU)
        assert subject.preprocessing == Preprocessing((0.5,) * 3, (0.5,) * 3, 0.875)  # what timm says of this model
    assert (subject.name, subject.image_size, subject.grid) == ("mine", 32, (4, 4))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_intermediates(images, norm=True, output_fmt="NLC", intermediates_only=True)
        last = model.forward_features(images)[:, 1:]
    found = subject.layers(images)
    assert len(found) == 3 and not any(tokens.requires_grad for tokens in found)
    for tokens, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(tokens, truth)
    torch.testing.assert_close(found[-1], last)


def test_native_image_sizes() -> None:
    assert native_image_size("vit_small_patch14_dinov2") == 518
    assert native_image_size("vit_tiny_patch16_384.augreg_in21k_ft_in1k") == 384
    assert native_image_size("no_such_model") == 224


def export(folder: Path, model: str, **kwargs: Any) -> tuple[Path, torch.nn.Module]:
    """An untrained student of 32 pixels, as a run exports it."""
    torch.manual_seed(0)
    student = build_student(StudentConfig(model=model, kwargs=kwargs), 32).eval()
    path = folder / "student.safetensors"
    save_file(student.backbone.state_dict(), path)
    about = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    path.with_suffix(".json").write_text(json.dumps(asdict(student.recipe) | about))
    return path, student.backbone


def test_a_transformer_at_another_size_is_timms_own_of_that_size(tmp_path: Path) -> None:
    path, model = export(tmp_path, "vit_tiny_patch16_224", **SMALL)
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=48, **SMALL).eval()
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other, interpolation="bicubic", antialias=True))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        truth = other.forward_features(images)
    found = exported_at(path, 48, CPU)(images)
    torch.testing.assert_close(found.patch, truth[:, 1:])
    torch.testing.assert_close(found.cls, truth[:, 0])
    assert not found.patch.requires_grad


def test_a_convolutional_student_takes_any_size(tmp_path: Path) -> None:
    path, model = export(tmp_path, "mobilenetv3_small_050")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        truth = model.forward_features(images)
    torch.testing.assert_close(exported_at(path, 64, CPU)(images).patch, truth.flatten(2).transpose(1, 2))


def test_a_student_of_one_size_alone_says_so(tmp_path: Path) -> None:
    path, _ = export(tmp_path, "cait_xxs24_224", depth=1, embed_dim=24, num_heads=2)
    with pytest.raises(UserError, match="takes images of one size alone"):
        exported_at(path, 64, CPU)
