"""tools/train_teacher.py from the command line: what it says and writes, and that it goes on after SIGTERM."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import analyze
import pytest
import train_teacher

from leap_dist.pretraining import demo
from leap_dist.pretraining.demo import TeacherTraining

pytestmark = pytest.mark.seconds

SMALL = [
    "data.train=digits", "data.val=digits", "data.image_size=32", "data.global_batch=80", "data.workers=0",
    "kwargs={patch_size: 16, embed_dim: 16, depth: 2, num_heads: 1}", "evaluate_every=1", "data.augment=crop",
    "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]",
]  # fmt: skip


def test_a_teacher_and_the_report_on_its_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "teacher"
    assert train_teacher.main(["shards", *SMALL, "epochs=2", f"output={output}"]) == 0
    about = json.loads((output / "teacher.json").read_text())
    assert about["finished"] and [row["epoch"] for row in about["history"]] == [1, 2]
    assert capsys.readouterr().out == f"{output}: validation accuracy {about['val_accuracy']:.1%}\n"
    blocks = ["blocks", str(output / "teacher.safetensors"), "--train", "digits", "--data", "digits", "--workers", "0"]
    assert analyze.main([*blocks, "--train-images", "100", "--images", "50", "--out", str(output / "blocks")]) == 0
    assert "teacher: 100 images to train on, 50 held out" in capsys.readouterr().out
    assert {path.name for path in (output / "blocks").iterdir()} == {"blocks.csv", "blocks.png", "cka.csv", "table.txt"}


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "teacher"
    command = ["shards", *SMALL, "epochs=15", f"output={output}"]
    process = subprocess.Popen(
        [sys.executable, train_teacher.__file__, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 120
    while not (output / "teacher.json").exists():  # of the first epoch
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == f"{output}: stopped, everything is saved; the same command goes on\n"
    assert not json.loads((output / "teacher.json").read_text())["finished"]
    assert train_teacher.main(command) == 0
    about = json.loads((output / "teacher.json").read_text())
    assert about["finished"] and [row["epoch"] for row in about["history"]] == list(range(1, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shards", *SMALL, "data.val=nowhere"], "data.val=nowhere: no such folder"),
        (["shards"], "data.train is required"),
        (["shards", "--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_teacher.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_teacher: error: {message}") and error.count("\n") == 1


def test_the_demo_is_told_only_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(demo, "train_teacher", lambda config, out: asked.append((config, out)) or 0.5)
    for arguments in ([], ["--epochs", "2", "--seed", "0"]):
        assert train_teacher.main(["demo", "--out", str(tmp_path / "t.safetensors"), *arguments]) == 0
    assert asked == [(c, tmp_path / "t.safetensors") for c in (TeacherTraining(), TeacherTraining(epochs=2))]


def test_help_shows_the_recipe_with_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_teacher.parse(["shards", "--help"])
    shown = capsys.readouterr().out
    assert "ema_decay=0.999" in shown and "data.augment=leap" in shown
