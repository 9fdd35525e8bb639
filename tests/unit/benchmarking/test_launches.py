"""Launches and reads of a few operations against a count by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from leap_dist.benchmarking.launches import OTHER, counted, showing_kernels
from leap_kernels import feature_match


def launches(call: Callable[[], object]) -> int:
    with counted() as counts:
        call()
    return counts.launches.total()


X = torch.randn(6, 8)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: X.t()[1:].unsqueeze(0).expand(5, 7, 6), 0),
        (lambda: torch.empty(3, 3).detach(), 0),
        (lambda: X.reshape(12, 4), 0),
        (lambda: X.t().reshape(12, 4), 1),  # a copy
        (lambda: X.to(torch.float64), 1),
        (lambda: X.to(torch.float32), 0),
        (lambda: X.clone(), 1),
        (lambda: torch.zeros(5), 1),
        (lambda: X + 1, 1),
        (lambda: (X * 2).add_(X).sum(), 3),
        (lambda: torch.stack([X, X]), 1),
        (lambda: torch._foreach_mul([X, X, X], 2.0), 1),
        (lambda: nn.functional.layer_norm(X, (8,)), 1),
        (lambda: nn.functional.conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 2, 2)), 3),  # two of them fill
    ],
)
def test_an_operation_with_a_kernel_counts_once_and_a_view_does_not(call: Callable[[], object], expected: int) -> None:
    assert launches(call) == expected


def test_a_training_step_of_two_layers_against_a_count_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    forward = 4  # product with bias, GELU, product with bias, sum
    backward = 1 + 3 + 1 + 2  # one; dW, dx, db; GELU; dW, db, for the images need no gradient
    assert launches(lambda: model(X).sum().backward()) == forward + backward


def test_a_custom_op_counts_as_what_it_runs() -> None:
    student, weight, teacher = torch.randn(64, 8), torch.randn(12, 8), torch.randn(64, 12)
    with torch.no_grad():
        inside = launches(lambda: feature_match(student, weight, None, teacher, impl="gram"))
    assert inside > 5  # two means, two Grams, a trace at least


def test_launches_and_reads_are_told_apart_by_range_and_what_the_host_knows_is_no_read() -> None:
    with counted(["first", "second"]) as counts:
        with record_function("first"):
            (X + 1).mul_(2)
            with record_function("nested, not asked for"):
                X.sum()
        with record_function("second"):
            X.sum().item()
            X.nonzero()
        X.neg()
        X[0, 0].item()
    assert counts.launches == {"first": 3, "second": 2, OTHER: 1}
    assert counts.reads == {"second": 2}


@pytest.mark.slow
def test_compiled_code_counts_its_kernels_and_library_calls() -> None:
    weight = torch.randn(8, 8)

    def work(x: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.gelu(x @ weight) + 1) * x

    with showing_kernels():
        compiled = torch.compile(work)
        compiled(X)
    assert launches(lambda: work(X)) == 4
    assert launches(lambda: compiled(X)) == 2  # the product, and the rest as one kernel
