"""What is made of a checkpoint's names, and that nothing in it is dropped in silence."""

from __future__ import annotations

import gzip
import json
import logging
import pathlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from leap_dist.config import TeacherConfig
from leap_dist.errors import UserError
from leap_dist.teacher.lazy_backbone import LazyBackbone

CPU = torch.device("cpu")
SIZE, VIT = 32, "vit_small_patch16_224"
KWARGS: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
State = dict[str, Tensor]


def drawn(name: str, size: int = SIZE, **kwargs: Any) -> State:
    """Weights of timm's `name`, none of them 0 or 1."""
    state = timm.create_model(name, num_classes=0, img_size=size, **KWARGS, **kwargs).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(value.shape, generator=generator) for key, value in state.items()}


def load(path: Path, model: str = VIT, size: int = SIZE, **kwargs: Any) -> State:
    """The teacher's parameters by timm's names."""
    lazy = LazyBackbone(TeacherConfig(model=model, kwargs=KWARGS | kwargs, weights=str(path)), size, CPU)
    lazy.hold(range(lazy.spec.depth))
    return {key.removeprefix("stem."): value for key, value in lazy.backbone.named_parameters()}


def saved(state: Any, folder: Path, name: str = "weights.pth") -> Path:
    torch.save(state, folder / name)
    return folder / name


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def another(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


def chunked(state: State, restart: bool) -> State:
    """blocks.i becomes blocks.CHUNK.i, a chunk per block, as DINOv2's FSDP training; or counted from 0 in each."""
    return {
        f"blocks.{key.split('.')[1]}.{0 if restart else key.split('.')[1]}.{key.split('.', 2)[2]}"
        if key.startswith("blocks.") else key: value
        for key, value in state.items()
    }  # fmt: skip


PREFIXES = (
    "module.", "model.", "backbone.", "teacher.backbone.", "student.", "visual.trunk.", "_orig_mod.", "net.",
    "module._orig_mod.", "_orig_mod.module.", "module.visual.trunk.", "model._orig_mod.backbone.",
    "_fsdp_wrapped_module.teacher.backbone.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_come_off_before_anything_is_checked(prefix: str, tmp_path: Path) -> None:
    state = drawn(VIT)
    path = saved(
        under(prefix, state) | {"dino_head.mlp.weight": torch.ones(2)} if "teacher" in prefix else under(prefix, state),
        tmp_path,
    )
    assert_same(load(path), state)
    said = refusal(path, patch_size=8)
    assert "patch_embed.proj.weight has shape (32, 3, 16, 16)" in said and "needs (32, 3, 8, 8)" in said


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"epoch": 3, "arch": "vit", "state_dict": s, "optimizer": {"state": {0: {"m": torch.ones(1)}}},
                   "metric": np.float64(81.5), "best": torch.tensor(1.0)},
        lambda s: {"state_dict": another(s), "state_dict_ema": s, "version": 2},
        lambda s: {"model": another(s), "model_ema": {"module": s}, "path": pathlib.Path("a")},
        lambda s: {"state_dict": under("model.", s), "pytorch-lightning_version": "2.4", "callbacks": {}, "loops": {}},
        lambda s: {"teacher": under("module.backbone.", s), "student": under("module.backbone.", another(s))},
        lambda s: under("student.backbone.", another(s)) | under("teacher.backbone.", s),
        lambda s: under("model.", another(s)) | under("ema_model.", s),
        lambda s: {"model": s, "stats": {"mean": np.zeros(3), "when": np.int64(4)}},
        lambda s: chunked(s, restart=False),
        lambda s: chunked(s, restart=True),
        lambda s: {k.replace("attn.", "_checkpoint_wrapped_module.attn."): v for k, v in s.items()},
        lambda s: {"net": s},
        lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
    ],
    ids=["timm", "timm-ema", "ema-module", "lightning", "dino", "dino-flat", "ema-flat", "numpy", "chunked",
         "chunked-0", "checkpointed", "net", "parameters"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["model_best.pth.tar", "last"])
def test_what_training_code_saves_is_taken_under_any_name(
    wrap: Callable[[State], Any], name: str, tmp_path: Path
) -> None:
    state = drawn(VIT)
    assert_same(load(saved(wrap(state), tmp_path, name)), state)


def test_formats_are_known_by_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = drawn(VIT)
    save_file(state, tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path / "pytorch_model.bin"), state)
    assert_same(load(saved(state, tmp_path, "torch.safetensors")), state)
    torch.save(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_same(load(tmp_path / "old.ckpt"), state)


def test_a_moving_average_is_said_to_be_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = drawn(VIT)
    caplog.set_level(logging.INFO)
    load(saved({"state_dict": state, "state_dict_ema": state}, tmp_path))
    assert "takes 'state_dict_ema', a moving average, of state_dict, state_dict_ema" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>Access denied", "a web page"),
        (json.dumps({"weight_map": {}}).encode(), "JSON text"),
        (gzip.compress(b"weights", mtime=0), "gzip archive: unpack it first"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"hello", "no file of weights .*hello"),
        (b"", "no file of weights .it is empty"),
        (b"x" * 257 + b"ustar" + b"x" * 300, "a tar archive"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_another_file_under_a_checkpoints_name_says_what_it_is(
    content: bytes, said: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(said, refusal(tmp_path / name))


def test_archives_that_are_no_checkpoints_say_what_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "jax.npz", a=np.zeros(3))
    assert "a NumPy archive" in refusal(tmp_path / "jax.npz")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    assert "a TorchScript program" in refusal(tmp_path / "script.pt")


def test_an_object_that_may_not_be_loaded_is_named(tmp_path: Path) -> None:
    path = saved({"model": drawn(VIT), "config": Thing()}, tmp_path)
    assert "Thing; load it where you trust it and save the state dict alone" in refusal(path)


class Thing:
    pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: under("a.", s) | under("b.", s), "several backbones (a.*, b.*)"),
        (lambda s: {"first": s, "second": s}, "several sets of weights (first, second)"),
        (lambda s: s | under("module.", s), "twice"),
        (lambda s: s | {"blocks.0.attn.lora_A": torch.ones(2)}, "1 unknown tensors: blocks.0.attn.lora_A"),
        (lambda s: s | {"blocks.0.attn.qkv.bias_extra": torch.ones(2)}, "1 unknown tensors"),
        (lambda s: s | {"blocks.7.attn.qkv.bias": torch.ones(2), "blocks.7.norm1.bias": torch.ones(2)}, "1 unknown"),
        (lambda s: s | {0: torch.ones(2)}, "1 unknown tensors: 0"),
        (lambda s: s | {"norm.weight": s["norm.weight"].to(torch.int8)}, "norm.weight is of torch.int8"),
        (lambda s: s | {"norm.weight": s["norm.weight"].to(torch.complex64)}, "norm.weight is of torch.complex64"),
        (lambda s: s | {"norm.weight": s["norm.weight"].to_sparse()}, "norm.weight is sparse"),
        (lambda s: s | {"norm.weight": s["norm.weight"].to("meta")}, "saved from the meta device"),
        (lambda s: under("resnet.", {"layer1.weight": torch.ones(2)}), "of its own it has resnet.layer1.weight"),
        (lambda s: {"embeddings.patch_embeddings.weight": torch.ones(2)}, "layout of DINOv3 of HF transformers"),
    ],
)
def test_what_is_not_understood_is_refused(change: Callable[[State], State], said: str, tmp_path: Path) -> None:
    assert said in refusal(saved(change(drawn(VIT)), tmp_path))


def meta_dinov3(**changes: Tensor) -> State:
    """DINOv3 as Meta publishes it, its key bias masked and its query and value bias 0."""
    dim, state = KWARGS["embed_dim"], {}
    for key, value in drawn("vit_small_patch16_dinov3").items():
        key = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        state[key] = value
    mask = torch.cat([torch.ones(dim), torch.zeros(dim), torch.ones(dim)])
    for block in range(KWARGS["depth"]):
        state[f"blocks.{block}.attn.qkv.bias"] = torch.randn(3 * dim) * (1 - mask)
        state[f"blocks.{block}.attn.qkv.bias_mask"] = mask
    periods = 100.0 ** (2 * torch.arange(4) / 8)
    return state | {"mask_token": torch.ones(1, dim), "rope_embed.periods": periods.bfloat16()} | changes


BIAS = "blocks.1.attn.qkv.bias"


def test_metas_dinov3_loads_where_what_is_dropped_is_nothing(tmp_path: Path) -> None:
    assert_same(load(saved(meta_dinov3(), tmp_path), "vit_small_patch16_dinov3"), drawn("vit_small_patch16_dinov3"))


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("", {BIAS: torch.full((96,), 0.5)}, "holds blocks.1.attn.qkv.bias, up to 0.5, and the model has no such bias"),
        ("", {"rope_embed.periods": 10.0 ** (2 * torch.arange(4) / 8)}, "rope_embed.periods differs from the model's"),
        ("", {"rope_embed.periods": torch.ones(8)}, "rope_embed.periods has shape (8,), the model's (4,)"),
        ("", {"rope_embed.unheard_of": torch.ones(4)}, "the model has nothing to compare it with"),
        ("_qkvb", {BIAS + "_mask": torch.ones(96), BIAS: torch.full((96,), 0.5)}, "is not 0 for the keys, up to 0.5"),
        ("_qkvb", {BIAS + "_mask": torch.zeros(96), BIAS: torch.full((96,), 0.5)}, "bias_mask is not 1 for queries"),
    ],
)
def test_what_timms_converter_would_drop_from_dinov3_is_refused(
    model: str, changes: State, said: str, tmp_path: Path
) -> None:
    assert said in refusal(saved(meta_dinov3(**changes), tmp_path), model=f"vit_small_patch16_dinov3{model}")


def eva02_tables(scale: float = 1.0) -> State:
    """The rotary table that EVA-02's checkpoints hold, by its authors' formula: heads of 16, a grid of 16 x 16."""
    base = torch.arange(16) * scale  # 'freqs_for=lang', theta 10000, over half of a head
    freqs = torch.outer(base, 1 / 10000 ** (torch.arange(0, 8, 2) / 8)).repeat_interleave(2, -1)
    both = torch.cat([freqs[:, None].expand(16, 16, 8), freqs[None].expand(16, 16, 8)], -1).reshape(256, 16)
    return {"rope.freqs_cos": both.cos(), "rope.freqs_sin": both.sin(), "blocks.0.attn.rope.freqs_cos": both.cos()}


def test_a_rotary_table_is_compared_at_its_own_grid(tmp_path: Path) -> None:
    name = "eva02_base_patch14_224"
    state = drawn(name, 56)
    found = load(saved(state | eva02_tables(), tmp_path), name, 56)
    assert_same(found, {key: value for key, value in state.items() if not key.startswith("fc_norm")})
    path = saved(state | eva02_tables(scale=2.0), tmp_path)
    assert "freqs_cos differs from the model's by up to" in refusal(path, model=name, size=56)


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_of_hf_transformers_gives_its_features(swiglu: bool, tmp_path: Path) -> None:
    """Against transformers' own forward pass."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, use_swiglu_ffn=swiglu
    )
    theirs = transformers.Dinov2Model(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    name, kwargs = ("vit_giant_patch14_dinov2", {"mlp_ratio": 5.375}) if swiglu else ("vit_small_patch14_dinov2", {})
    if swiglu:  # transformers rounds two thirds of 4 x 32 up to a multiple of 8; timm's fc1 holds both halves
        kwargs = {"mlp_ratio": 2 * theirs.encoder.layer[0].mlp.weights_out.in_features / 32}
    config = TeacherConfig(
        model=name, kwargs=KWARGS | kwargs, weights=str(saved(under("dinov2.", theirs.state_dict()), tmp_path))
    )
    lazy = LazyBackbone(config, 28, CPU)
    lazy.hold(range(2))
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        found = lazy.backbone(images, 2)
    torch.testing.assert_close(found.patch, expected[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.cls, expected[:, 0], rtol=1e-4, atol=1e-4)


def test_vit_of_hf_transformers_gives_its_features(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=SIZE,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.ViTModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = TeacherConfig(model=VIT, kwargs=KWARGS, weights=str(saved(theirs.state_dict(), tmp_path)))
    lazy = LazyBackbone(config, SIZE, CPU)
    lazy.hold(range(2))
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(
            lazy.backbone(images, 2).patch, theirs(images).last_hidden_state[:, 1:], rtol=1e-4, atol=1e-4
        )
