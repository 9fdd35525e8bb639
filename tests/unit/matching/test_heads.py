"""Matching without a learned projection, against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leap_dist.config import ObjectiveConfig, StudentConfig
from leap_dist.errors import UserError
from leap_dist.matching.cka import linear_cka_of_features
from leap_dist.matching.heads import DirectHead, PooledHead, build_head
from leap_dist.matching.objective import Objective
from leap_dist.models.features import Features
from leap_dist.models.student import build_student
from leap_kernels import alignment_moments
from leap_kernels.feature_match import reference


def tokens_and_target(width: int, teacher_width: int) -> tuple[Tensor, Tensor]:
    """Correlated, far from zero, 3000 rows: more than the moments take at once."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 1000, width, generator=generator) + 4
    mixing = torch.randn(width, teacher_width, generator=generator)
    return tokens, tokens @ mixing + 3 * torch.randn(3, 1000, teacher_width, generator=generator)


def pooled(target: Tensor, width: int) -> Tensor:
    """The definition: channel i is the mean of the teacher's channels from floor(i Dt/Ds) to ceil((i+1) Dt/Ds)."""
    dt = target.shape[-1]
    runs = [target[..., i * dt // width : -(-(i + 1) * dt // width)] for i in range(width)]
    return torch.stack([run.mean(-1) for run in runs], -1)


HEADS = {"none": (DirectHead, 24), "pooled": (PooledHead, 96), "pooled unevenly": (PooledHead, 40)}


@pytest.mark.parametrize("name", HEADS)
def test_loss_gradient_and_score_are_those_of_the_definition(name: str) -> None:
    kind, teacher_width = HEADS[name]
    tokens, target = tokens_and_target(24, teacher_width)
    tokens.requires_grad_()
    loss, evidence = kind("cka")(tokens, target, True)
    goal = target.double() if kind is DirectHead else pooled(target.double(), 24)
    difference = tokens.detach().double() - goal
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(difference.square().mean().item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, tokens)
    torch.testing.assert_close(gradient.double(), 2 * difference / difference.numel(), rtol=1e-5, atol=1e-9)
    truth = linear_cka_of_features(tokens.detach().flatten(0, 1), goal.flatten(0, 1)).item()
    assert 0.1 < truth < 0.99
    assert evidence.score().item() == pytest.approx(truth, rel=1e-5)
    cosine = kind("cosine")(tokens, target, True)[1].score().item()
    truth = torch.nn.functional.cosine_similarity(tokens.double(), goal, dim=-1).mean().item()
    assert cosine == pytest.approx(truth, rel=1e-5)
    assert kind("cka")(tokens, target)[1] is None


def test_the_score_of_micro_batches_is_that_of_all_rows() -> None:
    tokens, target = tokens_and_target(24, 24)
    head = DirectHead("cka")
    parts = [head(tokens[rows], target[rows], True)[1] for rows in (slice(0, 1), slice(1, 3))]
    whole = head(tokens, target, True)[1].score()
    torch.testing.assert_close(parts[0].merged(parts[1]).score(), whole, rtol=1e-6, atol=0)


def test_moments_alone_are_the_references_also_under_autocast() -> None:
    tokens, target = (x.flatten(0, 1) for x in tokens_and_target(24, 40))
    truth = reference.moments(tokens.double(), target.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment_moments(tokens.requires_grad_(), target)
    for x, y in zip(found, truth, strict=True):
        assert x.dtype == torch.float32 and not x.requires_grad
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_targets_lose_their_own_digits_only(dtype: torch.dtype) -> None:
    tokens, target = tokens_and_target(24, 96)
    low = target.to(dtype)
    exact = (tokens.double() - pooled(low.double(), 24)).square().mean().item()
    assert PooledHead("cka")(tokens, low)[0].item() == pytest.approx(exact, rel=2e-2)


def test_widths_that_do_not_meet_are_one_line() -> None:
    with pytest.raises(UserError, match=r"student tokens have 12 channels, the teacher's 20; set student.remedy"):
        build_head("none", 12, 20, "auto", "cka")
    with pytest.raises(UserError, match="12 channels of the teacher cannot be averaged to 20"):
        build_head("pooled", 20, 12, "auto", "cka")


@pytest.mark.parametrize("remedy", ["lift", "wide_last"])
def test_a_student_with_a_remedy_is_matched_directly_on_patches_and_class_token(remedy: str) -> None:
    kwargs = {"patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
    student = build_student(StudentConfig(model="vit_tiny_patch16_224", kwargs=kwargs, remedy=remedy), 16, 18)
    objective = Objective(student, 18, (4, 4), ObjectiveConfig(cls_weight=0.3))
    target = Features(torch.randn(2, 16, 18), torch.randn(2, 18))
    images = torch.randn(2, 3, 16, 16)
    view, match = student(images), objective(images, [target])
    wanted = (view.patch - target.patch).square().mean() + 0.3 * (view.cls - target.cls).square().mean()
    torch.testing.assert_close(match.loss, wanted)
    match.loss.backward()
    assert all(parameter.grad.any() for parameter in objective.parameters())
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"student"}
