"""What lies beside a file of weights and tells of them what tensors do not: heads, epsilons, the order of classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from leap_dist.errors import UserError
from leap_dist.models import build_model
from leap_dist.models.records import parts_at_most
from leap_dist.runtime.files import read_json

CLASSES = "class_to_idx"  # of the record of a teacher that was trained here: name of a class -> its logit
# timm's and HF transformers' folders have one file of weights, and its record; elsewhere a config may be anybody's.
_HUB, _OF_HUB = "config.json", ("model.safetensors", "pytorch_model.bin")
_OURS = ("num_classes", "img_size")  # arguments that follow from the run


def read_record(weights: Path) -> tuple[Path, dict[str, Any]]:
    """The record beside `weights`, of this project, of timm or of HF transformers; empty where there is none."""
    beside = [weights.parent / _HUB] if weights.name in _OF_HUB else []
    for path in (weights.with_suffix(".json"), *beside):
        try:
            found = read_json(path)
        except (OSError, ValueError):  # somebody else's
            continue
        if isinstance(found, dict):
            return path, found
    return weights, {}


def check_record(weights: Path, model: nn.Module, name: str) -> None:
    """UserError if the record beside `weights` is of a model that computes otherwise than `model`, timm's `name`.

    Two models may have the same tensors and another number of heads.
    """
    path, record = read_record(weights)
    if not record:
        return
    mine = _facts(model)
    for fact, value in _recorded(record, model).items():
        if fact in mine and mine[fact] != value:
            raise UserError(
                f"teacher.weights={weights} is of a model with {fact} {value}, says {path.name} beside it; "
                f"teacher.model={name} with teacher.kwargs has {mine[fact]}"
            )


def _recorded(record: Mapping[str, Any], like: nn.Module) -> dict[str, Any]:
    """Facts of the model that a record is of, as far as they can be told. like: the one that it should be.

    A record may be anybody's: what it describes is put together without memory, and twice as deep at most.
    """
    if isinstance(record.get("num_attention_heads"), int):
        return {"heads": record["num_attention_heads"]}  # transformers' epsilons are not timm's, and it matters little
    name = record.get("model", record.get("architecture"))
    kwargs = record.get("kwargs", record.get("model_args", {}))
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        return {}
    try:
        kwargs = {key: value for key, value in kwargs.items() if key not in _OURS}
        with parts_at_most(5 * sum(1 + len(part._parameters) for part in like.modules()) + 1000):
            return _facts(build_model(name, kwargs, like.patch_embed.img_size[0], device="meta"))
    except (
        UserError,
        TypeError,
        ValueError,
        RuntimeError,
        AssertionError,
    ):
        return {}  # of another version, or no model that we know


def _facts(model: nn.Module) -> dict[str, Any]:
    """What a model computes with and no tensor of it tells."""
    block = model.blocks[0]
    parts = {
        "heads": getattr(getattr(block, "attn", None), "num_heads", None),
        "norm epsilon": getattr(getattr(block, "norm1", None), "eps", None),
        "activation": type(block.mlp.act).__name__ if hasattr(getattr(block, "mlp", None), "act") else None,
    }
    return {fact: value for fact, value in parts.items() if value is not None}
