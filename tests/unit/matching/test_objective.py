"""Student, head and loss as one module."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from leap_dist.config import ObjectiveConfig, StudentConfig
from leap_dist.errors import UserError
from leap_dist.matching.heads import MatchingHead
from leap_dist.matching.objective import Objective
from leap_dist.matching.score import CkaEvidence, CosineEvidence, Evidence, over_ranks
from leap_dist.models.features import Features
from leap_dist.models.student import build_student
from leap_dist.runtime.distributed import World

SMALL = {"patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
ONE = World(0, 1, 0, 1, torch.device("cpu"))


def small_student(**kwargs: object) -> torch.nn.Module:
    return build_student(StudentConfig(model="vit_tiny_patch16_224", kwargs={**SMALL, **kwargs}), 16)


def random_features(grid: tuple[int, int], width: int = 20, batch: int = 2) -> Features:
    return Features(torch.randn(batch, grid[0] * grid[1], width), torch.randn(batch, width))


def test_student_tokens_are_timms_own() -> None:
    student = small_student(reg_tokens=2, no_embed_class=True).eval()
    images = torch.randn(2, 3, 16, 16)
    tokens = student.backbone.forward_features(images)
    assert torch.equal(student(images).patch, tokens[:, 3:])
    assert torch.equal(student(images).cls, tokens[:, 0])
    layers = student.every_layer(images)
    assert len(layers) == 3
    assert torch.equal(layers[-1].patch, tokens[:, 3:]) and torch.equal(layers[-1].cls, tokens[:, 0])


@pytest.mark.parametrize(
    ("model", "kwargs", "size", "words"),
    [
        ("vit_tinny_patch16_224", {}, 32, "did you mean vit_tiny_patch16_224"),
        ("resnet18", {"embed_dim": 3}, 32, "student.model=resnet18"),
        ("vit_tiny_patch16_224", {"embed_dims": 3}, 32, "embed_dims"),
        ("vit_tiny_patch16_224", {}, 40, "data.image_size=40"),
    ],
)
def test_an_impossible_student_is_one_line(model: str, kwargs: dict, size: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        build_student(StudentConfig(model=model, kwargs=kwargs), size)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_head_is_initialised_as_published() -> None:
    head = MatchingHead(384, 1536, "auto", "cka")
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not head.bias.any()


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (3, 5)])
def test_loss_is_mse_after_projection_with_tokens_on_the_teachers_grid(grid: tuple[int, int]) -> None:
    """Against projecting first and resizing the map then: the two commute."""
    torch.manual_seed(0)
    objective = Objective(small_student(), 20, grid, ObjectiveConfig(cls_weight=0.3))
    images, target = torch.randn(2, 3, 16, 16), random_features(grid)
    match = objective(images, [target])
    view, head = objective.student(images), objective.heads[0]
    projected = F.linear(view.patch, head.weight, head.bias).unflatten(1, (4, 4)).movedim(-1, 1)
    resized = F.interpolate(projected, grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    patch = F.mse_loss(resized, target.patch)
    cls = F.mse_loss(F.linear(view.cls, head.weight, head.bias), target.cls)
    torch.testing.assert_close(match.loss, patch + 0.3 * cls, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(match.loss, list(objective.parameters()), retain_graph=True)
    plain = torch.autograd.grad(patch + 0.3 * cls, list(objective.parameters()))
    for got, wanted in zip(mine, plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


def test_cls_shares_the_head_and_trains_it() -> None:
    """Defect B5 of the published code: the separate CLS head crashed, and would not have been trained."""
    objective = Objective(small_student(), 20, (4, 4), ObjectiveConfig(cls_weight=1.0))
    match = objective(torch.randn(2, 3, 16, 16), [random_features((4, 4))])
    (match.loss - match.loss.detach()).backward()
    assert len(objective.heads) == 1
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in objective.parameters())


def test_every_layer_has_its_own_head_and_target() -> None:
    objective = Objective(small_student(), 20, (4, 4), ObjectiveConfig(cls_weight=0.0), num_targets=3)
    images, targets = torch.randn(2, 3, 16, 16), [random_features((4, 4)) for _ in range(3)]
    views = objective.student.every_layer(images)
    losses = [
        F.mse_loss(F.linear(view.patch, head.weight, head.bias), target.patch)
        for view, head, target in zip(views, objective.heads, targets, strict=True)
    ]
    torch.testing.assert_close(objective(images, targets).loss, torch.stack(losses).mean())


def test_one_head_serves_many_targets_for_calibration() -> None:
    objective = Objective(small_student(), 20, (4, 4), ObjectiveConfig(cls_weight=0.0))
    images, targets = torch.randn(2, 3, 16, 16), [random_features((4, 4)) for _ in range(5)]
    evidence = objective(images, targets, True).evidence
    alone = [objective(images, [target], True).evidence[0] for target in targets]
    assert [e.score().item() for e in evidence] == pytest.approx([e.score().item() for e in alone])


def test_a_target_off_the_grid_is_refused() -> None:
    objective = Objective(small_student(), 20, (4, 4), ObjectiveConfig())
    with pytest.raises(UserError, match="gave 15 patch tokens, its grid is 4x4"):
        objective(torch.randn(2, 3, 16, 16), [random_features((3, 5))])


def test_evidence_of_micro_batches_is_that_of_the_whole_batch() -> None:
    torch.manual_seed(1)
    head = {metric: MatchingHead(6, 9, "auto", metric) for metric in ("cka", "cosine")}
    tokens, target = torch.randn(40, 6), torch.randn(40, 9) + 3
    for metric, kind in (("cka", CkaEvidence), ("cosine", CosineEvidence)):
        parts = [head[metric](tokens[s], target[s], True)[1] for s in (slice(0, 7), slice(7, 25), slice(25, 40))]
        whole = head[metric](tokens, target, True)[1]
        assert isinstance(whole, kind)
        merged = parts[0].merged(parts[1]).merged(parts[2])
        torch.testing.assert_close(merged.score(), whole.score(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", ["cka", "cosine"])
@pytest.mark.parametrize("reduction", ["exact", "mean"])
def test_losses_and_score_of_all_ranks_come_from_one_sum(metric: str, reduction: str) -> None:
    torch.manual_seed(2)
    head = MatchingHead(6, 9, "auto", metric)
    tokens, target = torch.randn(42, 6), torch.randn(42, 9) + 3
    parts = [head(tokens[rows], target[rows], True)[1] for rows in (slice(0, 14), slice(14, 28), slice(28, 42))]
    losses = torch.tensor([[1.0, 4.0], [2.0, 5.0], [6.0, 0.0]])
    sent: list[Tensor] = []

    def asked(rank: int, summed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return over_ranks(losses[rank], parts[rank], reduction, ranks(3)[rank], summed)

    for rank in range(3):
        asked(rank, lambda share: sent.append(share) or share)
    assert len(sent) == 3  # one sum a rank, whatever it carries
    total = torch.stack(sent).sum(0)
    whole = head(tokens, target, True)[1].score().double()
    alone = torch.stack([part.score() for part in parts]).double().mean()
    for rank in range(3):
        means, score = asked(rank, lambda _: total.clone())
        assert means.tolist() == [3.0, 3.0] and means.dtype == losses.dtype
        wanted = whole if reduction == "exact" or metric == "cosine" else alone
        torch.testing.assert_close(score.double(), wanted, rtol=1e-5, atol=0)
    means, score = over_ranks(losses[1], None, reduction, ranks(3)[1], lambda share: share * 3)
    assert means.tolist() == [2.0, 5.0] and score.isnan()


def test_cosine_is_the_mean_over_tokens() -> None:
    head = MatchingHead(6, 9, "auto", "cosine")
    tokens, target = torch.randn(2, 20, 6), torch.randn(2, 20, 9)
    expected = F.cosine_similarity(F.linear(tokens, head.weight, head.bias).double(), target.double(), dim=-1).mean()
    score = head(tokens, target, True)[1].score()
    assert score.item() == pytest.approx(expected.item(), abs=1e-6)


def ranks(size: int) -> list[World]:
    return [World(rank, size, rank, size, torch.device("cpu")) for rank in range(size)]


def score_of(objective: Objective, evidence: Evidence) -> Tensor:
    return objective.over_ranks(torch.zeros(1), evidence, "exact", ranks(1)[0], torch.clone)[1]


@pytest.fixture
def graphs() -> Iterator[Counter[str]]:
    """What torch.compile has counted since the beginning of the test: "unique_graphs" are compilations."""
    torch.compiler.reset()
    counters["stats"].clear()
    yield counters["stats"]
    torch.compiler.reset()


@pytest.mark.parametrize("targets", [1, 3], ids=["last", "all_layers"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_student_learns_the_same(graphs: Counter[str], targets: int, precision: torch.dtype) -> None:
    """Compiled once: not again for a scored step, another target, a head that begins anew, nor when it is evaluated."""
    torch.manual_seed(0)
    plain = Objective(small_student(), 20, (4, 4), ObjectiveConfig(), num_targets=targets)
    compiled = copy.deepcopy(plain)
    compiled.compile_student("aot_eager")
    images = torch.randn(2, 3, 16, 16)
    for step in range(4):
        features = [random_features((4, 4)) for _ in range(targets)]
        if step == 2:
            for one in (plain, compiled):
                with torch.no_grad():
                    one.heads[0].weight.fill_(0.1)
        found = []
        for one in (plain, compiled):
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                match = one(images, features, step % 2 == 0)
            assert len(match.evidence) == (targets if step % 2 == 0 else 0)
            match.loss.backward()
            found.append([match.loss, *(score_of(one, item) for item in match.evidence)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
        for got, wanted in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-2, atol=1e-2 * wanted.grad.abs().max().item())
    with torch.no_grad():
        compiled.eval()(torch.randn(5, 3, 16, 16), [random_features((4, 4), batch=5) for _ in range(targets)], True)
    assert graphs["unique_graphs"] == 2  # the student's, and that of the score


def test_students_that_are_alike_share_what_was_compiled(graphs: Counter[str]) -> None:
    for count, width in ((1, 12), (1, 12), (2, 8)):
        objective = Objective(small_student(embed_dim=width), 20, (4, 4), ObjectiveConfig())
        objective.compile_student("eager")
        objective(torch.randn(2, 3, 16, 16), [random_features((4, 4))])
        assert graphs["unique_graphs"] == count


def test_a_student_that_cannot_be_compiled_is_one_line(graphs: Counter[str]) -> None:
    student = small_student()
    student.backbone.blocks[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    objective = Objective(student, 20, (4, 4), ObjectiveConfig())
    objective.compile_student("aot_eager")
    with pytest.raises(
        UserError, match=r"torch cannot compile student\.model=vit_tiny.*use student.compile=false"
    ) as it:
        objective(torch.randn(2, 3, 16, 16), [random_features((4, 4))])
    assert "\n" not in str(it.value)
