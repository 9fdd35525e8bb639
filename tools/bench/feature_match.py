"""Benchmark of `leap_kernels.feature_match` against eager Linear + MSE (+ three-product CKA), in one run.

    python tools/bench/feature_match.py                     # CPU: M=8192 fp32; CUDA: M=65536 bf16 autocast
    python tools/bench/feature_match.py --rows 65536 --precision bf16 --csv feature_match.csv

Needs torch, triton (on CUDA) and this package. Forward, backward and full step (both), each with and without CKA. The
op computes its gradients in the forward pass, so only the full steps compare. TFLOP/s counts the products each form
really takes; the roofline is the least time those products, or one reading of the inputs, need at the peaks this
machine reaches in the same run. The last lines are the ratios to eager.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from leap_dist.benchmarking.harness import Row, interleaved, peak_memory, peaks, quantiles, report, versions
from leap_dist.matching import linear_cka
from leap_dist.runtime.distributed import device_name
from leap_kernels.feature_match import choose, feature_match

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.bfloat16}
PARTS = ("forward", "backward", "full")


class Problem:
    """The tensors of one shape, and one step of each implementation on them."""

    def __init__(self, m: int, ds: int, dt: int, precision: str, device: torch.device) -> None:
        torch.manual_seed(0)
        dtype = PRECISIONS[precision]
        parameters = torch.float32 if precision == "autocast" else dtype
        self.shape, self.device, self.dtype, self.precision = (m, ds, dt), device, dtype, precision
        self.student = torch.randn(m, ds, device=device).to(dtype).requires_grad_()
        self.weight = (torch.randn(dt, ds, device=device) * 0.05).to(parameters).requires_grad_()
        self.bias = torch.zeros(dt, device=device, dtype=parameters, requires_grad=True)
        self.teacher = torch.randn(m, dt, device=device).to(dtype)

    def forward(self, name: str, cka: bool) -> tuple[Tensor, Tensor | None]:
        """Loss and, on request, score."""
        with self._autocast():
            if name == "eager":
                return self._eager(cka)
            got = feature_match(self.student, self.weight, self.bias, self.teacher, impl=name, moments=cka)
        return (got[0], linear_cka(got[1], self.weight)) if cka else (got, None)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype) if self.precision == "autocast" else nullcontext()

    def _eager(self, cka: bool) -> tuple[Tensor, Tensor | None]:
        projected = F.linear(self.student, self.weight, self.bias)
        loss = F.mse_loss(projected.float(), self.teacher.float())
        return loss, three_product_cka(projected.detach(), self.teacher) if cka else None

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        self.student.grad = self.weight.grad = self.bias.grad = None

    def flops(self, name: str, cka: bool) -> float:
        """Multiply-adds times two of a full step; symmetric products count half."""
        m, ds, dt = self.shape
        if name == "auto":
            name = choose(name, self.student, self.teacher, self.dtype, cka)
        if name in ("eager", "reference"):
            return 6 * m * ds * dt + 6 * m * dt * dt * cka
        own = 4 * m * ds * dt if name == "triton" else 2 * m * ds * dt + 2 * m * ds * ds
        return own + 2 * m * ds * dt + m * ds * ds + m * dt * dt * cka

    def bytes(self) -> float:
        """Student and teacher read once, the student's gradient written."""
        m, ds, dt = self.shape
        return m * (2 * ds + dt) * self.student.element_size()


def three_product_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA as published: centred float32 features, three products of width Dt, outside autocast."""
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float(), y.float()
        x, y = x - x.mean(0), y - y.mean(0)
        return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def timed(problem: Problem, name: str, cka: bool, part: str) -> Callable[[], Callable[[], object]]:
    """Set-up that returns the forward pass, the backward pass, or both."""

    def prepare() -> Callable[[], object]:
        problem.clear()
        if part == "forward":
            return lambda: problem.forward(name, cka)
        if part == "backward":
            return problem.forward(name, cka)[0].backward
        return lambda: problem.forward(name, cka)[0].backward()

    return prepare


def measure(problem: Problem, names: list[str], repeats: int) -> list[Row]:
    """Rows for every implementation and part, with and without CKA."""
    tflops, bandwidth = peaks(problem.device, problem.dtype)
    m, ds, dt = problem.shape
    common = {
        "device": device_name(problem.device),
        "versions": versions(),
        "shape": f"M={m} Ds={ds} Dt={dt}",
        "precision": problem.precision,
    }
    rows = []
    for cka in (False, True):
        variants = {f"{name}/{part}": (name, part) for name in names for part in PARTS}
        calls = {key: timed(problem, name, cka, part) for key, (name, part) in variants.items()}
        times = interleaved(calls, problem.device, repeats)
        for key, (name, part) in variants.items():
            median, p20, p80 = quantiles(times[key])
            flops, memory = problem.flops(name, cka), peak_memory(calls[key](), problem.device)
            least = max(flops / tflops, problem.bytes() / bandwidth) / 1e9  # ms
            full = part == "full"
            rows.append(
                Row(
                    name=name + (" + CKA" if cka else ""),
                    part=part,
                    median=median,
                    p20=p20,
                    p80=p80,
                    memory=memory,
                    tflops=flops / median / 1e9 if full else float("nan"),
                    roofline=least / median if full else float("nan"),
                    **common,
                )
            )
    return rows


def ratios(rows: list[Row], names: list[str]) -> None:
    """Full steps against eager."""
    full = {row.name: row for row in rows if row.part == "full"}
    for suffix in ("", " + CKA"):
        eager = full["eager" + suffix]
        for name in names[1:]:
            row = full[name + suffix]
            speed, memory = eager.median / row.median, row.memory / eager.memory
            print(f"{row.name}: {speed:.2f}x the speed of eager, {memory:.0%} of its extra memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--rows", type=int, default=65536 if cuda else 8192, help="M, tokens")
    parser.add_argument("--student", type=int, default=384, help="Ds")
    parser.add_argument("--teacher", type=int, default=1536, help="Dt")
    parser.add_argument("--precision", choices=PRECISIONS, default="autocast" if cuda else "fp32")
    parser.add_argument("--impls", nargs="+", default=["auto"], choices=("auto", "reference", "gram", "triton"))
    parser.add_argument("--repeats", type=int, default=20 if cuda else 9)
    parser.add_argument("--csv", type=Path, help="append the rows here")
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    problem = Problem(args.rows, args.student, args.teacher, args.precision, device)
    names = ["eager", *args.impls]
    rows = measure(problem, names, args.repeats)
    report(rows, args.csv)
    ratios(rows, names)


if __name__ == "__main__":
    main()
