"""Where weights come from, in which shapes they load, and what each mistake says."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn

from leap_dist.config import TeacherConfig
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World
from leap_dist.teacher import build_teacher
from leap_dist.teacher.blame import teacher_fault
from leap_dist.teacher.lazy_backbone import LazyBackbone

MODEL, SIZE = "vit_giant_patch14_dinov2", 42
KWARGS: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
State = dict[str, Tensor]


def timm_model(name: str = MODEL, image_size: int = SIZE, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=0, img_size=image_size, **KWARGS, **options).eval()


@pytest.fixture
def state() -> State:
    torch.manual_seed(5)
    model = timm_model()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.state_dict()


def load(weights: Path | str, model: str = MODEL, image_size: int = SIZE, **options: Any) -> State:
    """The teacher's parameters, under timm's names."""
    config = TeacherConfig(model=model, kwargs=KWARGS, weights=str(weights), **options)
    lazy = LazyBackbone(config, image_size, torch.device("cpu"))
    lazy.hold(range(lazy.spec.depth))
    return {key.removeprefix("stem."): p for key, p in lazy.backbone.named_parameters()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def as_original_dinov2(state: State) -> State:
    """The names of the checkpoints published by DINOv2's authors."""
    renamed = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for key, v in state.items()}
    return renamed | {"mask_token": torch.zeros(1, KWARGS["embed_dim"])}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "args": argparse.Namespace(lr=1.0)},
        lambda state: {"model": prefixed("module.", state)},
        lambda state: {"teacher": prefixed("backbone.", state) | {"dino_head.mlp.weight": torch.zeros(2)}},
        lambda state: {"teacher": prefixed("module.backbone.", state), "student": {}},
        lambda state: state | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)},
        as_original_dinov2,
    ],
    ids=["plain", "state_dict", "options", "ddp", "dinov2-training", "ddp-backbone", "classifier", "dinov2-names"],
)
def test_checkpoints_as_they_come(wrap: Callable[[State], Any], state, tmp_path):
    torch.save(wrap(state), tmp_path / "weights.pth")
    assert_same(load(tmp_path / "weights.pth"), state)


def test_safetensors(state, tmp_path):
    save_file(state, tmp_path / "weights.safetensors")
    assert_same(load(tmp_path / "weights.safetensors"), state)


@pytest.mark.parametrize(
    ("name", "stored", "size"),
    [(MODEL, 70, 42), ("eva02_base_patch14_224", 70, 42), ("vit_giant_patch14_reg4_dinov2", 70, 42),
     ("flexivit_small", 80, 48), ("vit_base_patch16_radio_v3", 80, 48), ("vit_huge_patch16_radio_v4", 80, 48)],
)  # fmt: skip
def test_another_image_size_resamples_the_position_embedding_as_timm_does(name, stored, size, tmp_path):
    path = tmp_path / "weights.safetensors"
    other = timm_model(name, stored)
    nn.init.normal_(other.pos_embed)
    save_file(other.state_dict(), path)
    expected = timm_model(name, size, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert expected.pos_embed.shape != other.pos_embed.shape
    found = load(path, name, size)
    assert torch.equal(found["pos_embed"], expected.pos_embed)


def test_file_is_cast_to_the_configured_dtype(state, tmp_path):
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "weights.safetensors")
    found = load(tmp_path / "weights.safetensors", dtype="bf16")
    assert_same(found, {key: value.half().bfloat16() for key, value in state.items()})
    assert {p.dtype for p in found.values()} == {torch.bfloat16}


def test_random_weights_depend_on_nothing_and_disturb_nothing():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = load("random")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(load("random"), first)
    assert first["blocks.0.attn.qkv.weight"].std() > 0


@pytest.mark.parametrize("found", [0, 7])
def test_weights_without_the_wanted_classifier_are_refused(found, state, tmp_path):
    head = {"head.weight": torch.zeros(found, 32), "head.bias": torch.zeros(found)} if found else {}
    save_file(state | head, tmp_path / "weights.safetensors")
    config = TeacherConfig(model=MODEL, kwargs=KWARGS, weights=str(tmp_path / "weights.safetensors"))
    has = "a classifier of 7 classes" if found else "no classifier"
    with pytest.raises(UserError, match=rf"it has {has}; objective.kd_alpha needs one of student.num_classes=10"):
        LazyBackbone(config, SIZE, torch.device("cpu"), classes=10)


def test_hub_weights_without_a_classifier_are_refused_before_they_are_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    with pytest.raises(UserError, match=r"hub: vit_small_patch14_dinov2 has no classifier"):
        LazyBackbone(TeacherConfig(model="vit_small_patch14_dinov2"), SIZE, torch.device("cpu"), classes=10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("blocks.1.norm2.bias"), r"lacks 1 tensors: blocks\.1\.norm2\.bias"),
        (lambda s: [s.pop(key) for key in list(s) if "norm" in key], r"lacks 10 tensors: .*norm.*, \.\.\."),
        (lambda s: s.update(extra=torch.zeros(1)), "has 1 unknown tensors: extra"),
        (lambda s: s.update({"blocks.2.norm1.bias": torch.zeros(32)}), r"has .* unknown .* blocks\.2\.norm1\.bias"),
        (lambda s: s.update({"norm.bias": torch.zeros(31)}), r"norm\.bias has shape \(31,\), .* needs \(32,\)"),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.zeros(32, 3, 16, 16)}),
            r"patch_embed\.proj\.weight has shape \(32, 3, 16, 16\), .* needs \(32, 3, 14, 14\)",
        ),
        (lambda s: s.update(pos_embed=torch.zeros(1, 8, 32)), "does not fit|pos_embed has shape"),
        (lambda s: s.update({"norm.bias": 3}), r"norm\.bias has shape \(\)"),
        (lambda s: s.clear(), "lacks"),
    ],
)
def test_weights_of_another_model_are_refused(change, said, state, tmp_path):
    change(state)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    assert_refused(path, said)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_file_is_refused(suffix, state, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    for size in (path.stat().st_size // 2, 5, 0):
        path.write_bytes(path.read_bytes()[:size])
        assert_refused(path, "truncated, damaged")


def test_file_with_code_in_it_is_refused(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "weights.pt")
    assert_refused(tmp_path / "weights.pt", "no plain state dict")


def test_file_without_a_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "weights.pt")
    assert_refused(tmp_path / "weights.pt", "no plain state dict")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("absent.pth", "no such file"),
        ("pretrained", "no such file; expected hub, random, or the path of a file"),
        (".", "a folder; give the one file"),
        ("demo", "teacher.weights=demo"),
    ],
)
def test_unusable_source_is_refused(weights, said):
    assert_refused(weights, said)


def test_hub_out_of_reach_says_how_to_give_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert_refused("hub", r"hub.*vit_giant_patch14_dinov2.*teacher\.weights=/path/to/model\.safetensors")


def assert_refused(weights: Path | str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load(weights)
    assert str(weights) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_block_is_read_by_itself_in_any_order(suffix, state, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    lazy = LazyBackbone(TeacherConfig(model=MODEL, kwargs=KWARGS, weights=str(path)), SIZE, torch.device("cpu"))
    for wanted in ([1], [0], [], [0, 1]):
        lazy.hold(wanted)
        loaded = {name for name, p in lazy.backbone.blocks.named_parameters() if not p.is_meta}
        assert loaded == {
            key.removeprefix("blocks.") for key in state if key.startswith(tuple(f"blocks.{i}." for i in wanted))
        }
        for name in loaded:
            assert torch.equal(lazy.backbone.blocks.get_parameter(name), state[f"blocks.{name}"])


def test_random_weights_do_not_depend_on_what_is_loaded_when():
    backward = LazyBackbone(TeacherConfig(model=MODEL, kwargs=KWARGS, weights="random"), SIZE, torch.device("cpu"))
    for index in (1, 0, 1):
        backward.hold([index])
    backward.expect([0])
    backward.hold([0, 1])
    found = {key.removeprefix("stem."): p for key, p in backward.backbone.named_parameters()}
    assert_same(found, load("random"))


@pytest.mark.parametrize("cached", [False, True])
def test_hub_weights_come_from_its_file(cached, monkeypatch, state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    asked = []

    def download(repository: str, name: str, local_files_only: bool = False) -> str:
        asked.append((repository, name, local_files_only))
        if local_files_only and not cached:
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same(load("hub"), state)
    file = "timm/vit_giant_patch14_dinov2.lvd142m", "model.safetensors"
    assert asked == ([(*file, True)] if cached else [(*file, True), (*file, False)])


def test_a_model_without_a_hub_file_is_said_to_have_none():
    with pytest.raises(UserError, match="no hub file of vit_giant_patch16_gap_224"):
        load("hub", "vit_giant_patch16_gap_224", 48)


def test_the_fingerprint_tells_weights_apart_and_not_files(state, tmp_path):
    def fingerprint(weights: Path | str) -> str:
        config = TeacherConfig(model=MODEL, kwargs=KWARGS, weights=str(weights), dtype="bf16")
        return LazyBackbone(config, SIZE, torch.device("cpu")).fingerprint

    here, there, other = (tmp_path / name for name in ("here.pth", "there.safetensors", "other.pth"))
    torch.save({"model": state}, here)
    save_file(state, there)
    torch.save(state | {"patch_embed.proj.bias": state["patch_embed.proj.bias"] + 1}, other)
    assert fingerprint(here) == fingerprint(there)
    assert len({fingerprint(here), fingerprint(other), fingerprint("random")}) == 3
    # A position embedding of another grid is resampled, which processors round differently.
    stored = timm_model(image_size=70).state_dict()
    for name, bump in ((here, 0.0), (there, 1e-3)):
        save_file(stored | {"pos_embed": stored["pos_embed"] + bump}, name.with_suffix(".safetensors"))
    assert fingerprint(here.with_suffix(".safetensors")) == fingerprint(there)


def test_counters_of_a_convolutional_stem_stay_whole_numbers(tmp_path):
    """MobileCLIP's stem has batch norms, with 0-d int64 buffers among its weights."""
    name, kwargs = "vit_base_mci_224", {"depth": 1}
    stored = timm.create_model(name, num_classes=0, img_size=32, **kwargs).state_dict()
    counters = {key: torch.tensor(1001) for key in stored if key.endswith("num_batches_tracked")}
    save_file(stored | counters, tmp_path / "weights.safetensors")
    config = TeacherConfig(model=name, kwargs=kwargs, weights=str(tmp_path / "weights.safetensors"), dtype="bf16")
    found = dict(LazyBackbone(config, 32, torch.device("cpu")).backbone.stem.named_buffers())
    assert counters and all(torch.equal(found[key], counter) for key, counter in counters.items())
    assert found[next(iter(counters)).replace("num_batches_tracked", "running_mean")].dtype == torch.bfloat16


def marks(weights: Path | str, blocks: int = KWARGS["depth"], **options: Any) -> dict[str, str]:
    """What is known of a teacher when so many blocks have been read."""
    config = TeacherConfig(model=MODEL, kwargs=KWARGS, weights=str(weights), **options)
    lazy = LazyBackbone(config, SIZE, torch.device("cpu"))
    lazy.mark_samples()
    lazy.hold(range(blocks))
    return lazy.marks.found


@pytest.mark.seconds
@pytest.mark.parametrize("stored", [42, 70])
def test_every_tensor_that_is_read_is_marked(stored, tmp_path):
    """One number of one tensor, the last one: whatever is made of it (position embeddings are resampled at 70)."""
    torch.manual_seed(5)
    state = {key: torch.randn_like(value) for key, value in timm_model(image_size=stored).state_dict().items()}
    torch.save({"model": prefixed("module.", state)}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    found = marks(tmp_path / "a.safetensors")
    assert found == marks(tmp_path / "a.pth")
    for name, value in state.items():
        if name.startswith("blocks.0.") and stored == 70:
            continue  # as at 42
        other = value.clone()
        other.view(-1)[-1] += 1
        save_file(state | {name: other}, tmp_path / "b.safetensors")
        differs = marks(tmp_path / "b.safetensors")
        part = f"block {int(name.split('.')[1]) + 1}" if name.startswith("blocks.") else "stem"
        assert {key for key in found if found[key] != differs[key]} - {f"sample of {part}"} == {part}, name


def test_a_sample_sees_what_no_block_has_been_read_of(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    save_file(state | {"blocks.1.attn.qkv.weight": state["blocks.1.attn.qkv.weight"] + 1}, tmp_path / "b.safetensors")
    found, differs = (marks(tmp_path / f"{file}.safetensors", blocks=0) for file in "ab")
    assert {key for key in found if found[key] != differs[key]} == {"sample of block 2"}


def test_random_weights_are_marked_by_what_is_drawn():
    found = marks("random")
    assert found == marks("random") and len(found) == 2 * (KWARGS["depth"] + 1)
    assert found["block 1"] != found["block 2"]


def test_a_block_of_another_teacher_is_refused_when_it_is_read(state, tmp_path):
    changed = state["blocks.1.norm1.bias"].clone()
    changed[0] += 1
    save_file(state, tmp_path / "a.safetensors")
    save_file(state | {"blocks.1.norm1.bias": changed}, tmp_path / "b.safetensors")
    known = marks(tmp_path / "a.safetensors")
    del known["sample of block 2"]  # as where it has not looked at the number that differs
    config = TeacherConfig(model=MODEL, kwargs=KWARGS, weights=str(tmp_path / "b.safetensors"))
    lazy = LazyBackbone(config, SIZE, torch.device("cpu"))
    lazy.marks.expect(known, "step00000007")
    lazy.hold([0])
    lazy.expect([1])  # read ahead in the background: refused where it is needed
    with pytest.raises(UserError, match=r"step00000007: saved with teacher=\w+ \(block 2\), this run has teacher=\w+"):
        lazy.hold([0, 1])


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("blocks.1.mlp.fc2.bias", "fp32", r"block 2 .*weights are not finite in fp32: mlp.fc2.bias"),
        ("patch_embed.proj.bias", "fp32", r"block 1 .*weights are not finite in fp32: patch_embed.proj.bias"),
        (None, "fp16", r"block 2 .*weights are finite, so they overflow in teacher.dtype=fp16"),
        (None, "fp32", None),
    ],
)
def test_the_teacher_is_blamed_for_what_it_gives(name, dtype, said, state, tmp_path):
    state = {key: value * 0.1 for key, value in state.items()}
    if name:
        state[name][0] = torch.nan
    for block in (0, 1):  # finite in float16, their sum is not
        state[f"blocks.{block}.mlp.fc2.bias"][1], state[f"blocks.{block}.ls2.gamma"][1] = 6e4, 1.0
    save_file(state, tmp_path / "weights.safetensors")
    config = TeacherConfig(model=MODEL, kwargs=KWARGS, weights=str(tmp_path / "weights.safetensors"), dtype=dtype)
    cpu = torch.device("cpu")
    teacher = build_teacher(config, SIZE, cpu)
    found = teacher_fault(teacher, [torch.randn(2, 3, SIZE, SIZE)], 2, config, World(0, 1, 0, 1, cpu))
    if said is None:
        assert found is None
    else:
        assert re.fullmatch(said + r"\)", found) and str(config.weights) in found


def test_a_classifier_that_is_not_finite_is_named(state, tmp_path):
    state = {key: value * 0.1 for key, value in state.items()}
    state |= {"head.weight": torch.full((3, KWARGS["embed_dim"]), torch.nan), "head.bias": torch.zeros(3)}
    save_file(state, tmp_path / "weights.safetensors")
    cpu, kwargs = torch.device("cpu"), {**KWARGS, "global_pool": "token"}
    config = TeacherConfig(model=MODEL, kwargs=kwargs, weights=str(tmp_path / "weights.safetensors"))
    teacher = build_teacher(config, SIZE, cpu, classes=3)
    found = teacher_fault(teacher, [torch.randn(2, 3, SIZE, SIZE)], 2, config, World(0, 1, 0, 1, cpu))
    assert "block 2 " in found and "weights are not finite in fp32: head.weight" in found


def test_which_of_several_sets_of_weights_is_taken_is_said_once(state, tmp_path, caplog):
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": state, "state_dict_ema": state}, path)
    with caplog.at_level("INFO"):
        load(path)
    assert sum("takes 'state_dict_ema'" in line for line in caplog.messages) == 1
