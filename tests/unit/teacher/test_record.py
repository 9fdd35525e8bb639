"""What a record beside a file of weights says, and no tensor does, is held against the config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from leap_dist.assembly import check_class_order
from leap_dist.config import TeacherConfig, load
from leap_dist.data import write_shards
from leap_dist.errors import UserError
from leap_dist.teacher import build_teacher
from small_sets import ALONE, png

MODEL = "vit_tiny_patch16_224"
KWARGS: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    save_file(timm.create_model(MODEL, num_classes=4, img_size=32, **KWARGS).state_dict(), path)
    return path


def opened(weights: Path, **kwargs: Any) -> None:
    config = TeacherConfig(model=MODEL, kwargs={**KWARGS, **kwargs}, weights=str(weights))
    build_teacher(config, 32, torch.device("cpu"))


OURS = {"model": MODEL, "kwargs": {**KWARGS, "num_classes": 4, "img_size": 64}}
TIMMS = {"architecture": MODEL, "num_classes": 4, "model_args": KWARGS}


@pytest.mark.parametrize(
    ("file", "record", "kwargs", "said"),
    [
        ("teacher.json", OURS, {"num_heads": 6}, "heads 3, says teacher.json beside it; teacher.model=.* has 6"),
        ("teacher.json", OURS, {"act_layer": "relu"}, "activation GELU, .* has ReLU"),
        ("config.json", TIMMS, {"num_heads": 2}, "heads 3, says config.json"),
        ("config.json", {"model_type": "vit", "num_attention_heads": 6}, {}, "heads 6, .* has 3"),
    ],
)
def test_another_model_of_the_same_tensors_is_refused(
    file: str, record: dict[str, Any], kwargs: dict[str, Any], said: str, weights: Path
) -> None:
    path = weights.parent / file
    path.write_text(json.dumps(record))
    hubs = weights.with_name("model.safetensors")  # what the hub's folders call it
    hubs.write_bytes(weights.read_bytes())
    try:
        with pytest.raises(UserError, match=said):
            opened(hubs if file == "config.json" else weights, **kwargs)
        if file == "config.json":
            opened(weights, **kwargs)
    finally:
        path.unlink()


@pytest.mark.parametrize("text", [json.dumps(OURS), "[1]", "{", '{"model": "of another world", "kwargs": {}}', "{}"])
def test_the_same_model_and_the_records_of_others_are_no_hindrance(text: str, weights: Path) -> None:
    path = weights.with_suffix(".json")
    path.write_text(text)
    opened(weights)
    path.unlink()


@pytest.mark.parametrize(
    ("outputs", "train", "said"),
    [
        ({"a": 0, "b": 1}, {"a": 0, "b": 1}, None),
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1}, None),
        ({"b": 0, "a": 1}, {"a": 0, "b": 1}, "class 'a' is output 1, but label 0 in data.train=.*2 classes differ"),
        ({"a": 0, "c": 1}, {"a": 0, "b": 1}, "class 'b' is no output, but label 1"),
        (None, {"a": 0, "b": 1}, "teacher.weights=.*: nothing names the classes"),
        ({"a": 0, "b": 1}, None, "data.train=.*: nothing names the classes"),
    ],
)
def test_logits_and_labels_are_in_one_order(
    outputs: dict[str, int] | None,
    train: dict[str, int] | None,
    said: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_shards(((png(i), i % 2) for i in range(4)), tmp_path / "set")
    if train is not None:
        (tmp_path / "set" / "class_to_idx.json").write_text(json.dumps(train))
    file = tmp_path / "teacher.pth"
    file.write_bytes(b"weights")  # which nobody reads here
    file.with_suffix(".json").write_text(json.dumps({} if outputs is None else {"class_to_idx": outputs}))
    options = ["student.model=s", "student.num_classes=2", "objective.kd_alpha=0.5", f"data.train={tmp_path / 'set'}"]
    run = load(None, ["teacher.model=t", f"teacher.weights={file}", *options])
    if said is not None and "nothing names" not in said:
        with pytest.raises(UserError, match=said):
            check_class_order(run, ALONE)
        return
    check_class_order(run, ALONE)
    assert len(caplog.messages) == (said is not None)
    assert all(re.search(said, line) for line in caplog.messages)
