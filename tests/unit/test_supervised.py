"""Labels, soft distillation and spectral matching in the objective and the training loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leap_dist.assembly import check_pair
from leap_dist.config import ObjectiveConfig, StudentConfig, load
from leap_dist.errors import UserError
from leap_dist.matching.heads import build_head
from leap_dist.matching.objective import Objective
from leap_dist.models.features import Features
from leap_dist.models.flops import step_flops, student_step_flops
from leap_dist.models.student import build_student
from leap_dist.teacher import describe_teacher
from stubs import DEPTH, StubTeacher, scalars, stub_config, stub_trainer

SMALL = {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
CLASSES = 5
LAUNCHED = Path(__file__).resolve().parents[2] / "launch_configs" / "cait"
LABELS = ("student.num_classes=5", "objective.label_smoothing=0.1")


def supervised(**options: Any) -> Objective:
    torch.manual_seed(0)
    config = StudentConfig(model="vit_tiny_patch16_224", kwargs=SMALL, num_classes=CLASSES)
    return Objective(build_student(config, 16, 20), 20, (4, 4), ObjectiveConfig(**options))


def teacher_features(logits: bool = True) -> Features:
    return Features(torch.randn(3, 16, 20), torch.randn(3, 20), torch.randn(3, CLASSES) if logits else None)


@pytest.mark.parametrize("reached", [True, False])
def test_the_objective_is_the_published_sum(reached: bool) -> None:
    """Against float64; below the last block, where there are no logits, the cross-entropy has the whole share."""
    objective = supervised(feature_weight=0.2, kd_alpha=0.9, kd_tau=2.0, cls_weight=0.3)
    images, target = torch.randn(3, 3, 16, 16), teacher_features(reached)
    labels = torch.softmax(torch.randn(3, CLASSES), 1)
    match = objective(images, [target], False, labels)
    view, head = objective.student(images), objective.heads[0].double()
    logits = objective.student.backbone(images).double()  # timm's own forward
    patch = F.mse_loss(head.weight @ view.patch.double().mT + head.bias[:, None], target.patch.double().mT).item()
    cls = F.mse_loss(view.cls.double() @ head.weight.T + head.bias, target.cls.double()).item()
    ce = -(labels * logits.log_softmax(1)).sum(1).mean().item()
    expected = {"patch": patch, "cls": cls, "ce": ce}
    total = 0.2 * (patch + 0.3 * cls) + ce
    if reached:
        p = (target.logits.double() / 2).softmax(1)
        kd = (p * (p.log() - (logits / 2).log_softmax(1))).sum(1).mean().item() * 4
        expected["kd"] = kd
        total = 0.2 * (patch + 0.3 * cls) + 0.1 * ce + 0.9 * kd
    assert {name: term.item() for name, term in match.terms.items()} == pytest.approx(expected, rel=1e-5)
    assert match.loss.item() == pytest.approx(total, rel=1e-5)
    assert not any(term.requires_grad for term in match.terms.values())
    match.loss.backward()
    assert all(parameter.grad is not None for parameter in objective.student.parameters())


@pytest.mark.parametrize(("kind", "width"), [("linear", 20), ("none", 12), ("pooled", 24)])
@pytest.mark.parametrize("metric", ["cka", "cosine"])
def test_spectral_matching_changes_the_error_and_not_the_score(kind: str, width: int, metric: Any) -> None:
    torch.manual_seed(0)
    head = build_head(kind, 12, width, "auto", metric)
    tokens, target = torch.randn(3, 20, 12, requires_grad=True), torch.randn(3, 20, width)
    loss, evidence = head(tokens, target, True, (4, 5))
    projected, goal = tokens.double(), target.double()
    if kind == "linear":
        projected = F.linear(projected, head.weight.double(), head.bias.double())
    if kind == "pooled":
        goal = goal.unflatten(-1, (12, 2)).mean(-1)
    difference = (projected - goal).detach().numpy().reshape(3, 4, 5, -1)
    spectrum = np.fft.rfft2(difference, axes=(1, 2), norm="ortho")
    assert loss.item() == pytest.approx((spectrum.real**2 + spectrum.imag**2).mean() / 2, rel=1e-5)
    assert loss.requires_grad and loss.item() != pytest.approx(head(tokens, target)[0].item(), rel=1e-3)
    plain = head(tokens, target, True)[1]
    assert evidence.score().item() == plain.score().item()
    assert head(tokens, target, False, (4, 5))[1] is None


class LastBlockLogits(StubTeacher):
    """Logits of the image at the last block, as a real teacher's."""

    def at(self, block: int, images: Tensor) -> Features:
        found = super().at(block, images)
        weight = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(9))
        return found._replace(logits=images.mean((2, 3)) @ weight if block == DEPTH else None)


def run(trainer: Any) -> None:
    trainer.run()
    trainer.close()


def test_distillation_joins_when_the_curriculum_reaches_the_last_block(tmp_path: Path) -> None:
    options = ("curriculum.threshold=2", "curriculum.max_epochs_per_block=1", "epochs=5", "objective.kd_alpha=0.5")
    run(stub_trainer(stub_config(tmp_path, *LABELS, *options), LastBlockLogits()))
    blocks, kd = scalars(tmp_path, "curriculum/block"), scalars(tmp_path, "loss/kd")
    assert len(blocks) == 15 and blocks.count(DEPTH) == len(kd) == 6
    ce, patch, total = (scalars(tmp_path, f"loss/{name}") for name in ("ce", "patch", "total"))
    cls = scalars(tmp_path, "loss/cls")
    feature = [a + 0.05 * b for a, b in zip(patch, cls, strict=True)]
    assert total[:9] == pytest.approx([f + c for f, c in zip(feature, ce, strict=True)][:9], rel=1e-5)
    assert total[9:] == pytest.approx([f + (c + k) / 2 for f, c, k in zip(feature[9:], ce[9:], kd, strict=True)])


def test_a_supervised_run_that_was_cut_continues_bitwise(tmp_path: Path) -> None:
    options = (
        *LABELS, "objective.kd_alpha=0.5", "data.mixup=true", "data.mixup_group=2", "data.mixup_alpha=0.8",
        "data.cutmix_alpha=1", "checkpoint.every_steps=1", "checkpoint.keep=9", "curriculum.start=3",
        "curriculum.threshold=0",
    )  # fmt: skip
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    uncut = stub_trainer(stub_config(whole, *options), LastBlockLogits())
    run(uncut)
    resumed = stub_trainer(stub_config(rest, *options), LastBlockLogits())
    resumed.restore(whole / "checkpoints" / "step00000004")
    run(resumed)
    for name, tensor in uncut.learner.engine.module.state_dict().items():
        assert torch.equal(tensor, resumed.learner.engine.module.state_dict()[name]), name
    assert scalars(rest, "loss/kd") == scalars(whole, "loss/kd")[-2:]


def test_the_student_sees_labels_mixed_as_their_images(tmp_path: Path) -> None:
    """Each image is all of one brightness, its class; a mixed one must be as bright as its label says."""
    options = ("student.num_classes=5", "data.mixup=true", "data.mixup_group=4", "epochs=4")
    trainer, seen = stub_trainer(stub_config(tmp_path, *options)), []
    epoch, forward = trainer.loader.epoch, trainer.learner.engine.module.forward
    classes = torch.tensor([0, 4, 1, 3])
    images = classes.float()[:, None, None, None].expand(4, 3, 8, 8)
    trainer.loader.epoch = lambda *where: (b._replace(images=images, labels=classes) for b in epoch(*where))
    trainer.learner.engine.module.forward = lambda *inputs: (seen.append((inputs[0], inputs[3])), forward(*inputs))[1]
    run(trainer)
    assert len(seen) == 12
    for images, labels in seen:
        torch.testing.assert_close(labels @ torch.arange(5.0), images[:, 0, 0, 0])
        assert labels.max() < 1 and ((labels > 0).sum(1) == 2).all()


def test_shards_without_labels_are_refused(tmp_path: Path) -> None:
    trainer = stub_trainer(stub_config(tmp_path, *LABELS))
    epoch = trainer.loader.epoch
    trainer.loader.epoch = lambda *where: (b._replace(labels=torch.tensor([0, 1, 2, -1])) for b in epoch(*where))
    with pytest.raises(UserError, match=r"student.num_classes=5: data.train has a sample of label -1"):
        trainer.run()
    trainer.close()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.kd_alpha=0.5"], "objective.kd_alpha=0.5: needs a classifier; set student.num_classes"),
        (["objective.label_smoothing=0.1"], "objective.label_smoothing=0.1: needs a classifier"),
        (["objective.kd_alpha=1.5", "student.num_classes=2"], "objective.kd_alpha=1.5: must be at least 0, at most 1"),
        (["objective.kd_tau=0"], "objective.kd_tau=0.0: must be above 0"),
        (["objective.feature_weight=0", "student.num_classes=2"], "objective.feature_weight=0: nothing would train"),
        (["objective.feature_weight=-1"], "objective.feature_weight=-1.0: must be at least 0"),
        (["objective.feature=fft"], "expected one of 'mse', 'spectral'"),
        (["data.mixup_alpha=0"], "data.mixup_alpha=0.0: must be above 0"),
        (["data.mixup=false", "data.cutmix_alpha=1"], "data.cutmix_alpha=1.0: only used with data.mixup=true"),
    ],
)
def test_options_that_cannot_be(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, ["teacher.model=t", "student.model=s", "data.train=digits", *overrides])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_distillation_alone_needs_a_fixed_target() -> None:
    needed = ["teacher.model=t", "student.model=s", "data.train=digits", "student.num_classes=2"]
    alone = ["objective.feature_weight=0", "objective.kd_alpha=1"]
    assert load(None, [*needed, *alone, "curriculum.mode=fixed"]).teacher_classes == 2
    assert load(None, needed).teacher_classes == 0
    with pytest.raises(UserError, match=r"curriculum\.mode=fixed"):
        load(None, [*needed, *alone])


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["baseline", "leap_lift", "leap_wide_last"])
def test_the_launched_pair_fits_together(name: str) -> None:
    """CaiT-S24 and DeiT-Tiny, without weights or memory; CaiT's class attention and classifier count at block 24."""
    config = load(LAUNCHED / f"{name}_caits24_deittiny_imagenet1k.yaml", ["data.train=digits"])
    check_pair(config, describe_teacher(config.teacher, 224), torch.device("cpu"), 8)
    flops = step_flops(config)
    assert flops.teacher.upto(24) - flops.teacher.upto(23) == flops.teacher.blocks[23] + flops.teacher.classifier
    assert flops.teacher.classifier > 2 * 384 * 1000
    unlabelled = replace(config.student, num_classes=0)
    extra = sum(flops.student) - sum(student_step_flops(unlabelled, 224, 384))
    assert extra == 3 * 2 * 1000 * (192 if name == "baseline" else 384)  # the classifier, thrice


def test_every_layer_needs_as_many_blocks_as_the_teacher_has() -> None:
    path = LAUNCHED / "baseline_caits24_deittiny_imagenet1k.yaml"
    config = load(path, ["data.train=digits", "curriculum.mode=all_layers", "objective.kd_alpha=0"])
    with pytest.raises(
        UserError, match=r"needs equal depths, student.model=\S+ has 12 blocks and teacher.model=\S+ 24"
    ):
        check_pair(config, describe_teacher(config.teacher, 224), torch.device("cpu"), 8)


def test_distillation_from_a_block_without_logits_is_refused() -> None:
    path = LAUNCHED / "baseline_caits24_deittiny_imagenet1k.yaml"
    config = load(path, ["data.train=digits", "curriculum.block=12"])
    with pytest.raises(UserError, match=r"kd_alpha=0.9 with curriculum.block=12: .* last block only, which is 24"):
        check_pair(config, describe_teacher(config.teacher, 224), torch.device("cpu"), 8)
