"""One step of the match on random tokens: `leap_kernels.feature_match` and what a plain program would write instead.

Forward, backward and both, each with and without the CKA. The op computes its gradients in the forward pass, so only
full steps compare.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from leap_dist.benchmarking.harness import Row, interleaved, peak_memory, peaks, quantiles, versions
from leap_dist.matching import linear_cka
from leap_dist.runtime.distributed import device_name
from leap_kernels.feature_match import choose, feature_match

EAGER, COMPILED = "eager", "compiled"  # plain PyTorch, as it is and under torch.compile
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
        self._compiled = torch.compile(self._eager)

    def forward(self, name: str, cka: bool) -> tuple[Tensor, Tensor | None]:
        """Loss and, on request, score."""
        with self._autocast():
            if name == EAGER:
                return self._eager(cka)
            if name == COMPILED:
                return self._compiled(cka)
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
        if name in (EAGER, COMPILED, "reference"):
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
