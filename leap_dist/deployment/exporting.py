"""What `tools/export.py` does: write a format, compare what was written with torch on images, and only then keep it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from leap_dist.config import load
from leap_dist.deployment import images as pictures
from leap_dist.deployment.comparing import Runner, described, differences, require_close
from leap_dist.deployment.hub_folder import write_hub_folder
from leap_dist.deployment.images import CONFIG
from leap_dist.deployment.loaded import WEIGHTS, Distilled
from leap_dist.deployment.onnx_file import BOUNDS, onnx_runner, versions, write_half, write_int8, write_onnx
from leap_dist.deployment.program_file import program_runner, write_program
from leap_dist.deployment.speed import images_per_second
from leap_dist.deployment.transformers_folder import write_transformers_folder
from leap_dist.errors import UserError
from leap_dist.monitoring.comparison import SUMMARY, read_summary
from leap_dist.runtime.files import flush, scratch_folder, take_place

CHECKED = 64  # images that an export is compared on
FORMATS = ("onnx", "hub", "transformers", "pt2")


@dataclass(frozen=True)
class Order:
    """What is to be exported, and how.

    weights: the student's file; out: folder of what is written; shown: images to check and calibrate on, None: noise;
    bound: largest difference that is let pass, None for the format's own; images: for calibration and kNN;
    half, int8: write these ONNX files too.
    """

    model: Distilled
    weights: Path
    out: Path
    shown: Optional[pictures.Shown]
    bound: Optional[float]
    images: int
    half: bool
    int8: bool


def export(order: Order, kind: str) -> dict[str, Runner]:
    """Write one of FORMATS into `order.out`. Returns what runs each file of it, by name.

    Raises:
        UserError: a library is not there, the student does not fit the format, or the outputs are too far off; nothing
            is written then, and what was there stays.
    """
    order.out.mkdir(parents=True, exist_ok=True)
    if kind == "onnx":
        return _onnx(order)
    if kind == "pt2":
        return _pt2(order)
    folder = order.out / kind
    with whole_folder(folder) as part:
        if kind == "hub":
            run = order.weights.absolute().parent
            write_hub_folder(order.model, run.name, part, read_summary(run / SUMMARY), _training(run))
        else:
            write_transformers_folder(order.model, part)
    print(f"{folder}: written")
    return {}


def speeds(order: Order, runners: dict[str, Runner]) -> str:
    """Images per second of torch and of `runners` on this machine's CPU, as a table with ratios of one sitting."""
    model = order.model
    images = next(_checked_on(order))[:16]
    everyone = {"torch": lambda batch: model(batch), **runners}
    rates = images_per_second(everyone, images)
    lines = [f"  {'':8}{'images/s':>10}{'ms/image':>10}{'to torch':>10}"]
    for name, rate in rates.items():
        lines.append(f"  {name:8}{rate:10.1f}{1000 / rate:10.2f}{rate / rates['torch']:9.2f}x")
    return "\n".join(lines)


def _onnx(order: Order) -> dict[str, Runner]:
    stem = order.weights.stem
    single = order.out / f"{stem}.onnx"
    _kept(order, single, partial(write_onnx, order.model), "fp32")
    files = {"onnx": single}
    if order.half:
        files["fp16"] = order.out / f"{stem}.fp16.onnx"
        _kept(order, files["fp16"], partial(write_half, single), "fp16")
    if order.int8:
        files["int8"] = order.out / f"{stem}.int8.onnx"
        _kept(order, files["int8"], partial(write_int8, single, batches=_calibration(order)), "int8")
    runners = {name: onnx_runner(path) for name, path in files.items()}
    smaller = {name: runner for name, runner in runners.items() if name != "onnx"}
    if smaller and order.shown is not None and order.shown.data.val is not None:
        print(_accuracies(order, smaller))
    return runners


def _pt2(order: Order) -> dict[str, Runner]:
    path = order.out / f"{order.weights.stem}.pt2"
    _kept(order, path, partial(write_program, order.model), "fp32")
    return {"pt2": program_runner(path, order.model)}


def _kept(order: Order, path: Path, write: Callable[..., None], precision: str) -> None:
    """Write to a place of its own, compare with torch, then put it at `path`."""
    with scratch_folder(order.out) as folder:
        candidate = folder / path.name
        write(path=candidate)
        runner = program_runner(candidate, order.model) if path.suffix == ".pt2" else onnx_runner(candidate)
        found = differences(order.model, runner, _checked_on(order))
        require_close(found, order.bound or BOUNDS[precision], str(path))
        about = "" if path.suffix == ".pt2" else f", {versions(candidate)}"
        size = candidate.stat().st_size / 2**20
        flush(folder)
        candidate.replace(path)
    print(f"{path}: {size:.1f} MiB{about}; against torch, on {_said_of(order)}:\n{described(found)}")


def _checked_on(order: Order) -> Iterator[Tensor]:
    if order.shown is not None:
        yield from pictures.batches(order.shown, CHECKED, "checking")
        return
    size = order.model.spec.image_size
    yield torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))


def _said_of(order: Order) -> str:
    shown = order.shown
    return "noise, for no images were found: --train SHARDS" if shown is None else f"images of {shown.data.train}"


def _calibration(order: Order) -> Iterator[Tensor]:
    if order.shown is None:
        raise UserError("--int8 needs images of the kind that the student will see: --train SHARDS")
    return pictures.batches(order.shown, order.images, "calibrating")


def _accuracies(order: Order, runners: dict[str, Runner]) -> str:
    models: dict[str, Any] = {"torch": pictures.pooled_by(order.model)}
    for name, runner in runners.items():
        models[name] = lambda images, runner=runner: torch.from_numpy(runner(images)["pooled"])
    found = pictures.knn(models, order.shown, order.images)
    return f"kNN on {order.shown.data.val}: " + ", ".join(f"{name} {value:.1%}" for name, value in found.items())


def _training(folder: Path) -> dict[str, Any]:
    """How the student in `folder` was trained, as far as it is known: of its run's config, or its cohort's."""
    place = next((place for place in (folder, folder.parent) if (place / CONFIG).is_file()), None)
    if place is None:
        return {}
    config = load(place / CONFIG, [], check=False)
    return {
        "teacher": config.teacher.model,
        "curriculum": config.curriculum.mode,
        "augmentation": config.data.augment,
        "images a step": config.data.global_batch,
    }


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which then takes the place of `folder`, an earlier export or nothing.

    UserError if there is something else.
    """
    if folder.exists() and not ((folder / WEIGHTS).is_file() and (folder / "config.json").is_file()):
        raise UserError(f"{folder}: exists and is no earlier export; name another --out")
    with scratch_folder(folder.parent) as scratch:
        part = scratch / folder.name
        part.mkdir()
        yield part
        flush(scratch)
        take_place(part, folder)
