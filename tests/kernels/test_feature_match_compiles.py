"""The Triton kernels compile for GPUs and fit their shared memory; no GPU is needed for that."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from leap_kernels.feature_match import triton_kernel  # noqa: E402

pytestmark = pytest.mark.seconds

H100, L40S = 90, 89
SHARED_BYTES = {H100: 227 * 1024, L40S: 99 * 1024}
MATCH = {"HAS_BIAS": True, "AFFINE": False, "GRADIENTS": True, "STATS": False, "PRECISION": "tf32x3"}
MATCH_TYPES = dict.fromkeys(("s_ptr", "w_ptr", "b_ptr", "t_ptr", "ds_ptr"), "*bf16")
GRAM = {"AFFINE_A": False, "AFFINE_B": False, "SYMMETRIC": True, "PRECISION": "tf32x3"}


def compiled_for(
    gpu: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
) -> Any:
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
    return triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": warps, "num_stages": stages})


def match_constants(ds: int, dt: int) -> dict[str, Any]:
    d0, d1 = triton_kernel.segments(ds)
    return {"DS": ds, "DT": dt, "D0": d0, "D1": d1, **MATCH}


@pytest.mark.parametrize(
    ("modes", "ds", "dt"),
    [({}, 384, 1536), ({"AFFINE": True}, 192, 384), ({"STATS": True, "GRADIENTS": False}, 192, 384)],
)
def test_match_kernel(modes: dict[str, bool], ds: int, dt: int) -> None:
    constants = {**match_constants(ds, dt), **modes, "BLOCK_M": 64, "BLOCK_N": 64}
    compiled = compiled_for(H100, triton_kernel._match_kernel, MATCH_TYPES, constants, warps=8, stages=2)
    assert compiled.metadata.shared <= SHARED_BYTES[H100]
    assert "wgmma.mma_async" in compiled.asm["ptx"]  # Hopper's tensor cores, not a fallback


@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_gram_kernel(dtype: str) -> None:
    constants = {"DA": 384, "DB": 384, **GRAM, "BLOCK_M": 32, "BLOCK_D": 128}
    types = dict.fromkeys(("a_ptr", "b_ptr", "like_ptr"), dtype)
    compiled = compiled_for(H100, triton_kernel._gram_kernel, types, constants, warps=8, stages=3)
    assert compiled.metadata.shared <= SHARED_BYTES[H100]
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
        compiled_for(H100, triton_kernel._column_sum_kernel, types, constants, warps=4, stages=3).metadata.shared
        < 48 * 1024
    )


def kept(width: int) -> list[triton.Config]:
    """The tuner's tiles for a student of this width, and one that is too large for any."""
    d0, d1 = triton_kernel.segments(width)
    tiles = [({"BLOCK_M": 512, "BLOCK_N": 512}, 8, 2), *triton_kernel._MATCH_TILES]
    configs = [triton.Config(tile, num_warps=warps, num_stages=stages) for tile, warps, stages in tiles]
    return triton_kernel._fitting(configs, {}, D0=d0, D1=d1)


@pytest.mark.parametrize(("width", "largest"), [(192, 128), (384, 64), (768, 32), (1024, 32)])
def test_tiles_with_too_many_accumulators_are_never_compiled(width: int, largest: int) -> None:
    assert max(config.kwargs["BLOCK_M"] for config in kept(width)) == largest


@pytest.mark.parametrize(("width", "dtype"), [(1024, "*bf16"), (512, "*fp32")])
def test_the_last_tile_fits_the_smallest_shared_memory(width: int, dtype: str) -> None:
    last = kept(width)[-1]
    constants = match_constants(width, 1536) | last.kwargs
    types = dict.fromkeys(MATCH_TYPES, dtype)
    kernel = triton_kernel._match_kernel
    compiled = compiled_for(L40S, kernel, types, constants, last.num_warps, last.num_stages)
    assert compiled.metadata.shared <= SHARED_BYTES[L40S]
