"""The Triton kernels compile for an H100 (sm_90) and fit its shared memory; no GPU is needed for that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from leap_kernels.feature_match import triton_kernel  # noqa: E402

H100_SHARED_BYTES = 227 * 1024
MATCH = {"HAS_BIAS": True, "AFFINE": False, "GRADIENTS": True, "STATS": False, "PRECISION": "tf32x3"}
GRAM = {"AFFINE_A": False, "AFFINE_B": False, "SYMMETRIC": True, "PRECISION": "tf32x3"}


def compile_for_h100(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> Any:
    """Pointers not in `types` are float32; every non-constant argument is 16-byte aligned, as in training."""
    signature = {}
    for name in kernel.arg_names:
        integer = "i32" if name in ("M", "split_rows") or name.startswith("stride") else "fp32"
        default = "*fp32" if name.endswith("_ptr") else integer
        signature[name] = "constexpr" if name in constants else types.get(name, default)
    positions = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n.startswith("stride")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={positions[name]: value for name, value in constants.items()},
        attrs={positions[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})


@pytest.mark.parametrize(
    ("modes", "ds", "dt"),
    [({}, 384, 1536), ({"AFFINE": True}, 192, 384), ({"STATS": True, "GRADIENTS": False}, 192, 384)],
)
def test_match_kernel(modes: dict[str, bool], ds: int, dt: int) -> None:
    d0, d1 = triton_kernel.segments(ds)
    constants = {"DS": ds, "DT": dt, "D0": d0, "D1": d1, **MATCH, **modes, "BLOCK_M": 64, "BLOCK_N": 32}
    types = dict.fromkeys(("s_ptr", "w_ptr", "b_ptr", "t_ptr", "ds_ptr"), "*bf16")
    compiled = compile_for_h100(triton_kernel._match_kernel, types, constants, warps=8, stages=3)
    assert compiled.metadata.shared <= H100_SHARED_BYTES
    assert "wgmma.mma_async" in compiled.asm["ptx"]  # Hopper's tensor cores, not a fallback


@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_gram_kernel(dtype: str) -> None:
    constants = {"DA": 384, "DB": 384, **GRAM, "BLOCK_M": 32, "BLOCK_D": 128}
    types = dict.fromkeys(("a_ptr", "b_ptr", "like_ptr"), dtype)
    compiled = compile_for_h100(triton_kernel._gram_kernel, types, constants, warps=8, stages=3)
    assert compiled.metadata.shared <= H100_SHARED_BYTES
    assert "wgmma.mma_async" in compiled.asm["ptx"]


def test_segments_cover_every_width_with_less_padding_than_a_power_of_two() -> None:
    for width in range(1, 1025):
        first, second = triton_kernel.segments(width)
        assert first + second >= width and first >= 16 and (second == 0 or second >= 16)
        assert all(x & (x - 1) == 0 for x in (first, second))
    assert [sum(triton_kernel.segments(width)) for width in (192, 384, 768, 1024)] == [192, 384, 768, 1024]


def test_column_sum_kernel() -> None:
    constants = {"D": 384, "AFFINE": True, "BLOCK_M": 16, "BLOCK_D": 128}
    types = {"x_ptr": "*bf16", "out_ptr": "*fp64"}
    assert (
        compile_for_h100(triton_kernel._column_sum_kernel, types, constants, warps=4, stages=3).metadata.shared
        < 48 * 1024
    )


@pytest.mark.parametrize(
    ("width", "dtype", "largest"),
    [(192, torch.bfloat16, 128), (384, torch.bfloat16, 64), (768, torch.bfloat16, 32), (1024, torch.bfloat16, 32),
     (384, torch.float32, 16), (1024, torch.float32, 16)],
)  # fmt: skip
def test_tiles_too_large_for_an_h100_are_never_compiled(
    width: int, dtype: torch.dtype, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(shared_memory_per_block_optin=H100_SHARED_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    named = {"s_ptr": torch.empty(0, dtype=dtype), "t_ptr": torch.empty(0, dtype=dtype)}
    d0, d1 = triton_kernel.segments(width)
    tiles = [({"BLOCK_M": 512, "BLOCK_N": 512}, 8, 2), *triton_kernel._MATCH_TILES]
    configs = [triton.Config(tile, num_warps=warps, num_stages=stages) for tile, warps, stages in tiles]
    kept = triton_kernel._fitting(configs, named, D0=d0, D1=d1)
    assert kept and max(config.kwargs["BLOCK_M"] for config in kept) == largest
