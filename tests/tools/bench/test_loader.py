"""The loader's benchmark: its sources, its arithmetic, and one small run."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import loader
from bench.loader import Pass
from leap_dist.config import Config, StudentConfig, TeacherConfig
from leap_dist.errors import UserError
from leap_dist.models.flops import student_step_flops, teacher_flops


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    Image.fromarray(pixels.numpy()).resize((48, 36)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of two classes."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(8):
        path = folder / f"class{number % 2}" / f"{number}.JPEG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(number))
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_tar_and_a_folder_are_the_same_source(source: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(source, "set")
    found = list(loader.read_images(source))
    assert [name for name, _ in found] == ["class0"] * 4 + ["class1"] * 4 and found[4][1] == jpeg(1)
    assert sorted(loader.read_images(tmp_path / "set.tar")) == sorted(found)


def test_a_source_without_images_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "not.tar").write_bytes(b"no tar")
    for argument, message in ((tmp_path / "not.tar", "neither a folder nor a tar"), (tmp_path, r"no *.jpg")):
        assert loader.main([str(argument)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(UserError, match="neither"):
        list(loader.read_images(tmp_path / "nowhere"))


def test_ratios_are_medians_of_the_rounds() -> None:
    ours = [Pass(100, 1.0, 2.0), Pass(100, 4.0, 2.0), Pass(100, 2.0, 2.5)]
    baseline = [Pass(100, 2.0, 3.0), Pass(100, 4.0, 3.0), Pass(100, 6.0, 5.0)]
    assert loader.median_ratio(ours, baseline, "wall") == 2.0  # of 2, 1, 3
    assert loader.median_ratio(ours, baseline, "cpu") == 1.5
    assert loader.core_rate(ours) == 50


def test_a_pass_shorter_than_a_tick_of_the_cpu_clock_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "cpu_seconds", lambda: 5.0)
    measured = loader.one_pass([("images", [0, 1, 2])])
    assert measured.images == 3 and measured.cpu == 1 / os.sysconf("SC_CLK_TCK")
    assert loader.core_rate([measured]) == pytest.approx(3 * os.sysconf("SC_CLK_TCK"))
    assert loader.median_ratio([measured], [measured], "cpu") == 1


def test_a_slow_loader_stalls_its_consumer_for_what_is_left_of_a_batch() -> None:
    def batches() -> object:
        for _ in range(4):
            time.sleep(0.05)
            yield "batch"

    waits = loader.stalls(batches(), step_s=0.01)  # nothing is loaded while the consumer works: 50 ms each
    assert len(waits) == 3 and all(wait > 45 for wait in waits)
    shares = loader.stall_rows({"x": [0.5, 2.0, 2.0, 50.0]})[1].split()[1:]
    assert shares == ["25.0%", "50.0%", "0.0%", "0.0%", "25.0%", "0.0%", "0.0%"]


@pytest.mark.seconds
def test_demand_falls_with_depth_as_the_flops_rise() -> None:
    model = {"model": "vit_tiny_patch16_224", "kwargs": {"embed_dim": 48, "depth": 8, "num_heads": 3}}
    run = Config(teacher=TeacherConfig(**model), student=StudentConfig(**model))
    teacher, student = teacher_flops(run.teacher, 224), 3 * student_step_flops(run.student, 224).forward
    rows = [line.split() for line in loader.demand_rows(run, 1.0, None, per_core=100.0)[1:]]
    assert [int(row[0]) for row in rows] == list(range(1, 9))
    for row in rows:
        needed = 1e12 / (teacher.upto(int(row[0])) + student)
        assert float(row[2]) == pytest.approx(needed, rel=0.01)
        assert float(row[3]) == pytest.approx(needed / 100, abs=0.06)
    last = loader.demand_rows(run, 1.0, 500.0, per_core=100.0)[-1]
    assert last.split()[2:4] == ["500", "5.0"] and "data.workers" not in last
    assert loader.demand_rows(run, 1.0, 900.0, per_core=100.0)[-1].endswith("<- more than data.workers=8 give")


def test_a_small_run_reports_every_pipeline(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--image-size", "16", "--workers", "1", "--batch", "4", "--rounds", "2", "--copies", "2"]
    assert loader.main([str(source), *options]) == 0
    out = capsys.readouterr().out
    assert "16 images an epoch, 16 pixels" in out
    for name in (loader.OURS, loader.FOR_GPU, loader.STREAMING, "ImageFolder, PIL"):
        (line, *_) = [line for line in out.splitlines() if line.startswith(f"{name:22}")]
        assert float(line[22:].split()[0]) > 0
