"""The record of an exported model, `student.json`: read as what a stranger may have written.

It names a model of timm and plain arguments for it. So nothing it says leads to a download or to another file, and what
it describes is no larger than the weights beside it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from torch import nn

from leap_dist.errors import UserError
from leap_dist.models.backbone import LOADERS
from leap_dist.runtime.files import read_json

MOST_PIXELS = 8192  # of an image's side
MOST_BLOCKS = 1000
MOST = 10**7  # of any other number
NAME = re.compile(r"[\w.]{1,200}", re.ASCII)
OWN = re.compile(r"[\w.]{1,200}:\w{1,200}", re.ASCII)  # a function of the user's own, which no record has run


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
    crop_pct = about.get("crop_pct", 1)
    if not _is_number(crop_pct) or not 0.01 <= crop_pct <= 1:
        return f"crop_pct={crop_pct!r:.100}: 0.01 to 1 is expected"
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


def require_weights_of(model: nn.Module, path: Path) -> None:
    """UserError unless the safetensors at `path` have the names and shapes of `model`, which may be without memory."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(path, "pt") as file:
        there = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    if wrong := sorted(name for name in expected.keys() | there.keys() if expected.get(name) != there.get(name)):
        name = wrong[0]
        raise UserError(
            f"{path}: not the weights of its record: {name:.100} is {there.get(name, 'missing')} there, "
            f"{expected.get(name, 'no part')} in the model, and so are {len(wrong)} in all"
        )
