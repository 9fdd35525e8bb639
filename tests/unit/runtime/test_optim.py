"""Learning rate and optimizers, against worked numbers of the published LEAP code and timm's own LARS."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from leap_dist.config import OptimConfig
from leap_dist.runtime.optim import build_optimizer, lr_factor, peak_lr
from runs import finish, fork

LARS = OptimConfig(name="lars", lr=2.0, weight_decay=1e-6)


def factors(policy: str, advanced_at: int | None, *, total: int = 100, epochs: int = 10) -> list[float]:
    """The factor of every step of a run with one warm-up epoch of total/epochs steps."""
    config = OptimConfig(on_advance=policy)
    return [lr_factor(config, step=s, total_steps=total, epochs=epochs, advanced_at=advanced_at) for s in range(total)]


def test_peak_scales_with_the_root_of_the_batch() -> None:
    assert peak_lr(OptimConfig(lr=9.0), 32) == pytest.approx(1.2990381, abs=1e-7)
    assert peak_lr(OptimConfig(lr=6.0), 256) == pytest.approx(2.4494897, abs=1e-7)
    assert peak_lr(OptimConfig(lr=6.0, batch_reference=None), 256) == 6.0


def test_warmup_then_cosine() -> None:
    expected = {0: 0.1, 8: 0.9, 9: 1.0, 10: 1.0, 11: 0.99968884, 50: 0.57950963, 98: 0.00131116, 99: 0.001}
    run = factors("keep", None)
    assert {step: run[step] for step in expected} == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("epochs", "total", "warmup"), [(4, 40, 4), (200, 2000, 100), (1, 5, 0), (1, 1, 0), (100, 10, 1)]
)
def test_warmup_is_ten_epochs_at_most_and_never_more_than_a_tenth(epochs: int, total: int, warmup: int) -> None:
    run = factors("keep", None, total=total, epochs=epochs)
    assert run[: warmup + 1] == pytest.approx([(step + 1) / warmup for step in range(warmup)] + [1.0])
    assert run[-1] == pytest.approx(0.001 if total > warmup + 1 else 1.0)


@pytest.mark.parametrize("policy", ["keep", "constant"])
def test_advance_leaves_keep_and_constant_alone(policy: str) -> None:
    assert factors(policy, 40) == factors(policy, None)


@pytest.mark.parametrize("policy", ["restart", "envelope", "warmup"])
def test_before_any_advance_every_policy_is_the_base_schedule(policy: str) -> None:
    assert factors(policy, None) == factors("keep", None)


def test_constant_never_decays() -> None:
    assert factors("constant", None) == pytest.approx([(step + 1) / 10 for step in range(10)] + [1.0] * 90)


def test_restart_goes_from_the_peak_over_the_remaining_steps() -> None:
    run = factors("restart", 60)[60:]
    assert run == pytest.approx([0.001 + 0.999 * (1 + math.cos(math.pi * s / 40)) / 2 for s in range(40)])


def test_envelope_goes_from_the_base_cosine_at_the_advance() -> None:
    run, base = factors("envelope", 50), factors("keep", None)
    assert run[50] == pytest.approx(base[50])
    assert run[75] == pytest.approx((base[50] + 0.001) / 2)
    assert all(a > b for a, b in itertools.pairwise(run[50:]))


@pytest.mark.parametrize("policy", ["restart", "envelope"])
@pytest.mark.parametrize("advanced_at", [0, 4, 9])
def test_an_advance_during_the_warmup_does_not_change_the_schedule(policy: str, advanced_at: int) -> None:
    assert factors(policy, advanced_at) == factors("keep", None)


@pytest.mark.parametrize("policy", ["restart", "envelope"])
def test_an_advance_at_the_end_of_the_warmup_starts_from_the_peak(policy: str) -> None:
    run = factors(policy, 10)
    assert run[10:] == pytest.approx([0.001 + 0.999 * (1 + math.cos(math.pi * s / 90)) / 2 for s in range(90)])


def test_warmup_policy_restarts_the_whole_schedule_and_never_at_zero() -> None:
    run = factors("warmup", 60)
    assert run[60:70] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert run[70:] == pytest.approx([0.001 + 0.999 * (1 + math.cos(math.pi * s / 29)) / 2 for s in range(30)])
    assert factors("warmup", 95)[95:] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


class Toy(nn.Module):
    """A 2x2 matrix and a bias of 2, with gradients given by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        self.bias = nn.Parameter(torch.tensor([1.0, -2.0]))


TOY_GRADIENTS = [
    (torch.tensor([[0.6, 0.0], [0.0, 0.8]]), torch.tensor([0.1, 0.2])),
    (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([0.1, -0.2])),
]


def test_lars_two_steps_worked_by_hand() -> None:
    toy = Toy()
    optimizer = build_optimizer(LARS, toy)
    weights, biases = [], []
    for toy.weight.grad, toy.bias.grad in TOY_GRADIENTS:
        optimizer.step()
        weights.append(toy.weight.detach().clone())
        biases.append(toy.bias.tolist())
    torch.testing.assert_close(weights[0], torch.tensor([[2.993999958, 4.0], [0.0, -0.0079999613]]))
    torch.testing.assert_close(weights[1], torch.tensor([[2.9886000156, 3.9900071621], [0.0, -0.0151999257]]))
    assert biases == [pytest.approx([0.8, -2.4]), pytest.approx([0.42, -2.36])]


def test_lars_keeps_its_trust_ratio_without_weight_decay() -> None:
    toy = Toy()
    optimizer = build_optimizer(OptimConfig(name="lars", lr=2.0, weight_decay=0.0), toy)
    toy.weight.grad, toy.bias.grad = TOY_GRADIENTS[0]
    optimizer.step()
    ratio = 0.001 * 5 / 1  # trust * |w| / |g|
    expected = torch.tensor([[3.0 - 2 * ratio * 0.6, 4.0], [0.0, -2 * ratio * 0.8]])
    torch.testing.assert_close(toy.weight.detach(), expected)


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_groups_of_a_vit_tiny_and_its_head(name: str) -> None:
    vit = VisionTransformer(img_size=56, patch_size=14, embed_dim=192, depth=12, num_heads=3, num_classes=0)
    module = nn.ModuleDict({"backbone": vit, "head": nn.Linear(192, 32)})
    decayed, undecayed = build_optimizer(OptimConfig(name=name, weight_decay=0.03), module).param_groups
    assert (len(decayed["params"]), sum(p.numel() for p in decayed["params"])) == (50, 5_427_456)
    assert (len(undecayed["params"]), sum(p.numel() for p in undecayed["params"])) == (102, 34_016)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.03, 0.0)
    assert not undecayed.get("always_adapt", False)


def test_learned_tokens_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    vit = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=8, depth=1, num_heads=1, num_classes=0, reg_tokens=2, init_values=1.0
    )
    vit.blocks[0].mlp.fc1.weight.requires_grad_(False)
    decayed, undecayed = build_optimizer(OptimConfig(), vit).param_groups
    names = {parameter: name for name, parameter in vit.named_parameters()}
    assert {names[p] for p in decayed["params"]} == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc2.weight",
    }
    assert {"pos_embed", "cls_token", "reg_token", "blocks.0.ls1.gamma"} <= {names[p] for p in undecayed["params"]}


def test_adamw_takes_its_options() -> None:
    optimizer = build_optimizer(OptimConfig(lr=0.3, betas=(0.8, 0.95)), Toy())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["betas"]) == (0.3, (0.8, 0.95))


@pytest.mark.seconds
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stage_0_runs_lars_unwrapped_clipped_and_exact(precision: str) -> None:
    done = finish(fork(Path(__file__).with_name("lars_worker.py"), precision, processes=1))
    assert done.returncode == 0, done.stdout[-2000:]
