"""Stands in for a training run under a sweep: python fake_run.py .../train.py --config RUN.yaml

What it does follows from optim.lr: 13 fails, in the words of two ranks; 77 takes until it is killed, the first time; 22
waits until two runs are under way. It notes its start in `started` beside the run folders.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import yaml

from leap_dist.config import Config, load, members, to_yaml


def summary(config: dict) -> dict:
    """Numbers that differ for every seed, learning rate and number of epochs."""
    seed, lr, epochs = config["seed"], config["optim"]["lr"], config["epochs"]
    return {
        "student_patch_knn": 0.5 + 0.01 * seed**2 + lr,
        "student_patch_probe": 0.6 + 0.02 * seed,
        "epochs": epochs,
        "flops": {"teacher": epochs * (seed + 2) * (3 if config["curriculum"]["mode"] == "fixed" else 2), "student": 5},
        "train_seconds": epochs * 10.0,
        "teacher_flops_saved": 0.25,
        "flops_saved": 0.2,
        "time_saved": 0.1,
        "final_block": 12,
    }


def save_and_leave(folder: Path) -> None:
    time.sleep(0.5)
    (folder / "saved").touch()
    sys.exit(0)


def wait_for(count: int, folder: Path) -> None:
    deadline = time.monotonic() + 30
    while len((folder.parent / "started").read_text().splitlines()) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def main() -> int:
    asked = Path(sys.argv[sys.argv.index("--config") + 1]).read_text()
    config = yaml.safe_load(asked)
    folder = Path(config["output"])
    first = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(asked)
    with (folder.parent / "started").open("a") as started:
        started.write(f"{folder.name} {os.environ.get('SLOT', '-')}\n")
    if config["optim"]["lr"] == 13:
        print("leap_dist [rank 1]: error: another rank is gone, and says itself why if it could\nnoise")
        print("leap_dist [rank 0]: error: non-finite loss on rank 0 at step 3\nmore noise")
        return 1
    if config["optim"]["lr"] == 77 and first:
        signal.signal(signal.SIGTERM, lambda *_: save_and_leave(folder))
        (folder / "waiting").touch()
        time.sleep(60)
    if config["optim"]["lr"] == 22:
        wait_for(2, folder)
    students = members(load(Path(sys.argv[sys.argv.index("--config") + 1]), [], check=False))
    for name, own in students.items():
        leave(folder / name, name, own)
    return 2 if any(own.optim.lr == 5 for own in students.values()) else 0


def leave(folder: Path, name: str, config: Config) -> None:
    """What a student's run folder has at its end. optim.lr=5 is retired in a company."""
    folder.mkdir(exist_ok=True)
    company = {"shared_with": ["others"], "time_saved": None} if name else {}
    retired = {"retired": {"why": "non-finite loss"}} if name and config.optim.lr == 5 else {}
    if name:
        (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "curriculum.jsonl").write_text(
        json.dumps({"step": 0, "block": 1, "score": 0.5, "teacher_flops": 1.0, "seconds": 1.0}) + "\n"
    )
    (folder / "summary.json").write_text(json.dumps(summary(asdict(config)) | company | retired))


if __name__ == "__main__":
    sys.exit(main())
