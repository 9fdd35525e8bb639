"""The Triton kernels, really run (interpreted where there is no GPU), against float64 and plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leap_dist.matching.cka import linear_cka, linear_cka_of_features
from leap_kernels import Moments, feature_match
from leap_kernels.feature_match import reference

pytestmark = pytest.mark.seconds

NAMES = ("loss", "student", "weight", "bias", *Moments._fields)
# What the kernel may add to plain PyTorch's own error. bfloat16: the interpreter cuts bits off where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def make(m: int, ds: int, dt: int, dtype: torch.dtype, *, bias: bool = True, offset: float = 1.0, scale: float = 1.0,
         teacher_dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:  # fmt: skip
    g = torch.Generator().manual_seed(m + ds + dt)
    s, w, b, t = (torch.randn(shape, generator=g) for shape in ((m, ds), (dt, ds), (dt,), (m, dt)))
    w = w / ds**0.5
    return {
        "student": (scale * (s + offset)).to(dtype),
        "weight": w.to(dtype),
        "bias": (b * scale).to(dtype) if bias else None,
        "teacher": (scale * (t + 2 * s @ w.T + offset)).to(teacher_dtype or dtype),
    }


def case(*shape: Any, objective: str = "mse", tiles: tuple[dict[str, int], ...] = (), **options: Any) -> dict[str, Any]:
    return {"inputs": make(*shape, **options), "options": {"objective": objective}, "tiles": tiles}


def strided(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values, every tensor non-contiguous: column-major, or rows with a gap."""
    s, w, b, t = inputs.values()
    pairs = torch.stack([b, b], 1)
    return {"student": s.T.contiguous().T, "weight": w.repeat(1, 2)[:, : w.shape[1]], "bias": pairs[:, 0],
            "teacher": t.repeat(1, 3)[:, : t.shape[1]]}  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    f"{str(dtype)[6:]}-{objective}": case(70, 40, 50, dtype, objective=objective)
    for dtype in TOLERANCE
    for objective in ("mse", "normalised", "cosine")
}
CASES |= {
    "single row": case(1, 16, 8, torch.float32),
    "no bias": case(33, 48, 40, torch.float32, bias=False),
    "width 192": case(20, 192, 33, torch.float32),
    "width 384": case(17, 384, 20, torch.bfloat16) | {"tuned": True},
    "width 768": case(17, 768, 20, torch.bfloat16),
    "width 3": case(9, 3, 5, torch.float32),
    "teacher in float32": case(40, 24, 40, torch.bfloat16, teacher_dtype=torch.float32),
    "huge": case(40, 24, 40, torch.float32, scale=1e6),
    "tiny": case(40, 24, 40, torch.float32, scale=1e-6),
    "rows split over programs": case(2053, 16, 16, torch.float32),
    "mean 30 spreads": case(300, 24, 40, torch.float32, offset=30.0),
    "other tiles": case(
        70, 40, 50, torch.float32, tiles=({"BLOCK_M": 32, "BLOCK_N": 16}, {"BLOCK_M": 16, "BLOCK_D": 16})
    ),
    "one tile": case(30, 40, 50, torch.float32, tiles=({"BLOCK_M": 64, "BLOCK_N": 64}, {"BLOCK_M": 64, "BLOCK_D": 64})),
}
CASES["non-contiguous"] = {**CASES["float32-mse"], "inputs": strided(CASES["float32-mse"]["inputs"])}
LEARNT = CASES["mean 30 spreads"]["inputs"]
s64, w64, _, t64 = (x.double() for x in LEARNT.values())
CASES["learnt mean"] = {**CASES["mean 30 spreads"], "inputs": LEARNT | {"bias": (t64 - s64 @ w64.T).mean(0).float()}}
NAN = case(40, 24, 40, torch.float32)
NAN["inputs"]["teacher"][-1, -1] = float("nan")
FIT = case(40, 24, 40, torch.float32)
FIT["inputs"]["teacher"] = F.linear(*(FIT["inputs"][name].double() for name in ("student", "weight", "bias"))).float()
AUTOCAST = case(40, 24, 40, torch.float32) | {"autocast": torch.bfloat16}
SHIFTED = case(700, 24, 40, torch.bfloat16, offset=30.0)
EVEN = case(20, 24, 40, torch.float32)  # equal rows, and every third of them the next number
for side, width in (("student", 24), ("teacher", 40)):
    row = torch.linspace(0.7, -1.3, width) * 1e3
    EVEN["inputs"][side] = torch.where(torch.arange(20)[:, None] % 3 > 0, row, row.nextafter(torch.tensor(1e9)))
OTHERS = {"even": EVEN, "nan": NAN, "fit": FIT, "autocast": AUTOCAST, "shifted": SHIFTED, "again": CASES["float32-mse"],
          "float64": case(4, 3, 5, torch.float64), "wide": case(4, 1025, 5, torch.bfloat16),
          "wide in float32": case(4, 513, 5, torch.float32),
          "moments": case(300, 40, 50, torch.float32, offset=30.0) | {"alone": torch.bfloat16},
          "moments, wider": case(70, 1100, 20, torch.bfloat16) | {"alone": torch.bfloat16}}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("triton")
    everything = CASES | OTHERS
    torch.save(list(everything.values()), folder / "cases.pt")
    root = Path(__file__).parents[2]
    command = [sys.executable, str(Path(__file__).with_name("interpreted.py")), "cases.pt", "results.pt"]
    interpret = "0" if torch.cuda.is_available() else "1"
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret}
    child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, child.stderr[-3000:]
    return dict(zip(everything, torch.load(folder / "results.pt"), strict=True))


def plain(
    inputs: dict[str, Tensor | None], objective: str, dtype: torch.dtype | None = None, impl: str = "reference"
) -> list[Tensor | None]:
    """Plain PyTorch (or `impl`), in `dtype` or in the inputs' own, as float64."""
    tensors = {name: None if x is None else x.to(dtype or x.dtype, copy=True) for name, x in inputs.items()}
    leaves = [tensors[name] for name in ("student", "weight", "bias")]
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    loss, moments = feature_match(**tensors, impl=impl, objective=objective, moments=True)
    loss.backward()
    found = (loss, *(None if leaf is None else leaf.grad for leaf in leaves), *moments)
    return [None if x is None else x.detach().double() for x in found]


def error(got: Tensor, truth: Tensor) -> float:
    norm = torch.linalg.vector_norm
    return (norm(got.double() - truth) / norm(truth).clamp_min(1e-300)).item()


@pytest.mark.parametrize("name", CASES)
def test_as_close_to_float64_as_plain_pytorch(name: str, results: dict[str, Any]) -> None:
    inputs, objective = CASES[name]["inputs"], CASES[name]["options"]["objective"]
    truth, own = plain(inputs, objective, torch.float64), plain(inputs, objective)
    for what, got, ref, true in zip(NAMES, results[name], own, truth, strict=True):
        if true is None:
            assert got is None
        elif torch.linalg.vector_norm(true) > 0:
            assert error(got, true) <= error(ref, true) + TOLERANCE[inputs["student"].dtype], what


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter takes hours")
@pytest.mark.parametrize(("ds", "dt"), [(192, 384), (384, 1536), (768, 4096)])
def test_auto_at_the_shapes_of_training(ds: int, dt: int) -> None:
    inputs = {name: x.cuda() for name, x in make(16384 + 17, ds, dt, torch.bfloat16).items()}
    truth, own, got = plain(inputs, "mse", torch.float64), plain(inputs, "mse"), plain(inputs, "mse", impl="auto")
    for what, fused, ref, true in zip(NAMES, got, own, truth, strict=True):
        assert error(fused, true) <= error(ref, true) + TOLERANCE[torch.bfloat16], what


def test_runs_repeat_bit_for_bit(results: dict[str, Any]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(results["again"], results["float32-mse"], strict=True))


def test_constant_tokens_score_zero_as_from_the_other_implementations(results: dict[str, Any]) -> None:
    assert linear_cka(Moments(*results["even"][4:]), EVEN["inputs"]["weight"]) == 0.0


def test_nan_in_nan_out(results: dict[str, Any]) -> None:
    assert results["nan"][0].isnan() and results["nan"][1][-1].isnan().all()


def test_exact_fit_has_no_loss(results: dict[str, Any]) -> None:
    assert 0 <= results["fit"][0] < 1e-12
    assert results["fit"][1].abs().max() < 1e-8


def test_autocast_rounds_the_products_not_the_parameters(results: dict[str, Any]) -> None:
    inputs = AUTOCAST["inputs"]
    truth = plain(inputs, "mse", torch.float64)
    for got, true in zip(results["autocast"][:4], truth[:4], strict=True):
        assert got.dtype == torch.float32
        assert 1e-7 < error(got, true) < 2**-6


def test_cka_where_the_mean_is_thirty_times_the_spread(results: dict[str, Any]) -> None:
    """bfloat16 features and products; the truth sees the same rounded features."""
    s, w, _, t = (x.double() for x in SHIFTED["inputs"].values())
    score = linear_cka(Moments(*results["shifted"][4:]), w)
    assert abs(score - linear_cka_of_features(s @ w.T, t)) < 1e-4


@pytest.mark.parametrize("name", ["moments", "moments, wider"])
def test_moments_alone_round_what_is_left_of_the_means(name: str, results: dict[str, Any]) -> None:
    student, teacher = (OTHERS[name]["inputs"][which].double() for which in ("student", "teacher"))
    truth = reference.moments(student, teacher)
    for what, got, true in zip(Moments._fields, results[name], truth, strict=True):
        assert got.dtype == torch.float32 and error(got, true) < TOLERANCE[torch.bfloat16], what
    assert abs(linear_cka(Moments(*results[name]), None) - linear_cka(truth, None)) < 1e-3


def test_what_the_kernels_cannot_take_is_named(results: dict[str, Any]) -> None:
    assert "takes float32, bfloat16 and float16, got torch.float64" in results["float64"]
    assert "with products in torch.bfloat16 Ds is at most 1024, got 1025" in results["wide"]
    assert "with products in torch.float32 Ds is at most 512, got 513" in results["wide in float32"]
