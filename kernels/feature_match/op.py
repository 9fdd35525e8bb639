"""The public door of the op: input checks, choice of implementation, registration with PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from leap_kernels.feature_match import gram, reference
from leap_kernels.feature_match.reference import OBJECTIVES, Moments, loss_dtype

Impl = Literal["auto", "reference", "gram", "triton"]
Objective = Literal["mse", "normalised", "cosine"]
IMPLS = get_args(Impl)
HAS_TRITON = importlib.util.find_spec("triton") is not None
MIN_CAPABILITY = (8, 0)  # Ampere
MAX_TRITON_WIDTH = 1024  # a block of student rows and its float32 gradient stay on chip
MAX_TRITON_WIDTH_FLOAT32 = 512  # 16 rows by 16 channels of 768 take 131 kB of shared memory, an L40S has 101


@overload
def feature_match(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    *,
    impl: Impl = ...,
    objective: Objective = ...,
    moments: Literal[False] = ...,
) -> Tensor: ...


@overload
def feature_match(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    *,
    impl: Impl = ...,
    objective: Objective = ...,
    moments: Literal[True],
) -> tuple[Tensor, Moments]: ...


def feature_match(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    *,
    impl: Impl = "auto",
    objective: Objective = "mse",
    moments: bool = False,
) -> Tensor | tuple[Tensor, Moments]:
    """Project the student linearly, P = S W^T + b, and match the teacher T in one pass.

    Args:
        student: S (M, Ds). weight: W (Dt, Ds). bias: b (Dt,) or None. teacher: T (M, Dt), any float dtype, a constant.
            Under torch.autocast the products are taken in the autocast dtype as `F.linear` would (the Gram form stays
            in float32, where it is exact); outside it student, weight and bias share one dtype.
        impl: "auto" takes Triton for 16-bit products on a CUDA device and the Gram form elsewhere, but without moments
            plain PyTorch for few rows (M <= Ds), since Grams are the longer way, and for 16-bit products on a CUDA
            device where Triton cannot run, since Grams would be float32; a named one is honoured or raises.
        objective: "mse", mean((P - T)^2) over all elements; "normalised", the same against layer-normalised rows of T;
            "cosine", the mean of 1 - cos(P, T) over rows.
        moments: also return the alignment moments of (S, T), from which `leap_dist.matching.cka` takes the linear CKA
            ("normalised": of the normalised T).

    Returns:
        The loss, 0-d float32 (float64 for float64 inputs), differentiable once in student, weight and bias;
        with moments=True the pair (loss, Moments).

    Raises:
        ValueError: wrong shapes, dtypes or devices, or an impl that cannot run here. NaN in gives NaN out.
    """
    _check(student, weight, bias, teacher)
    if objective not in OBJECTIVES:
        raise ValueError(f"feature_match: objective={objective!r} is not one of {', '.join(OBJECTIVES)}")
    compute = _compute_dtype(student, weight, bias)
    chosen = choose(impl, student, teacher, compute, moments)
    with torch.autocast(student.device.type, enabled=False):
        if chosen != "gram":
            student, weight, bias = student.to(compute), weight.to(compute), None if bias is None else bias.to(compute)
        if chosen == "reference":
            loss = OBJECTIVES[objective](student, weight, bias, teacher)
            return (loss, reference.moments(student, teacher, objective)) if moments else loss
        needs = any(x is not None and x.requires_grad for x in (student, weight, bias))
        outputs = _op(student, weight, bias, teacher, chosen, objective, torch.is_grad_enabled() and needs, moments)
    return (outputs[0], Moments(*outputs[4:])) if moments else outputs[0]


def alignment_moments(student: Tensor, teacher: Tensor) -> Moments:
    """Moments of (S, T) for tokens S (M, Ds), T (M, Dt) that are matched without a projection.

    As `feature_match` gives them, without gradient: of 16-bit products where these are on a CUDA device and Triton can
    run, else in float32. ValueError for wrong shapes or devices.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher) or student.device != teacher.device:
        got = [(tuple(x.shape), str(x.device)) for x in (student, teacher)]
        raise ValueError(f"alignment_moments: wants student (M, Ds) and teacher (M, Dt) on one device, got {got}")
    compute = _compute_dtype(student, student, None)
    tensor_cores = student.device.type == "cuda" and compute.itemsize == 2
    with torch.autocast(student.device.type, enabled=False):
        if tensor_cores and obstacle(student.device, None, compute, teacher.dtype) is None:
            from leap_kernels.feature_match import triton_kernel

            return triton_kernel.moments(student, teacher, compute)
        return gram.moments(student, teacher)


def _check(student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor) -> None:
    given = {"student": student, "weight": weight, "bias": bias, "teacher": teacher}
    given = {name: x for name, x in given.items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = getattr(x, "dtype", type(x))
            raise ValueError(f"feature_match: {name} must be a floating-point tensor, got {got}")
        if x.device != student.device:
            raise ValueError(f"feature_match: {name} is on {x.device} but student is on {student.device}")
    shapes = {name: tuple(x.shape) for name, x in given.items()}
    m, ds, dt = student.shape[:1], student.shape[1:], weight.shape[:1]
    wanted = {"student": m + ds, "weight": dt + ds, "bias": dt, "teacher": m + dt}
    if student.dim() != 2 or shapes != {name: tuple(wanted[name]) for name in given}:
        raise ValueError(
            f"feature_match: wants student (M, Ds), weight (Dt, Ds), bias (Dt,), teacher (M, Dt), got {shapes}"
        )
    if 0 in m + ds + dt:
        raise ValueError(f"feature_match: an empty dimension has no mean, got {shapes}")


def _compute_dtype(student: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the products: the autocast dtype (which leaves float64 alone), or that of the inputs."""
    device = student.device.type
    if torch.is_autocast_enabled(device):
        return student.dtype if student.dtype == torch.float64 else torch.get_autocast_dtype(device)
    dtypes = {x.dtype for x in (student, weight, bias) if x is not None}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"feature_match: student, weight and bias differ in dtype outside autocast: {names}")
    return student.dtype


def choose(impl: str, student: Tensor, teacher: Tensor, compute: torch.dtype, moments: bool) -> str:
    """The implementation that `feature_match` takes for these tokens and products in `compute`; ValueError as there."""
    if impl not in IMPLS:
        raise ValueError(f"feature_match: impl={impl!r} is not one of {', '.join(IMPLS)}")
    if impl not in ("auto", "triton"):
        return impl
    if impl == "auto" and not moments and student.shape[0] <= student.shape[1]:
        # Class tokens, mostly: 3 M Ds Dt multiply-adds, where the Gram form needs 2 (M + Ds) Ds Dt + 1.5 M Ds^2.
        return "reference"
    found = obstacle(student.device, student.shape[1], compute, teacher.dtype)
    if impl == "auto":
        # In float32 the fused kernel spills registers (compiled for sm_90); plain Gram products are cuBLAS's best case.
        if student.device.type != "cuda" or compute.itemsize > 2:
            return "gram"
        return "triton" if found is None else "gram" if moments else "reference"
    if found is not None:
        raise ValueError(f"feature_match: impl='triton' {found}")
    return impl


def obstacle(device: torch.device, width: int | None, compute: torch.dtype, teacher: torch.dtype) -> str | None:
    """What keeps Triton from matching student tokens of this width (None: from their moments), if anything does."""
    if not HAS_TRITON:
        return "needs the triton package"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA device (or TRITON_INTERPRET=1), but the inputs are on {device}"
    if device.type == "cuda" and (fault := _driver_fault()):
        return fault
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        # Compiled for a T4: from a width of 768 on no tile fits its shared memory.
        least, own = (".".join(map(str, version)) for version in (MIN_CAPABILITY, capability))
        return f"needs a GPU of compute capability {least} or above, this one has {own}"
    if wrong := {compute, teacher} - {torch.float32, torch.bfloat16, torch.float16}:
        return f"takes float32, bfloat16 and float16, got {', '.join(sorted(map(str, wrong)))}"
    widest = MAX_TRITON_WIDTH_FLOAT32 if compute == torch.float32 else MAX_TRITON_WIDTH
    if width is not None and width > widest:
        return f"holds a student row on chip: with products in {compute} Ds is at most {widest}, got {width}"
    return None


@functools.cache
def _driver_fault() -> str | None:
    """What keeps Triton from building its driver on this machine, which it does in C when it is first asked."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # no compiler, no Python.h, no libcuda.so.1 in the linker's cache: of any kind
        reason = " ".join(str(error).split())[:200]
        return f"cannot build its driver; it needs gcc, or CC, and Python's headers (python3-dev): {reason}"
    return None


def _empty_outputs(
    student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, gradients: bool, moments: bool
) -> list[Tensor]:
    """Tensors of the op's output shapes; what was not asked for has no elements."""
    dtype = loss_dtype(student, weight, bias, teacher)
    (_, ds), dt = student.shape, teacher.shape[1]
    grads = [tuple(student.shape), (dt, ds), (dt,)] if gradients else [(0,)] * 3
    stats = [(), (ds,), (dt,), (ds, ds), (dt, ds), (dt, dt)] if moments else [(0,)] * 6
    d_student = student.new_empty(grads[0])
    return [student.new_empty((), dtype=dtype), d_student] + [
        student.new_empty(shape, dtype=dtype) for shape in grads[1:] + stats
    ]


@torch.library.custom_op(
    "leap_kernels::feature_match",
    mutates_args=(),
    schema="(Tensor student, Tensor weight, Tensor? bias, Tensor teacher, str impl, str objective, bool gradients, "
    "bool moments) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    impl: str,
    objective: str,
    gradients: bool,
    moments: bool,
) -> tuple[Tensor, ...]:
    if impl == "triton":
        from leap_kernels.feature_match import triton_kernel as implementation
    else:
        implementation = gram
    result = implementation.forward(
        student, weight, bias, teacher, objective=objective, gradients=gradients, moments=moments
    )
    got = (*result[:4], *(result.moments or (None,) * 6))
    return tuple(student.new_empty(0) if x is None else x for x in got)


@_op.register_fake
def _(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    impl: str,
    objective: str,
    gradients: bool,
    moments: bool,
) -> tuple[Tensor, ...]:
    return tuple(_empty_outputs(student, weight, bias, teacher, gradients, moments))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Only gradients are kept, no input: the teacher's features can be freed, and under ZeRO-3, which empties
    # parameters between forward and backward, nothing has to be gathered again.
    student, weight, bias = inputs[:3]
    ctx.save_for_backward(*output[1:4])
    ctx.rows = student.shape[0]
    ctx.dtypes = (student.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True: the saved gradients are constants, a second derivative would be 0
        raise RuntimeError("feature_match is differentiable once; impl='reference' is twice")
    if grad is None:
        return (None,) * 8
    scale = grad / ctx.rows
    grads = [
        _scaled(d, scale, dtype) if needed and dtype is not None else None
        for d, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*grads, *(None,) * 5)


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale (0-d, of at least x's precision), rounded once, to `dtype`; no copy of x in scale's."""
    return torch.mul(x, scale.reshape([1] * x.dim()), out=torch.empty_like(x, dtype=dtype))


_op.register_autograd(_backward, setup_context=_setup_context)
