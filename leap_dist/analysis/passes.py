"""Two passes over images: sums over all of them, then a closer look at a fixed sample in the basis they share.

Everything that grows with the number of images is summed as it comes (histograms, moments, mean curves), so memory does
not. The sums of ranks add up. The sample is pairs of images, each pair on one rank: its tokens are never stored.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from leap_dist.analysis import sep, spectra
from leap_dist.analysis.moments import CrossMoments, LayerCka, principal_axes
from leap_dist.analysis.spectra import CENTRINGS, LEVELS
from leap_dist.analysis.subjects import Subject
from leap_dist.data import Batch
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, gather_objects, sum_over_ranks


@dataclass
class ImageTotals:
    """Sums over images of the spectra of one block, at one centring. All float64, on the model's device.

    images: (). histogram: (L, R + 1), images by the dimensions they need for each level of energy. effective: (2,),
    sums of effective rank and of its square. energy: (R,), sum of cumulated energy shares. power: (D//2 + 1,) and
    sep_tokens: (), as `sep.power` returns them.
    """

    images: Tensor
    histogram: Tensor
    effective: Tensor
    energy: Tensor
    power: Tensor
    sep_tokens: Tensor

    @classmethod
    def zeros(cls, tokens: int, width: int, device: torch.device) -> ImageTotals:
        rank = min(tokens, width)
        shapes = ((), (len(LEVELS), rank + 1), (2,), (rank,), (width // 2 + 1,), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def update(self, rows: Tensor) -> None:
        """Add the images of rows (B, N, D)."""
        energy = spectra.energies(rows)
        share, effective = spectra.cumulative(energy), spectra.effective_rank(energy)
        dims = spectra.dims_at(share)
        self.images += len(rows)
        self.histogram.scatter_add_(1, dims.T, torch.ones_like(dims.T, dtype=torch.float64))
        self.effective += torch.stack([effective.sum(), effective.square().sum()])
        self.energy += share.sum(0)
        power, count = sep.power(rows)
        self.power += power
        self.sep_tokens += count

    def merge_over_ranks(self) -> None:
        """Cover all ranks' images. Collective."""
        for field in fields(self):
            sum_over_ranks(getattr(self, field.name))


class BlockTotals:
    """What the first pass keeps of one block, by centring: `ImageTotals`, and the moments of all tokens."""

    def __init__(self, tokens: Tensor) -> None:
        _, self.tokens, self.width = tokens.shape
        self.images = {c: ImageTotals.zeros(self.tokens, self.width, tokens.device) for c in CENTRINGS}
        self.moments = {c: CrossMoments(self.width, self.width, tokens.device) for c in CENTRINGS}

    def update(self, tokens: Tensor) -> None:
        """Add tokens (B, N, D)."""
        for centring, rows in spectra.views(tokens).items():
            self.images[centring].update(rows)
            flat = rows.flatten(0, 1)
            self.moments[centring].update(flat, flat)

    def merge_over_ranks(self) -> None:
        """Cover all ranks' images. Collective."""
        for totals in (*self.images.values(), *self.moments.values()):
            totals.merge_over_ranks()

    def axes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By centring, eigenvalues and eigenvectors of the second moment of all images' tokens."""
        return {centring: principal_axes(moments.uncentred()) for centring, moments in self.moments.items()}


class FirstPass:
    """Sums over all images, of every subject, and the images of the sample.

    Args:
        subjects: all take the same images. matched: pairs (student, teacher) of their indices whose layers' CKA is
            wanted. images: how many there are over all ranks. sample: how many of them to keep, evenly strided.
    """

    def __init__(
        self, subjects: list[Subject], matched: list[tuple[int, int]], images: int, sample: int, world: World
    ) -> None:
        self._subjects, self._matched, self._world = subjects, matched, world
        self._kept = torch.arange(sample) * images // sample
        self._sample: list[tuple[int, Tensor]] = []
        self.blocks: list[list[BlockTotals]] = []
        self.cka: list[LayerCka] = []

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Add one batch of this rank."""
        self._keep(batch)
        images = batch.images.to(self._world.device, non_blocking=True)
        maps = [_finite(subject, subject.layers(images)) for subject in self._subjects]
        if not self.blocks:
            self._allocate(maps)
        for layers, blocks in zip(maps, self.blocks, strict=True):
            for tokens, totals in zip(layers, blocks, strict=True):
                totals.update(tokens)
        for (student, teacher), cka in zip(self._matched, self.cka, strict=True):
            both = [(self._subjects[index], maps[index]) for index in (student, teacher)]
            cka.update(*(subject.on_grid(found, self._subjects[teacher].grid) for subject, found in both))

    def finish(self) -> Tensor:
        """Cover all ranks' images; return the sample (S, 3, H, W), the same on every rank, S even. Collective.

        Images that could not be read may leave it short. UserError if fewer than two are left.
        """
        for totals in (*(block for blocks in self.blocks for block in blocks), *self.cka):
            totals.merge_over_ranks()
        sample = [item for part in gather_objects(self._sample, self._world) for item in part]
        if len(sample) < 2:
            raise UserError(f"{len(sample)} of the {len(self._kept)} images to compare in pairs could be read")
        whole_pairs = sorted(sample, key=lambda item: item[0])[: len(sample) // 2 * 2]
        return torch.stack([image for _, image in whole_pairs])

    def _allocate(self, maps: list[list[Tensor]]) -> None:
        self.blocks = [[BlockTotals(tokens) for tokens in layers] for layers in maps]
        widths = [[tokens.shape[-1] for tokens in layers] for layers in maps]
        self.cka = [
            LayerCka(widths[student], widths[teacher], self._world.device) for student, teacher in self._matched
        ]

    def _keep(self, batch: Batch) -> None:
        chosen = torch.isin(batch.positions, self._kept)
        self._sample += zip(batch.ids[chosen].tolist(), batch.images[chosen], strict=True)


def _finite(subject: Subject, layers: list[Tensor]) -> list[Tensor]:
    finite = torch.stack([tokens.isfinite().all() for tokens in layers]).tolist()
    if not all(finite):
        raise UserError(f"{subject.name}: tokens of block {finite.index(False) + 1} are not finite")
    return layers


class SampleViews(NamedTuple):
    """The sample's images against each other and against the shared basis, for one block at one centring.

    captured: (S, D) share of an image's energy in the first 1, 2, ... shared directions. pair_angles: (S/2, k) degrees
    between the top-k subspaces of neighbours. shared_angles: (S, k), of images against the shared top-k basis.
    power: (P, D//2 + 1) and sep_tokens: (P,), `sep.power` under P permutations of the channels.
    """

    captured: np.ndarray
    pair_angles: np.ndarray
    shared_angles: np.ndarray
    power: np.ndarray
    sep_tokens: np.ndarray


class SecondPass:
    """The sample of one subject, once its shared bases are known.

    Args:
        blocks: of the first pass. k: dimensions of the subspaces compared. shuffles: permutations of the channels.
    """

    def __init__(self, subject: Subject, blocks: list[BlockTotals], k: int, shuffles: int, world: World) -> None:
        self._subject, self._k, self._world = subject, k, world
        self.axes = [totals.axes() for totals in blocks]
        self._orders = [sep.permutations(totals.width, shuffles).to(world.device) for totals in blocks]

    @torch.no_grad()
    def look(self, images: Tensor) -> list[dict[str, SampleViews]]:
        """Views of images (2 m, 3, H, W), pairs of neighbours, by block and centring."""
        return [
            {
                centring: self._compare(rows, self.axes[index][centring][1], self._orders[index])
                for centring, rows in spectra.views(tokens).items()
            }
            for index, tokens in enumerate(self._subject.layers(images.to(self._world.device)))
        ]

    def _compare(self, rows: Tensor, axes: Tensor, orders: Tensor) -> SampleViews:
        bases = spectra.top_basis(rows, self._k)
        powers, counts = zip(*(sep.power(rows[..., order]) for order in orders), strict=True)
        found = (
            spectra.captured(rows, axes),
            spectra.principal_angles(bases[0::2], bases[1::2]),
            spectra.principal_angles(bases, axes[:, : self._k].expand_as(bases)),
            torch.stack(powers),
            torch.stack(counts),
        )
        return SampleViews(*(x.cpu().numpy() for x in found))
