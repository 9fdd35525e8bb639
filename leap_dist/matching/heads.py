"""How the student's tokens meet the teacher's: three modules with one interface, of which forward gives the loss.

Forward takes tokens (..., Ds) and target (..., Dt) and gives the mean squared error over all elements (0-d, float32)
and, if asked, evidence of the alignment. With a `grid`, for maps (B, N, ...), the error is that of their spectra; the
evidence is of the tokens all the same. None of them is needed after training.
"""

from __future__ import annotations

from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_dist.errors import UserError
from leap_dist.matching.losses import spectral_loss
from leap_dist.matching.score import CkaEvidence, CosineEvidence, Evidence
from leap_kernels.feature_match import alignment_moments, feature_match, obstacle

Metric = Literal["cka", "cosine"]
Grid = tuple[int, int]
Answer = tuple[Tensor, Optional[Evidence]]


class MatchingHead(nn.Linear):
    """Linear map from student to teacher width that is only ever used to match.

    Loss and gradients come from the fused op, which does not form the projection. The op is called inside this
    module's own forward so that ZeRO-3 has the weight gathered there.
    """

    def __init__(self, width: int, teacher_width: int, impl: str, metric: Metric) -> None:
        self.impl, self.metric = impl, metric
        super().__init__(width, teacher_width)

    def reset_parameters(self) -> None:
        """Truncated normal of std 0.02, bias 0: the published initialisation."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(
        self, tokens: Tensor, target: Tensor, with_evidence: bool = False, grid: Optional[Grid] = None
    ) -> Answer:
        if grid is not None:
            loss = spectral_loss(F.linear(tokens, self.weight, self.bias), target, grid)
            with torch.no_grad():
                return loss, self.forward(tokens, target, True)[1] if with_evidence else None
        tokens, target = tokens.flatten(0, -2), target.flatten(0, -2)
        if not with_evidence:
            return feature_match(tokens, self.weight, self.bias, target, impl=self.impl), None
        if self.metric == "cosine":
            with torch.no_grad():
                evidence: Evidence = CosineEvidence.of(F.linear(tokens, self.weight, self.bias), target)
            return feature_match(tokens, self.weight, self.bias, target, impl=self.impl), evidence
        loss, moments = feature_match(tokens, self.weight, self.bias, target, impl=self.impl, moments=True)
        # A copy: the optimizer step changes the weight before the score is read, and ZeRO-3 takes it away.
        return loss, CkaEvidence(moments, self.weight.detach().clone())


class DirectHead(nn.Module):
    """Tokens of the teacher's width, matched as they are (arXiv 2511.15572, with either remedy)."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric

    def forward(
        self, tokens: Tensor, target: Tensor, with_evidence: bool = False, grid: Optional[Grid] = None
    ) -> Answer:
        loss = spectral_loss(tokens, target, grid) if grid else F.mse_loss(tokens.float(), target.float())
        tokens, target = tokens.flatten(0, -2), target.flatten(0, -2)
        if not with_evidence:
            return loss, None
        if self.metric == "cosine":
            return loss, CosineEvidence.of(tokens, target)
        return loss, CkaEvidence(alignment_moments(tokens, target), None)


class PooledHead(DirectHead):
    """The teacher's channels averaged to the student's width, Ds runs of neighbours: the weak baseline of the paper."""

    def forward(
        self, tokens: Tensor, target: Tensor, with_evidence: bool = False, grid: Optional[Grid] = None
    ) -> Answer:
        return super().forward(tokens, F.adaptive_avg_pool1d(target, tokens.shape[-1]), with_evidence, grid)


def build_head(kind: str, width: int, teacher_width: int, impl: str, metric: Metric) -> nn.Module:
    """The head of `leap_dist.config.matching_head` between these widths. UserError as of `check_widths`."""
    check_widths(kind, width, teacher_width)
    if kind == "linear":
        return MatchingHead(width, teacher_width, impl, metric)
    return DirectHead(metric) if kind == "none" else PooledHead(metric)


def check_widths(kind: str, width: int, teacher_width: int) -> None:
    """Raise UserError where a head of this kind cannot bring the widths together."""
    if kind == "none" and width != teacher_width:
        raise UserError(
            f"objective.head=none: student tokens have {width} channels, the teacher's {teacher_width}; set "
            "student.remedy, or objective.head=linear or pooled"
        )
    if kind == "pooled" and width > teacher_width:
        raise UserError(f"objective.head=pooled: {teacher_width} channels of the teacher cannot be averaged to {width}")


def check_impl(impl: str, width: int, products: torch.dtype, target: torch.dtype, device: torch.device) -> None:
    """Raise UserError where the op has no such implementation for students of this width.

    products: dtype they are taken in; target: of the teacher's features.
    """
    found = obstacle(device, width, products, target) if impl == "triton" else None
    if found is not None:
        raise UserError(f"objective.impl=triton {found}; use objective.impl=auto")
