"""A run folder as a run leaves it, made by hand, and a page as a reader of HTML sees it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from leap_dist.runtime.integrity import named_files, write_sealed

STEPS, DEPTH = 40, 4
CONFIG = {
    "output": "runs/made",
    "epochs": 4.0,
    "teacher": {"model": "vit_base", "weights": "hub"},
    "student": {"model": "vit_tiny", "kwargs": {"embed_dim": 96}},
    "curriculum": {"threshold": 0.75, "metric": "cka"},
    "data": {"train": "digits", "val": "digits"},
}
SUMMARY = {
    "steps": STEPS, "epochs": 4.0, "final_block": 3, "teacher_depth": DEPTH, "train_seconds": 80.0,
    "images_per_s": 32.0, "teacher_seconds": 30.0, "seconds_by_phase": {"data": 5.0, "teacher": 30.0, "optimizer": 2.0},
    "flops": {"teacher": 3e12, "student": 2e12, "match": 1e11}, "teacher_flops_saved": 0.25, "flops_saved": 0.164,
    "time_saved": 0.125, "time_saved_at_least": 0.0625, "time_saved_seconds": 11.4, "skip_efficiency": 0.76,
    "student_teacher_cka": 0.5, "known_images": 1500, "judged_images": 297,
    **{
        f"{who}_{kind}_{measure}": round(base + 0.01 * index, 4)
        for who, base in (("student", 0.7), ("student_ema", 0.72), ("teacher", 0.9))
        for index, kind in enumerate(("cls", "patch", "cls_patch"))
        for measure in ("knn", "knn_top5", "probe", "probe_top5")
    },
}  # fmt: skip
ADVANCES = {9: "threshold", 29: "max_epochs"}
SHELL = {"style", "script", "svg"}  # whose text is none of the page's
EMPTY = {"meta", "link", "img", "br", "use", "path", "rect", "line"}  # elements that are not closed


def ledger(steps: int = STEPS, advances: dict[int, str] = ADVANCES) -> list[dict[str, Any]]:
    """A line a step; from block 1, one block further after each of `advances`."""
    lines, block = [], 1
    for step in range(steps):
        after = block + (step in advances)
        line = {"step": step, "epoch": step // 10, "block": block, "score": 0.5 + 0.005 * (step % 50), "ema": 0.7625}
        line |= {"threshold": 0.75, "next_block": after, "teacher_flops": 1e9 * step, "seconds": 2.0 * step}
        found = {"decision": "advance", "reason": advances[step]} if step in advances else {"decision": "stay"}
        lines.append(line | found)
        block = after
    return [{**lines[0], "decision": "start", "reason": "calibrated", "depth": DEPTH}, *lines]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder: Path, *, config: dict[str, Any] = CONFIG, summary: dict[str, Any] | None = SUMMARY) -> Path:
    """All that a finished run leaves; without a summary as one that still goes on."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_lines(folder / "curriculum.jsonl", ledger())
    write_lines(folder / "evaluation.jsonl", [{"epoch": n, "step": 10 * n, "patch_knn": 0.2 * n} for n in (1, 2, 3)])
    start = {
        "event": "start",
        "at": "2026-06-01T08:00:00+00:00",
        "step": 0,
        "total_steps": STEPS,
        "ranks": 2,
        "nodes": 1,
    }
    start |= {"device": "a device", "command": "leap_dist/train.py --config x", "commit": "abc123-dirty"}
    start |= {"versions": {"torch": "2.11.0"}}
    write_lines(folder / "history.jsonl", [start])
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for step in range(0, STEPS, 2):
            points = {"loss/total": 1 / (step + 1), "loss/patch": 0.9 / (step + 1), "lr": 1e-3, "images_per_s": 30.0}
            points |= {
                "flops/teacher_saved_fraction": 0.5 - step / 100,
                "savings/flops": 0.3,
                "total_seconds/data": step,
            }
            for tag, value in points.items():
                board.add_scalar(tag, value, step)
    if summary is not None:
        write_sealed(folder / "summary.json", summary | named_files(folder, "curriculum.jsonl", "evaluation.jsonl"))
    return folder


def make_pictures(folder: Path, steps: range) -> None:
    """As `telemetry.pictures_every` leaves them."""
    (folder / "pictures").mkdir()
    for name in ("tokens.png", *(f"tokens_step_{step}.png" for step in steps)):
        Image.new("RGB", (12, 4), "red").save(folder / "pictures" / name)


class Page(HTMLParser):
    """What a page holds: `elements` (tag, attributes), `text`, `figures` (key -> values as numbers) and `shown`.

    Raises AssertionError where an element is not closed, or closed twice.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.figures: dict[str, list[float]] = {}
        self.shown: dict[str, list[str]] = {}
        self._open: list[tuple[str, str | None]] = []
        self._words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open, self._open
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        assert len(found) == len(attributes), f"an attribute twice: {attributes}"
        self.elements.append((tag, found))
        key = found.get("data-key")
        if "data-value" in found:
            self.figures.setdefault(key, []).append(float(found["data-value"]))
        if tag not in EMPTY:
            self._open.append((tag, key))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not SHELL & {tag for tag, _ in self._open}:
            self._words.append(data)
        if self._open and self._open[-1][1]:
            self.shown.setdefault(self._open[-1][1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each element of a name."""
        return [attributes for name, attributes in self.elements if name == tag]


def outside(page: Page) -> list[str]:
    """What the page would fetch or run from elsewhere."""
    named = [
        str(attributes.get(key)) for _, attributes in page.elements for key in ("src", "href") if key in attributes
    ]
    handlers = [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    links = [name for name in named if not name.startswith(("data:", "#")) and ":" in name]
    return links + handlers + [tag for tag, _ in page.elements if tag in ("script", "iframe", "object", "embed")]
