"""`leap_dist.load`: a student in one line, with the run's own pixels and without the training's libraries."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import leap_dist
from exports import exported
from leap_dist.config import DataConfig
from leap_dist.data import eval_transform
from leap_dist.data.crops import decode


def timm_model(folder: Path, name: str = "student") -> torch.nn.Module:
    about = json.loads((folder / f"{name}.json").read_text())
    model = timm.create_model(about["model"], **about["kwargs"]).eval()
    timm.models.load_checkpoint(model, str(folder / f"{name}.safetensors"))
    return model


@torch.no_grad()
def test_outputs_are_timms_own(tmp_path: Path) -> None:
    model, images = leap_dist.load(exported(tmp_path / "run", classes=7)), torch.randn(2, 3, 32, 32)
    plain = timm_model(tmp_path / "run")
    found, tokens = model(images), plain.forward_features(images)
    assert not model.training
    assert torch.equal(found.tokens, tokens[:, 1:]) and torch.equal(found.cls, tokens[:, 0])
    assert torch.equal(found.pooled, tokens[:, 1:].mean(1)) and torch.equal(found.logits, plain(images))


@torch.no_grad()
def test_without_a_classifier_there_are_no_logits(tmp_path: Path) -> None:
    assert leap_dist.load(exported(tmp_path / "run"))(torch.zeros(1, 3, 32, 32)).logits is None


@pytest.mark.parametrize(
    ("mode", "interpolation"), [("RGB", "bilinear"), ("L", "bilinear"), ("RGBA", "bilinear"), ("RGB", "bicubic")]
)
def test_images_are_prepared_as_the_runs_evaluation_does(mode: str, interpolation: str, tmp_path: Path) -> None:
    model = leap_dist.load(exported(tmp_path / "run", interpolation=interpolation))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 71, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    stored = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stored, "png")
    data = DataConfig(train="", image_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), crop_pct=0.8)
    wanted = eval_transform(data, bicubic=interpolation == "bicubic")(decode(stored.getvalue()))
    assert torch.equal(model.preprocess(Image.open(stored)), wanted)


def test_a_file_a_folder_and_the_average(tmp_path: Path) -> None:
    folder = exported(exported(tmp_path / "run"), "student_ema")
    student, ema = (leap_dist.load(path) for path in (folder, folder / "student_ema.safetensors"))
    assert not torch.equal(student.student.backbone.pos_embed, ema.student.backbone.pos_embed)
    again = leap_dist.load(folder, ema=True)
    assert torch.equal(again.student.backbone.pos_embed, ema.student.backbone.pos_embed)
    with pytest.raises(FileNotFoundError, match=r"empty: no student\.safetensors"):
        leap_dist.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no student_ema\.safetensors"):
        leap_dist.load(exported(tmp_path / "other"), ema=True)
    for name in ("tiny", "small"):
        exported(tmp_path / "cohort" / name)
    with pytest.raises(FileNotFoundError, match=r"did you mean \S+cohort/small or \S+cohort/tiny\?"):
        leap_dist.load(tmp_path / "cohort")


@pytest.mark.seconds
def test_it_needs_torch_timm_and_safetensors_only(tmp_path: Path) -> None:
    """What is imported beyond these three, and xxHash, which tells a damaged file; nothing of the training."""
    folder = exported(tmp_path / "run")
    script = (
        "import sys, torch, timm, safetensors.torch; before = set(sys.modules); import leap_dist; "
        f"leap_dist.load({str(folder)!r}); print(*{{name.partition('.')[0] for name in set(sys.modules) - before}})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    foreign = set(done.stdout.split()) - set(sys.stdlib_module_names)
    assert foreign <= {"leap_dist", "torch", "torchvision", "timm", "safetensors", "numpy", "PIL", "sympy", "xxhash"}
