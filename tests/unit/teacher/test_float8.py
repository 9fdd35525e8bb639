"""A teacher in FP8: its products against an emulation in float64, and which blocks may run so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_dist.config import TeacherConfig
from leap_dist.errors import UserError
from leap_dist.models import build_model
from leap_dist.teacher import build_teacher
from leap_dist.teacher.float8 import LARGEST, Float8Linear, check_device, photographs, quantised
from leap_dist.teacher.lazy_backbone import LazyBackbone
from leap_dist.teacher.replicated import ReplicatedTeacher

CPU, SIZE, DEPTH = torch.device("cpu"), 32, 4
KWARGS = {"patch_size": 8, "embed_dim": 48, "depth": DEPTH, "num_heads": 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def config(**options: object) -> TeacherConfig:
    return TeacherConfig(**{"model": "vit_tiny_patch16_224", "kwargs": KWARGS, "weights": "random"} | options)


def teacher(**options: object) -> ReplicatedTeacher:
    return ReplicatedTeacher(LazyBackbone(config(**options), SIZE, CPU))


def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def in_float8(one: ReplicatedTeacher) -> list[bool]:
    return [any(isinstance(part, Float8Linear) for part in block.modules()) for block in one.blocks]


def emulated(rows: Tensor) -> Tensor:
    """Rows scaled to the range of e4m3 and rounded to it: 3 bits behind the point, exponents from -6 on; in float64."""
    scale = rows.float().abs().amax(1, keepdim=True) / LARGEST
    scaled = (rows.float() / scale).double()
    ulp = torch.exp2(scaled.abs().clamp_min(2.0**-6).log2().floor() - 3)
    return (scaled / ulp).round() * ulp * scale.double()  # torch rounds halves to even, as the format does


@torch.no_grad()
def test_a_layer_multiplies_the_rounded_numbers_of_rows_and_channels() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).to(torch.bfloat16)
    tokens = (torch.randn(3, 5, 64) * torch.logspace(-3, 3, 15).view(3, 5, 1)).to(torch.bfloat16)
    found = Float8Linear(layer)(tokens)
    product = (emulated(tokens.reshape(15, 64)) @ emulated(layer.weight).T).reshape(3, 5, 48)
    right = product + layer.bias.double()
    assert found.dtype == torch.bfloat16 and found.shape == (3, 5, 48)
    # Product and sum are each rounded to bf16, and sums of 64 numbers in float32 lose what is far below their largest.
    largest = product.abs().amax(-1, keepdim=True)
    assert ((found.double() - right).abs() <= 2**-8 * (product.abs() + right.abs()) + 1e-5 * largest).all()
    plain = layer(tokens).double()
    for mine, theirs in zip(found.double().flatten(0, 1), plain.flatten(0, 1), strict=True):
        assert F.cosine_similarity(mine, theirs, dim=0) > 0.998  # whatever the scale of the row


def test_zeros_and_what_is_not_finite() -> None:
    numbers, scale = quantised(torch.zeros(2, 16))
    assert not numbers.float().any() and scale.isfinite().all()
    layer = Float8Linear(nn.Linear(16, 16).to(torch.bfloat16))
    tokens = torch.zeros(2, 16, dtype=torch.bfloat16)
    tokens[1, 3] = float("nan")
    found = layer(tokens)
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_blocks_turn_as_they_arrive_and_give_their_memory_back() -> None:
    one, plain = teacher(dtype="fp8", fp8_bound=0.9), teacher(dtype="bf16")
    assert in_float8(one) == [True, False, False, False]
    first = one.resident_bytes()
    for block in (2, 4):
        one.retarget(block)
        plain.retarget(block)
        assert in_float8(one) == [index < block for index in range(DEPTH)]
        found, right = (which.features(images()).patch.float() for which in (one, plain))
        assert not torch.equal(found, right)
        assert F.cosine_similarity(found, right, dim=-1).mean() > 0.99
    assert one.resident_bytes() < 0.7 * plain.resident_bytes()
    features = one.features(images())
    one.retarget(1)
    assert one.resident_bytes() == first and in_float8(one) == [True, False, False, False]
    one.retarget(4)
    assert torch.equal(one.features(images()).patch, features.patch)


def test_a_block_that_loses_too_much_stays_in_bf16_and_the_run_says_which(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build_model("vit_tiny_patch16_224", KWARGS, SIZE)
    model.blocks[1].mlp.fc2.weight.data[:] = 0.02 * torch.randn_like(model.blocks[1].mlp.fc2.weight)
    # One channel so large that its row's other numbers vanish in FP8, and are all that the block's tokens live from.
    model.blocks[1].mlp.fc1.bias.data[0] = 3e4
    model.blocks[1].mlp.fc2.weight.data[:, 0] = 0
    model.blocks[1].mlp.fc2.weight.data[:, 1:] *= 200
    path = tmp_path / "teacher.pth"
    torch.save(model.state_dict(), path)
    with caplog.at_level("INFO"):
        one = teacher(dtype="fp8", weights=str(path), fp8_bound=0.99)
        one.retarget(DEPTH)
    assert in_float8(one) == [True, False, True, True]
    said = [record.getMessage() for record in caplog.records if "teacher block" in record.getMessage()]
    assert [line.split(" (")[0] for line in said] == [
        "teacher block 1: runs in FP8",
        "teacher block 2: stays in bf16, below teacher.fp8_bound=0.99",
        "teacher block 3: runs in FP8",
        "teacher block 4: runs in FP8",
    ]


def test_the_bound_holds_for_what_the_student_sees_with_the_errors_of_all_blocks_before() -> None:
    one, plain = teacher(dtype="fp8", fp8_bound=-1.0), teacher(dtype="bf16")
    one.retarget(DEPTH)
    plain.retarget(DEPTH)
    pictures = photographs(SIZE, one.spec.mean, one.spec.std)
    found, right = (which.features(pictures).patch.float() for which in (one, plain))
    cosine = float(F.cosine_similarity(found, right, dim=-1).mean())
    assert one._lazy._float8.found[-1] == pytest.approx(cosine, abs=1e-6)
    none = teacher(dtype="fp8", fp8_bound=1.0)
    none.retarget(DEPTH)
    assert in_float8(none) == [False] * DEPTH
    assert torch.equal(none.features(images()).patch, plain.features(images()).patch)


def test_what_was_found_of_a_file_is_kept_and_goes_on_where_it_ended(
    own_cache: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "teacher.pth"
    torch.manual_seed(0)
    torch.save(build_model("vit_tiny_patch16_224", KWARGS, SIZE).state_dict(), path)
    options = {"dtype": "fp8", "weights": str(path), "fp8_bound": 0.9}
    first = teacher(**options)
    first.retarget(2)
    (kept,) = own_cache.rglob("*.safetensors")
    with caplog.at_level("INFO"):
        second = teacher(**options)
        second.retarget(2)
    assert [record.getMessage() for record in caplog.records if "teacher block" in record.getMessage()] == [
        "teacher blocks 1 to 2: judged before; in bf16: none"
    ]
    second.retarget(DEPTH)
    whole = teacher(dtype="fp8", weights=str(path), fp8_bound=0.9 + 1e-9)  # another bound: found out anew
    whole.retarget(DEPTH)
    assert len(list(own_cache.rglob("*.safetensors"))) == 2
    assert second._lazy._float8.found == whole._lazy._float8.found
    kept.write_bytes(b"cut off")
    third = teacher(**options)
    third.retarget(DEPTH)
    assert third._lazy._float8.found == whole._lazy._float8.found


def test_a_rank_that_holds_later_blocks_alone_judges_those_before_it_too() -> None:
    with pytest.raises(AssertionError, match="block 3 is loaded"):
        LazyBackbone(config(dtype="fp8", fp8_bound=0.9), SIZE, CPU).load(2)
    lazy = LazyBackbone(config(dtype="fp8", fp8_bound=0.9), SIZE, CPU)
    lazy.judge(DEPTH)
    lazy.hold([2, 3])
    assert [lazy.is_loaded(index) for index in range(DEPTH)] == [False, False, True, True]
    whole = teacher(dtype="fp8", fp8_bound=0.9)
    whole.retarget(DEPTH)
    assert lazy._float8.found == whole._lazy._float8.found


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("eva02_tiny_patch14_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),  # looks into its qkv's weight
        ("vit_small_patch16_dinov3", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
        ("beit_base_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
        ("cait_xxs24_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
        ("vit_giant_patch14_dinov2", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    ],
)
def test_other_families(model: str, kwargs: dict[str, int]) -> None:
    size = 28 if "14" in model else 32
    one = ReplicatedTeacher(LazyBackbone(config(model=model, kwargs=kwargs, dtype="fp8", fp8_bound=-1.0), size, CPU))
    one.retarget(2)
    assert in_float8(one) == [True, True]
    assert one.features(torch.randn(2, 3, size, size)).patch.isfinite().all()
    assert min(one._lazy._float8.found) > 0.98


def test_where_there_is_no_fp8_a_run_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"teacher\.dtype=fp8: needs a GPU with FP8, and this run is on cpu; use bf16"):
        build_teacher(config(dtype="fp8"), SIZE, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(UserError, match=r"NVIDIA A100 has compute capability 8\.0, and FP8 begins at 8\.9"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    check_device(torch.device("cuda"))


@pytest.mark.slow
def test_compiled_blocks_turn_too() -> None:
    compiled, plain = (teacher(dtype="fp8", fp8_bound=0.9, compile=compile) for compile in (True, False))
    for block in (1, 3):
        compiled.retarget(block)
        plain.retarget(block)
        found, right = (which.features(images()).patch.float() for which in (compiled, plain))
        assert F.cosine_similarity(found, right, dim=-1).min() > 0.99
    assert in_float8(compiled) == [True, True, True, False]
