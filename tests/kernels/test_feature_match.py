"""The op's Gram form and its public door, judged against float64 and plain PyTorch."""

from __future__ import annotations

import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from leap_kernels import Moments, feature_match
from leap_kernels.feature_match import gram, op

OBJECTIVES = ("mse", "normalised", "cosine")
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make(m: int, ds: int, dt: int, *, offset: float = 0.0, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Student, weight, bias, teacher in float64; the teacher is partly a linear function of the student."""
    g = torch.Generator().manual_seed(seed)
    s, w, b, t = (torch.randn(shape, generator=g).double() for shape in ((m, ds), (dt, ds), (dt,), (m, dt)))
    mix = torch.randn(ds, dt, generator=g).double() / ds**0.5
    return [scale * (s + offset), w / ds**0.5, b * scale, scale * (t + 2 * s @ mix + offset)]


def evaluate(inputs: list[Tensor], objective: str = "mse", **options: object) -> list[Tensor]:
    """Loss, gradients of student, weight, bias, and moments, in float64."""
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    loss, moments = feature_match(*leaves, inputs[3], objective=objective, moments=True, **options)
    loss.backward()
    return [x.detach().double() for x in (loss, *(leaf.grad for leaf in leaves), *moments)]


def error(got: Tensor, truth: Tensor) -> float:
    norm = torch.linalg.vector_norm
    return (norm(got - truth) / norm(truth).clamp_min(1e-300)).item()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("m", "ds", "dt"), [(1300, 48, 300), (7, 192, 50), (1025, 16, 24), (2, 5, 3)])
def test_gram_is_as_close_to_float64_as_plain_pytorch(
    m: int, ds: int, dt: int, dtype: torch.dtype, objective: str
) -> None:
    """Loss, every gradient, every moment; one chunk, several, one row left over; strips that do not divide Dt."""
    inputs = [x.to(dtype) for x in make(m, ds, dt, offset=1.0)]
    truth = evaluate([x.double() for x in inputs], objective, impl="reference")
    plain = evaluate(inputs, objective, impl="reference")
    for name, got, ref, true in zip(
        ("loss", "d_student", "d_weight", "d_bias", *Moments._fields),
        evaluate(inputs, objective, impl="gram"), plain, truth, strict=True,
    ):  # fmt: skip
        assert error(got, true) <= error(ref, true) + 8 * EPS[torch.float32] + EPS[dtype] / 2, name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(objective: str, with_bias: bool) -> None:
    s, w, b, t = make(9, 4, 6)
    leaves = [x.requires_grad_() for x in ((s, w, b) if with_bias else (s, w))]

    def loss(*x: Tensor) -> Tensor:
        return feature_match(x[0], x[1], x[2] if with_bias else None, t, impl="gram", objective=objective)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_changes_nothing_but_the_scale(scale: float) -> None:
    one, scaled = (evaluate([x.float() for x in make(300, 12, 20, scale=c)], impl="gram") for c in (1.0, scale))
    assert error(scaled[0], one[0] * scale**2) < 1e-5  # loss
    assert error(scaled[1], one[1] * scale) < 1e-5  # d_student
    assert error(scaled[9], one[9] * scale**2) < 1e-5  # ctt


def test_mean_of_thirty_spreads_costs_no_digits() -> None:
    inputs = make(3000, 32, 48, offset=30.0)
    truth = evaluate(inputs, impl="reference")
    got = evaluate([x.float() for x in inputs], impl="gram")
    rounded = evaluate([x.float().double() for x in inputs], impl="reference")
    for name, a, b in zip(("loss", "d_student", "d_weight", "d_bias", *Moments._fields), got, rounded, strict=True):
        assert error(a, b) < 3e-6, name
    assert error(got[0], truth[0]) < 1e-5


def learnt_mean(m: int, ds: int, dt: int) -> list[Tensor]:
    """A head that already maps the student's mean, 30 spreads from 0, to the teacher's: dW is a small difference."""
    s, w, _, t = make(m, ds, dt, offset=30.0)
    return [s, w, (t - s @ w.T).mean(0), t]


def test_gradients_once_the_head_has_learnt_the_mean() -> None:
    inputs = [x.float() for x in learnt_mean(3000, 64, 96)]
    truth = evaluate([x.double() for x in inputs], impl="reference")
    got, plain = (evaluate(inputs, impl=impl) for impl in ("gram", "reference"))
    for name, a, ref, true in zip(("loss", "d_student", "d_weight"), got, plain, truth, strict=False):
        assert error(a, true) <= error(ref, true) + 2e-6, name


def test_loss_is_zero_only_for_an_exact_fit() -> None:
    s, w, b, _ = (x.float() for x in make(500, 24, 40))
    teacher = F.linear(s, w, b)
    assert 0 <= feature_match(s, w, b, teacher).item() < 1e-6
    teacher[17, 3] += 1.0
    assert feature_match(s, w, b, teacher).item() == pytest.approx(1 / teacher.numel(), rel=1e-2)
    assert feature_match(s, w, b, teacher, impl="reference").item() == pytest.approx(1 / teacher.numel(), rel=1e-4)


def test_cosine_of_zero_rows_is_zero_with_finite_gradients() -> None:
    s, w, _, t = make(6, 4, 8)
    s[0], t[1] = 0.0, 0.0
    for impl in ("reference", "gram"):
        leaf = s.clone().requires_grad_()
        feature_match(leaf, w, None, t, impl=impl, objective="cosine").backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "gram"])
def test_non_contiguous_inputs(impl: str) -> None:
    s, w, b, t = (x.float() for x in make(64, 10, 14))
    strided = [s.T.contiguous().T, w.T.contiguous().T, torch.stack([b, b], 1)[:, 0], t.repeat(1, 2)[:, :14]]
    assert not any(x.is_contiguous() for x in strided)
    for a, b_ in zip(evaluate(strided, impl=impl), evaluate([s, w, b, t], impl=impl), strict=True):
        assert error(a, b_) < 1e-6


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nan_in_nan_out(position: int, objective: str) -> None:
    inputs = [x.float() for x in make(2000, 8, 12)]
    inputs[position].view(-1)[-1] = float("nan")
    assert feature_match(*inputs, objective=objective).isnan()


def test_no_gradient_reaches_the_teacher_and_none_is_computed_without_grad_mode() -> None:
    s, w, b, t = (x.float().requires_grad_() for x in make(20, 6, 8))
    for impl in ("reference", "gram"):
        feature_match(s, w, b, t, impl=impl).backward()
        assert t.grad is None
    with torch.no_grad():
        loss, moments = feature_match(s, w, b, t, moments=True)
    assert not loss.requires_grad and not any(x.requires_grad for x in moments)
    assert not any(x.requires_grad for x in feature_match(s, w, b, t, moments=True)[1])


def test_second_derivatives_are_refused_not_wrong() -> None:
    s, w, b, t = (x.float().requires_grad_() for x in make(20, 6, 8))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(feature_match(s, w, b, t), s, create_graph=True)


def test_moments_of_the_normalised_objective_are_of_the_normalised_teacher() -> None:
    s, w, b, t = make(50, 6, 8)
    truth = feature_match(s, w, b, F.layer_norm(t, (8,)), moments=True)[1]
    got = feature_match(s, w, b, t, moments=True, objective="normalised")[1]
    for a, x in zip(got, truth, strict=True):
        torch.testing.assert_close(a, x)


def test_gradients_survive_parameters_emptied_between_forward_and_backward() -> None:
    """What ZeRO-3 does to a parameter; the op keeps gradients, not inputs."""
    s, w, b, t = (x.float() for x in make(40, 6, 8))
    weight, bias = torch.nn.Parameter(w.clone()), torch.nn.Parameter(b.clone())
    loss = feature_match(s, weight, bias, t)
    shapes = weight.shape, bias.shape
    weight.data, bias.data = torch.empty(0), torch.empty(0)
    weight.data, bias.data = torch.full(shapes[0], float("nan")), torch.full(shapes[1], float("nan"))
    loss.backward()
    truth = evaluate([s, w, b, t], impl="reference")
    assert error(weight.grad, truth[2]) < 1e-6 and error(bias.grad, truth[3]) < 1e-6


def test_fp16_gradients_do_not_underflow_before_the_loss_scale() -> None:
    """At M * Dt = 1e7 a float16 gradient of the unscaled loss is all zeros; scaled by 2^16 it must not be."""
    m, scale = 20_000, 2.0**16
    inputs = [x.half() for x in make(m, 2, 500, scale=0.1)[:3]]
    s, w, b = (x.requires_grad_() for x in inputs)
    (feature_match(s, w, b, torch.zeros(1, 500).expand(m, 500)) * scale).backward()
    p = F.linear(s.detach().double(), w.detach().double(), b.detach().double())
    assert error(s.grad.double(), 2 * scale / p.numel() * p @ w.detach().double()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    """The Gram form stays in float32; the reference is what autocast makes of Linear + MSE."""
    s, w, b, t = (x.float() for x in make(300, 16, 24))
    t = t.to(teacher_dtype)
    truth = evaluate([x.double() for x in (s, w, b, t)], impl="reference")
    with torch.autocast("cpu", dtype):
        exact, rounded = (evaluate([s, w, b, t], impl=impl) for impl in ("gram", "reference"))
        plain = F.mse_loss(F.linear(s, w, b).float(), t.float())
    assert all(error(a, x) < 1e-6 for a, x in zip(exact, truth, strict=True))
    assert rounded[0].item() == plain.item()
    assert all(error(a, x) < EPS[dtype] for a, x in zip(rounded[:4], truth[:4], strict=True))


def test_student_in_the_autocast_dtype_with_float32_parameters() -> None:
    s, w, b, t = (x.float() for x in make(300, 16, 24))
    leaf = s.bfloat16().requires_grad_()
    weight = w.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        feature_match(leaf, weight, b, t).backward()
    assert leaf.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert error(weight.grad, evaluate([leaf.detach().float(), w, b, t], impl="reference")[2]) < 1e-6


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    s, w, b, t = (x.float() for x in make(40, 6, 8))
    leaf = s.clone().requires_grad_()
    checkpoint(lambda x: feature_match(x.tanh(), w, b, t), leaf, use_reentrant=False).backward()
    direct = s.clone().requires_grad_()
    feature_match(direct.tanh(), w, b, t).backward()
    assert torch.equal(leaf.grad, direct.grad)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_registration(objective: str) -> None:
    """PyTorch's own checks: schema, autograd registration, fake tensors with static and dynamic shapes."""
    inputs = [x.float().requires_grad_(i < 3) for i, x in enumerate(make(40, 6, 8))]
    torch.library.opcheck(torch.ops.leap_kernels.feature_match, (*inputs, "gram", objective, True, True))


def test_compile_sees_one_graph() -> None:
    s, w, b, t = (x.float() for x in make(40, 6, 8))

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        loss, moments = feature_match(x * 2, w, b, t, moments=True)
        return loss * 3, moments.css.sum()

    leaf, direct = s.clone().requires_grad_(), s.clone().requires_grad_()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(leaf)
    eager = step(direct)
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want)
    compiled[0].backward()
    eager[0].backward()
    torch.testing.assert_close(leaf.grad, direct.grad)


def test_chunks_and_strips_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(37, 11, 13, offset=5.0)
    whole = evaluate(inputs, impl="gram")
    monkeypatch.setattr(gram, "CHUNK_ROWS", 5)
    monkeypatch.setattr(gram, "STRIP_COLUMNS", 4)
    for a, b in zip(evaluate(inputs, impl="gram"), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("width", "dtype", "moments", "compiler", "capability", "chosen"),
    [
        (384, torch.bfloat16, False, True, (9, 0), "triton"),
        (384, torch.float16, True, True, (8, 0), "triton"),
        (384, torch.float32, False, True, (9, 0), "gram"),
        # eager has 16-bit products, the Gram form float32 ones
        (1280, torch.bfloat16, False, True, (9, 0), "reference"),
        (1280, torch.bfloat16, True, True, (9, 0), "gram"),
        (384, torch.bfloat16, False, False, (9, 0), "reference"),
        (384, torch.float16, False, True, (7, 5), "reference"),
    ],
)
def test_what_auto_takes_on_a_gpu(
    width: int,
    dtype: torch.dtype,
    moments: bool,
    compiler: bool,
    capability: tuple[int, int],
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(op, "_driver_fault", lambda: None if compiler else "cannot build its driver")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        student, teacher = (torch.empty(4096, d, dtype=dtype, device="cuda") for d in (width, 1536))
    assert op.choose("auto", student, teacher, dtype, moments) == chosen


@pytest.mark.parametrize(
    ("products", "capability", "fused"),
    [
        (torch.bfloat16, (9, 0), True),
        (torch.float16, (8, 0), True),
        (torch.float32, (9, 0), False),
        (torch.float16, (7, 5), False),
    ],
)
def test_moments_alone_are_taken_where_tensor_cores_are(
    products: torch.dtype, capability: tuple[int, int], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from leap_kernels.feature_match import triton_kernel

    monkeypatch.setattr(op, "_compute_dtype", lambda *_: products)  # there is no autocast for CUDA without CUDA
    monkeypatch.setattr(op, "_driver_fault", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_kernel, "moments", lambda student, teacher, compute: compute)
    monkeypatch.setattr(gram, "moments", lambda student, teacher: None)
    with FakeTensorMode():
        student, teacher = (torch.empty(64, 1536, device="cuda") for _ in range(2))
        assert op.alignment_moments(student, teacher) == (products if fused else None)


@pytest.mark.parametrize(
    "fault",
    [
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),  # gcc is there, Python.h is not
        RuntimeError("Failed to find C compiler."),
        AssertionError("libcuda.so cannot found!"),
    ],
)
def test_a_driver_that_cannot_be_built_is_an_obstacle(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("triton.runtime").driver

    class Active:
        def get_current_target(self) -> None:
            raise fault

    monkeypatch.setattr(type(driver), "active", Active())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    op._driver_fault.cache_clear()
    try:
        with FakeTensorMode():
            student, teacher = (torch.empty(4096, d, dtype=torch.bfloat16, device="cuda") for d in (384, 1536))
        assert op.choose("auto", student, teacher, torch.bfloat16, moments=True) == "gram"
        with pytest.raises(ValueError, match=r"impl='triton' cannot build its driver; it needs gcc.*headers"):
            op.choose("triton", student, teacher, torch.bfloat16, moments=True)
    finally:
        op._driver_fault.cache_clear()


def test_moments_of_unequal_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wants student \(M, Ds\) and teacher \(M, Dt\) on one device"):
        op.alignment_moments(torch.zeros(3, 4), torch.zeros(4, 4))


S, W, B, T = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((S[None], W, B, T), {}, "wants student"),
        ((S, W.T, B, T), {}, "wants student"),
        ((S, W, B[:4], T), {}, "wants student"),
        ((S, W, B, T[:3]), {}, "wants student"),
        ((S[:0], W, B, T[:0]), {}, "empty"),
        ((S.long(), W, B, T), {}, "student must be a floating-point tensor"),
        ((S, W.to("meta"), B, T), {}, "weight is on meta"),
        ((S.half(), W, B, T), {}, "differ in dtype"),
        ((S, W, B, T), {"impl": "cuda"}, "impl='cuda' is not one of auto, reference, gram, triton"),
        ((S, W, B, T), {"objective": "l1"}, "objective='l1' is not one of mse, normalised, cosine"),
        ((S, W, B, T), {"impl": "triton"}, "needs a CUDA device"),
    ],
)
def test_mistakes_are_named(
    args: tuple[Tensor, ...], options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        feature_match(*args, **options)
