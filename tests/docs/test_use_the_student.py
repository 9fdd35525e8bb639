"""docs/use_the_student.md: its lines of Python, its commands and its figures, on a run's folder as a reader has it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import export
import numpy as np
import pytest
import torch
from PIL import Image

import leap_dist
from exports import exported
from leap_dist.deployment.onnx_file import BOUNDS, OPSET
from pages import ROOT, commands
from runs import environment, free_port

PAGE = ROOT / "docs" / "use_the_student.md"
SHOWN = [command for command in commands("page", PAGE.read_text()) if command.script]
CONFIG = """
teacher: {model: any}
student: {model: vit_tiny_patch16_224}
data: {train: digits, val: digits, image_size: 32}
"""
PHOTOS = "/data/photos"  # of the page


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the run that the page names, and a few photographs, one of them broken."""
    exported(tmp_path / "runs" / "leap", classes=3)
    (tmp_path / "runs" / "leap" / "config.yaml").write_text(CONFIG)
    (tmp_path / "photos").mkdir()
    draw = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{name}.jpg")
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@torch.no_grad()
def test_the_python_of_the_page(desk: Path) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict[str, Any] = {"image": Image.open(desk / "photos" / "a.jpg")}
    exec(lines, names)
    images, model = names["images"], leap_dist.load(desk / "runs" / "leap")
    assert images.shape == (1, 3, 32, 32)
    for name, wanted in model(images)._asdict().items():
        assert torch.equal(names[name], wanted), name
    assert names["logits"].shape == (1, 3) and names["model"].record["model"] == "vit_tiny_patch16_224"


def test_the_figures_of_the_page() -> None:
    text = " ".join(PAGE.read_text().split())
    assert f"1e-4, in half precision {BOUNDS['fp16']:g}, in 8 bits {BOUNDS['int8']:g}" in text
    assert BOUNDS["fp32"] == 1e-4
    assert f"opset {OPSET}" in text
    assert f"{export.parse(['x', '--to', 'pt2']).images} if you do not say" in text
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.M)) == set(export.FORMATS)


@pytest.mark.slow
@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_the_commands_of_the_page(shown: Any, desk: Path) -> None:
    words = [str(desk / "photos") if word == PHOTOS else word for word in shown.words]
    words = [str(ROOT / word) if word == shown.script else "2" if word == "8" else word for word in words]
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    port = ["--master-port", free_port()] if words[0] == "torchrun" else []
    done = subprocess.run(
        [*launcher, *port, *words[1:]], env=environment(), timeout=800, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    if shown.value("--out"):
        assert (desk / "photos.parquet").is_file() and "features of 3 images; 1 cannot be read" in done.stdout
        assert "broken.png" in (desk / "photos.parquet.bad.jsonl").read_text()
    else:
        written = {path.name for path in (desk / "runs" / "leap" / "export").iterdir()}
        wanted = {"student.onnx"} | {f"student.{kind}.onnx" for kind in ("fp16", "int8") if f"--{kind}" in words}
        assert written == wanted
        assert ("kNN on" in done.stdout) == ("--int8" in words) and ("x\n" in done.stdout) == ("--benchmark" in words)
