"""The record of an exported model, `student.json`: read as what a stranger may have written.

It names a model of timm and plain arguments for it. So nothing it says leads to a download or to another file, and what
it describes is no larger than the weights beside it.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Optional

import timm
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from leap_dist.config import DataConfig
from leap_dist.errors import UserError
from leap_dist.models.backbone import LOADERS
from leap_dist.runtime.files import read_json
from leap_dist.runtime.schema import misfit

MOST_PIXELS = 8192  # of an image's side
MOST_BLOCKS = 1000
MOST = 10**7  # of any other number
MOST_PARTS = 20_000  # layers and tensors of a model, beside 20 for each tensor of its file
NAME = re.compile(r"[\w.]{1,200}", re.ASCII)
OWN = re.compile(r"[\w.]{1,200}:\w{1,200}", re.ASCII)  # a function of the user's own, which no record has run

INTERPOLATIONS = ("bilinear", "bicubic")
COLOURS = "RGB"


@dataclass(frozen=True)
class ImageSpec:
    """What a record says of the images that its model takes: those of the evaluation of the run that made it.

    image_size: side in pixels; crop_pct: share of the shorter side that the centre crop keeps; interpolation: one of
    INTERPOLATIONS, antialiased, to image_size / crop_pct; mean, std: of the colours in [0, 1]. Where there is a default
    older records lack the key.
    """

    image_size: int
    mean: list[float]
    std: list[float]
    crop_pct: float = DataConfig.crop_pct
    interpolation: str = INTERPOLATIONS[0]
    colour_order: str = COLOURS


def images_of(data: DataConfig, image_size: int, interpolation: str = INTERPOLATIONS[0]) -> dict[str, Any]:
    """An `ImageSpec` as a record has it."""
    return asdict(ImageSpec(image_size, list(data.mean), list(data.std), data.crop_pct, interpolation))


def image_spec(about: Mapping[str, Any], path: Path) -> ImageSpec:
    """What the record `about`, read from `path`, says of images. UserError where it does not say enough."""
    if fault := misfit(dict(about), ImageSpec):
        raise UserError(f"{path}: does not say what images its model takes ({fault})")
    return ImageSpec(**{key.name: about[key.name] for key in fields(ImageSpec) if key.name in about})


def read_record(path: Path) -> dict[str, Any]:
    """What the record at `path` says, of which everything that a model is built from has been checked.

    Raises:
        UserError: it cannot be read, or says what no export of ours would.
    """
    try:
        about = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable record of an export ({error!s:.200})") from None
    if fault := _fault(about):
        raise UserError(f"{path}: no record of an export: {fault}")
    return about


def _fault(about: Any) -> str:
    """What is wrong with a record; empty if nothing is."""
    if not isinstance(about, dict):
        return "a mapping is expected"
    model, kwargs, wide = about.get("model"), about.get("kwargs"), about.get("wide", {})
    if not isinstance(model, str) or not (OWN.fullmatch(model) or (NAME.fullmatch(model) and timm.is_model(model))):
        return f"model={model!r:.100}, which is none of timm {timm.__version__}"
    for key, arguments in (("kwargs", kwargs), ("wide", wide)):
        if not isinstance(arguments, dict):
            return f"{key}: a mapping is expected"
        for name, value in arguments.items():
            if name in LOADERS or not _is_plain(name, value):
                return f"{key}.{name:.50}={value!r:.100} is no plain argument of a model"
    most = {"width": MOST, "mean_head": MOST} | dict.fromkeys(("map_at", "resized_to", "reduction"), MOST_PIXELS)
    for key, bound in most.items():
        if about.get(key) not in (None, 0) and not _is_count(about[key], bound):
            return f"{key}={about[key]!r:.100}"
    if not _is_count(about.get("image_size", 1), MOST_PIXELS):
        return f"image_size={about['image_size']!r:.100}: 1 to {MOST_PIXELS} pixels are expected"
    for key in ("mean", "std"):
        colour = about.get(key, [0.5] * 3)
        if not isinstance(colour, list) or len(colour) != 3 or not all(_is_number(part) for part in colour):
            return f"{key}={colour!r:.100}: three numbers are expected"
        if key == "std" and min(colour) <= 0:
            return f"{key}={colour!r:.100}: numbers above 0 are expected"
    crop_pct = about.get("crop_pct", 1)
    if not _is_number(crop_pct) or not 0.01 <= crop_pct <= 1:
        return f"crop_pct={crop_pct!r:.100}: 0.01 to 1 is expected"
    for key, known in {"interpolation": INTERPOLATIONS, "colour_order": (COLOURS,)}.items():
        if about.get(key, known[0]) not in known:
            return f"{key}={about[key]!r:.100}: {' or '.join(known)} is expected"
    return ""


def _is_plain(name: str, value: Any, depth: int = 4) -> bool:
    """Whether an argument of a model is a number of a sane size, a word, or a short list or mapping of those."""
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = ((name, part) for part in value)
    elif isinstance(value, str):
        return re.fullmatch(r"[\w.+-]{0,50}", value, re.ASCII) is not None
    elif value is None or isinstance(value, bool):
        return True
    else:
        most = MOST_PIXELS if name in ("img_size", "patch_size") else MOST_BLOCKS if name.startswith("depth") else MOST
        return _is_number(value) and abs(value) <= most
    fits = depth > 0 and len(value) <= 100
    return fits and all(key not in LOADERS and _is_plain(key, part, depth - 1) for key, part in inside)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


@contextmanager
def parts_at_most(most: int) -> Iterator[None]:
    """In this block a model with more layers and tensors than `most` raises UserError while it is put together.

    A count of layers may have any name, and without memory too a model takes its time.
    """
    left, me = most, threading.get_ident()

    def count(*_: Any) -> None:
        nonlocal left
        left -= threading.get_ident() == me
        if left < 0:
            raise UserError(f"a model of more than {most} parts")

    hooks = register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def parts_of(path: Path) -> int:
    """How many parts the model may be built of that gave the weights at `path`: it may be an early stage of it."""
    with safe_open(path, "pt") as file:
        return MOST_PARTS + 20 * len(file.keys())


def require_weights_of(model: nn.Module, path: Path, *, added: Optional[tuple[str, ...]] = None) -> None:
    """UserError unless the safetensors at `path` have the names and shapes of `model`, which may be without memory.

    added: how names of parts begin that `model` does not have yet; then it may have others that are not in the file.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(path, "pt") as file:
        there = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    names = expected.keys() | there.keys()
    if added is not None:
        names = {name for name in there if not name.startswith(added)}
    if wrong := sorted(name for name in names if expected.get(name) != there.get(name)):
        name = wrong[0]
        raise UserError(
            f"not the weights of its record: {name:.100} is {there.get(name, 'missing')} there, "
            f"{expected.get(name, 'no part')} in the model, and so are {len(wrong)} in all"
        )
