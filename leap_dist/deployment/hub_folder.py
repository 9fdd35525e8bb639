"""A student as a folder in the layout of timm's hub: config.json, model.safetensors, and a model card.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it where the student is plain timm. One with a part of
this package's in it says so in its card, and `leap_dist.load("FOLDER")` loads any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timm.models import save_for_hf

from leap_dist.deployment.loaded import WEIGHTS, Distilled
from leap_dist.models.own_student import is_own
from leap_dist.runtime.files import write_json

CARD = """---
library_name: {library}
tags: [feature-extraction, distillation]
---
# {title}

{what}

```python
{code}
```

| | |
|---|---|
{rows}

Images are {size} x {size} pixels, RGB, normalised with mean {mean} and std {std}.
It was distilled with [LEAP](https://arxiv.org/abs/2606.19483) by leap_dist.
"""
PLAIN_CODE = """import timm

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
tokens = model.forward_features(images)"""
OWN_CODE = """import leap_dist

model = leap_dist.load("{folder}"{own})
tokens, cls, pooled, logits = model(images)"""
# What a model card tells of the end of a run, where the run has it.
FIGURES = {
    "final_block": "teacher block at the end", "teacher_depth": "blocks of the teacher", "epochs": "epochs",
    "steps": "optimizer steps", "teacher_flops_saved": "teacher FLOPs saved", "train_seconds": "seconds of training",
}  # fmt: skip


def is_plain(model: Distilled) -> bool:
    """Whether timm alone builds the student from its name and arguments."""
    recipe = model.student.recipe
    return recipe.remedy == "none" and not (recipe.mean_head or recipe.reduction or is_own(recipe.model))


def write_hub_folder(
    model: Distilled, title: str, folder: Path, summary: dict[str, Any], training: dict[str, Any]
) -> None:
    """Fill the empty `folder`.

    title: of the card; summary: of the student's run, empty if there is none; training: what else is known of how it
    was trained, by words.
    """
    recipe = model.student.recipe
    save_for_hf(
        model.student.backbone, str(folder), safe_serialization=True, model_args=_arguments(recipe.kwargs),
        model_config={"pretrained_cfg": _pretrained(model)},
    )  # fmt: skip
    _forget_origin(folder / "config.json")
    write_json(folder / "student.json", model.record)
    (folder / "README.md").write_text(_card(model, title, summary, training))
    (folder / WEIGHTS).chmod(0o644)  # it comes with its owner's rights alone


def _forget_origin(config: Path) -> None:
    """Drop what timm says of its own weights of that name: these are others."""
    content = json.loads(config.read_text())
    for key in ("tag", "license", "paper_ids", "paper_name", "origin_url", "notes"):
        content["pretrained_cfg"].pop(key, None)
    write_json(config, content)


def _arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """num_classes is a field of its own in timm's config.json."""
    return {key: value for key, value in kwargs.items() if key != "num_classes"}


def _pretrained(model: Distilled) -> dict[str, Any]:
    """How images are to be prepared, in timm's words."""
    spec = model.spec
    return {
        "input_size": [3, spec.image_size, spec.image_size],
        "fixed_input_size": True,
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "mean": spec.mean,
        "std": spec.std,
        "num_classes": model.record["kwargs"].get("num_classes", 0),
    }


def _card(model: Distilled, name: str, summary: dict[str, Any], training: dict[str, Any]) -> str:
    about, plain = model.record, is_plain(model)
    what = f"A `{about['model']}` of timm."
    if not plain:
        what += " It has parts that timm does not know, so leap_dist loads it; `student.json` says which."
    own = f', own="{about["model"]}"' if is_own(about["model"]) else ""
    figures = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
    accuracies = {key: value for key, value in figures.items() if key.endswith(("knn", "probe", "top1"))}
    rows = [f"| {key.replace('_', ' ')} | {value:.1%} |" for key, value in accuracies.items()]
    rows += [f"| {words} | {value} |" for words, value in training.items()]
    rows += [f"| {words} | {_figure(key, figures[key])} |" for key, words in FIGURES.items() if key in figures]
    rows += [f"| parameters | {sum(parameter.numel() for parameter in model.parameters()):,} |"]
    return CARD.format(
        library="timm" if plain else "leap_dist", title=name, what=what, rows="\n".join(rows),
        code=(PLAIN_CODE if plain else OWN_CODE).format(folder=name, own=own), size=model.spec.image_size,
        mean=json.dumps(model.spec.mean), std=json.dumps(model.spec.std),
    )  # fmt: skip


def _figure(key: str, value: Any) -> str:
    if key.endswith("saved"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if isinstance(value, float) and value >= 10 else str(value)
