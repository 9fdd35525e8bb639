"""A teacher that starts from pretrained weights: they arrive whole, and each layer has its own rate."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from leap_dist.config import OptimConfig
from leap_dist.data import write_shards
from leap_dist.data.digits import digit_samples
from leap_dist.errors import UserError
from leap_dist.pretraining.recipe import TeacherRecipe, load_recipe
from leap_dist.pretraining.training import build_model, train_on_shards
from leap_dist.runtime.optim import build_optimizer

SHAPE = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
TINY = (
    "kwargs={patch_size: 8, embed_dim: 24, depth: 3, num_heads: 2}", "data.image_size=32", "epochs=1",
    "data.global_batch=20", "data.augment=none", "data.mixup=false", "data.workers=0", "optim.batch_reference=null",
    "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]",
)  # fmt: skip


def recipe(*overrides: str) -> TeacherRecipe:
    return load_recipe(None, [*TINY, "data.train=digits", "data.val=digits", *overrides])


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A file of a model for 64 px, in half precision, with another classifier."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, **SHAPE)
    path = tmp_path / "pretrained.safetensors"
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, path)
    return path


def test_all_but_the_classifier_is_what_the_file_holds(pretrained: Path) -> None:
    found = build_model(recipe(f"init={pretrained}")).state_dict()

    stored = load_file(pretrained)
    assert found["head.weight"].shape == (10, 24)
    for name in stored.keys() - {"head.weight", "head.bias", "pos_embed"}:
        assert torch.equal(found[name], stored[name].float()), name
    resampled = resample_abs_pos_embed(stored["pos_embed"].float(), new_size=[4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(found["pos_embed"], resampled, atol=1e-3, rtol=0)  # fitted in half precision


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["kwargs.depth=4"], "init=.*pretrained.safetensors.*block"),
        (["kwargs.embed_dim=48"], "init=.*pretrained.safetensors"),
        (["init_std=0.1"], "init_std=0.1 draws initial weights, and init=.* reads them"),
        (["init=nowhere.bin"], "init=nowhere.bin: no such file"),
        (["layer_decay=0"], "layer_decay=0.0: must be above 0, at most 1"),
        (["layer_decay=1.5"], "layer_decay=1.5: must be above 0, at most 1"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], said: str, pretrained: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        build_model(recipe(f"init={pretrained}", *overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_each_layer_has_a_rate_of_its_own(name: str) -> None:
    """0.5 for each step down: 1 for the classifier, then norm and blocks, the embeddings last."""
    model = build_model(recipe())
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=0.3), model, layer_decay=0.5)
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[parameter]], decays[names[parameter]] = group["lr_scale"], group["weight_decay"]
    assert rates.keys() == set(names.values())
    order = ["patch_embed.proj.weight", *(f"blocks.{index}.mlp.fc1.weight" for index in range(3)), "head.weight"]
    steps = [rates[name] for name in order]
    assert all(below == pytest.approx(above / 2) for below, above in itertools.pairwise(steps)) and steps[-1] == 1
    assert rates["pos_embed"] == rates["cls_token"] == steps[0]
    undecayed = {name for name, decay in decays.items() if decay == 0}
    assert undecayed == {n for p, n in names.items() if p.ndim <= 1} | {"pos_embed", "cls_token"}


@pytest.mark.seconds
def test_a_training_starts_there_and_keeps_the_patch_embedding(pretrained: Path, tmp_path: Path) -> None:
    write_shards(itertools.islice(digit_samples("train"), 60), tmp_path / "train")
    write_shards(itertools.islice(digit_samples("val"), 40), tmp_path / "val")
    options = [f"data.train={tmp_path}/train", f"data.val={tmp_path}/val", f"output={tmp_path}/out", "ema_decay=0"]
    train_on_shards(recipe(*options, f"init={pretrained}", "layer_decay=0.5", "freeze_patch_embed=true"))

    stored, trained = load_file(pretrained), load_file(tmp_path / "out" / "teacher.safetensors")
    assert torch.equal(trained["patch_embed.proj.weight"], stored["patch_embed.proj.weight"].float())
    moved = [
        (trained[name] - stored[name].float()).abs().mean().item()
        for name in ("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", "blocks.2.mlp.fc1.weight")
    ]
    # AdamW's steps are as large as its rate.
    np.testing.assert_array_less(0, moved)
    assert moved[0] < moved[1] < moved[2]
