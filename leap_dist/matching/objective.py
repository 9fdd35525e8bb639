"""The trainable module: student and head(s), matched to teacher tokens (LEAP, section 3), and to labels.

loss    = feature_weight * feature + (1 - kd_alpha) * CE + kd_alpha * KD          (arXiv 2511.15572)
feature = error(head(student patch), teacher patch) + cls_weight * MSE(head(student CLS), teacher CLS)

CE and KD are there where the student has a classifier. A teacher has logits at its last block only: until the
curriculum is there, KD's share is CE's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_dist.config import ObjectiveConfig, matching_head
from leap_dist.errors import UserError
from leap_dist.matching.cka import linear_cka
from leap_dist.matching.heads import build_head
from leap_dist.matching.losses import soft_distillation
from leap_dist.matching.score import Evidence, LinearCka, Summed, over_ranks
from leap_dist.models import Features, Student, on_grid
from leap_dist.runtime.average import WeightAverage
from leap_dist.runtime.distributed import World


class Match(NamedTuple):
    """Losses of one micro-batch (0-d, float32; the mean over targets) and, on request, evidence for each target.

    terms: what `loss` is made of, before weights and without gradient: patch, cls and, with labels, ce and kd.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    evidence: list[Evidence]


class Objective(nn.Module):
    """Student and head(s) as one module, so that DeepSpeed shards, clips and checkpoints them together.

    One head serves every target (LEAP keeps it through all blocks), or, with `every_layer`, head i matches student
    layer i to target i.

    Args:
        teacher_width: Dt.
        teacher_grid: (rows, columns) of the teacher's patch tokens; student tokens are resized to it.
        num_targets: teacher depth in mode all_layers, else 1.
    """

    def __init__(
        self,
        student: Student,
        teacher_width: int,
        teacher_grid: tuple[int, int],
        config: ObjectiveConfig,
        metric: Literal["cka", "cosine"] = "cka",
        num_targets: int = 1,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher_grid = teacher_grid
        self.config = config
        self.patch_grid = teacher_grid if config.feature == "spectral" else None
        self.every_layer = num_targets > 1
        kind = matching_head(config, student.recipe.remedy)
        self.heads = nn.ModuleList(
            build_head(kind, student.width, teacher_width, config.impl, metric) for _ in range(num_targets)
        )
        # One head for both, as in LEAP, but where a pooled output has another width than the map.
        apart = config.cls_weight > 0 and student.cls_width != student.width
        self.cls_head = build_head(kind, student.cls_width, teacher_width, config.impl, metric) if apart else None
        student.freeze_unreached(config.cls_weight > 0)
        self.average: Optional[WeightAverage] = None  # of the student's weights; begun when they are in an engine
        self._compiled: Optional[Callable[[Tensor], list[Features]]] = None
        self._linear_cka: LinearCka = linear_cka

    def forward(
        self, images: Tensor, targets: list[Features], with_evidence: bool = False, labels: Optional[Tensor] = None
    ) -> Match:
        """Match the student's view of `images` (B,3,H,W) to each of `targets`, and its logits to `labels` (B, classes).

        Raises:
            UserError: a target whose number of patch tokens is not that of the teacher's grid.
        """
        config = self.config
        views = self._compiled_views(images) if self._compiled and self.training else self._views(images)
        terms, evidence = self._feature_terms(views, targets, with_evidence)
        loss = _times(config.feature_weight, terms["patch"] + _times(config.cls_weight, terms["cls"]))
        if labels is not None:
            logits = self.student.classify(views[-1])
            supervised = self._supervised_terms(logits, labels, targets[-1].logits)
            alpha = config.kd_alpha if "kd" in supervised else 0.0
            loss = loss + (1 - alpha) * supervised["ce"] + alpha * supervised.get("kd", 0.0)
            terms |= supervised
        return Match(loss, {name: term.detach() for name, term in terms.items()}, evidence)

    def compile_student(self, backend: str = "inductor") -> None:
        """Have torch compile what the student does in training, as one graph forward and one backward.

        The heads stay outside: so neither evidence nor the target block has a graph of its own, and their time can be
        told from the student's. Outside of training, with other shapes and for one batch, the student runs as it is.
        The score from moments is compiled too, which is little arithmetic in fifty launches.
        """
        self._compiled = torch.compile(self._views, fullgraph=True, dynamic=False, backend=backend)
        self._linear_cka = torch.compile(linear_cka, fullgraph=True, dynamic=False, backend=backend)

    def over_ranks(
        self, losses: Tensor, evidence: Optional[Evidence], reduction: str, world: World, summed: Summed
    ) -> tuple[Tensor, Tensor]:
        """Mean losses and score of all ranks, as `leap_dist.matching.score.over_ranks` has them."""
        return over_ranks(losses, evidence, reduction, world, summed, self._linear_cka)

    def after_step(self) -> None:
        """What follows an optimizer step: the average of the weights moves."""
        if self.average is not None:
            self.average.update()

    def _views(self, images: Tensor) -> list[Features]:
        """What of the student's is matched: its last tokens, or with `every_layer` those of each layer."""
        return self.student.every_layer(images) if self.every_layer else [self.student(images)]

    def _compiled_views(self, images: Tensor) -> list[Features]:
        from torch._dynamo.exc import TorchDynamoException  # seconds to import

        assert self._compiled is not None
        try:
            return self._compiled(images)
        except TorchDynamoException as error:
            model, reason = self.student.recipe.model, " ".join(str(error).split())
            raise UserError(
                f"student.compile=true: torch cannot compile student.model={model} ({reason:.200}); "
                "use student.compile=false"
            ) from error

    def _feature_terms(
        self, views: list[Features], targets: list[Features], with_evidence: bool
    ) -> tuple[dict[str, Tensor], list[Evidence]]:
        patch_losses, cls_losses, evidence = [], [], []
        views = views if self.every_layer else views * len(targets)  # calibration: one view, every block
        for index, (view, target) in enumerate(zip(views, targets, strict=True)):
            head = self.heads[index if self.every_layer else 0]
            tokens = self._on_teacher_grid(view.patch, target)
            loss, found = head(tokens, target.patch, with_evidence, self.patch_grid)
            patch_losses.append(loss)
            evidence += [found] if found is not None else []
            if self.config.cls_weight:
                cls_losses.append((self.cls_head or head)(view.cls, target.cls)[0])
        patch = mean_of(patch_losses)
        cls = mean_of(cls_losses) if cls_losses else torch.zeros_like(patch)
        return {"patch": patch, "cls": cls}, evidence

    def _supervised_terms(self, logits: Tensor, labels: Tensor, teacher_logits: Optional[Tensor]) -> dict[str, Tensor]:
        terms = {"ce": F.cross_entropy(logits.float(), labels)}
        if teacher_logits is not None:
            terms["kd"] = soft_distillation(logits, teacher_logits, self.config.kd_tau)
        return terms

    def _on_teacher_grid(self, tokens: Tensor, target: Features) -> Tensor:
        """(B, N, Ds) -> (B, Nt, Ds). Before the head: resizing and a linear map commute, and Ds < Dt."""
        rows, columns = self.teacher_grid
        if target.patch.shape[1] != rows * columns:
            raise UserError(
                f"the teacher gave {target.patch.shape[1]} patch tokens, its grid is {rows}x{columns}: "
                "images are not of the size it was built for"
            )
        return on_grid(tokens, self.student.grid, self.teacher_grid)


def mean_of(losses: list[Tensor]) -> Tensor:
    """Of losses of one shape, element by element; the one itself saves launches."""
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)


def _times(weight: float, term: Tensor) -> Tensor:
    """At 1, as in LEAP, the term itself: that saves launches, forward and backward."""
    return term if weight == 1 else weight * term
