"""Second moments of all tokens of a set, one batch at a time, and the linear CKA between layers that follows from them.

Centred moments of disjoint sets merge exactly (Chan, Golub, LeVeque 1983): neither the order of batches nor the number
of ranks changes more than the last digits, and memory is that of one matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leap_dist.matching import constant
from leap_dist.runtime.distributed import sum_over_ranks

CHUNK = 4096  # columns of y at a time: for all blocks of two ViT-g the whole float32 product would be 15 GB


class CrossMoments:
    """Sum over rows of (y - mean_y)(x - mean_x)^T; of one variable with itself when x is y.

    n: () rows; mean_x (Dx,), mean_y (Dy,); scatter (Dy, Dx). All float64; products within a batch are float32, of rows
    centred about the batch's mean.
    """

    def __init__(self, width_x: int, width_y: int, device: torch.device) -> None:
        self.n, self.mean_x, self.mean_y, self.scatter = (
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((), (width_x,), (width_y,), (width_y, width_x))
        )

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (M, Dx), y (M, Dy)."""
        m, itself = len(x), y is x
        x, mean_x = _centred(x)
        y, mean_y = (x, mean_x) if itself else _centred(y)
        delta_x, delta_y = mean_x - self.mean_x, mean_y - self.mean_y
        share = m / (self.n + m)
        for part, columns in zip(self.scatter.split(CHUNK), y.split(CHUNK, 1), strict=True):
            part += columns.T @ x
        self.scatter.addr_(delta_y, delta_x * (self.n * share))
        self.mean_x += delta_x * share
        self.mean_y += delta_y * share
        self.n += m

    def merge_over_ranks(self) -> None:
        """Become the moments of all ranks' rows together. Collective."""
        total = sum_over_ranks(self.n.clone())
        mean_x, mean_y = (sum_over_ranks(mean * (self.n / total)) for mean in (self.mean_x, self.mean_y))
        self.scatter.addr_(self.mean_y - mean_y, (self.mean_x - mean_x) * self.n)
        sum_over_ranks(self.scatter)
        self.n, self.mean_x, self.mean_y = total, mean_x, mean_y

    def spread(self) -> Tensor:
        """`scatter` of one variable with itself; zeros where all rows were equal but for rounding."""
        flat = constant(self.n, self.mean_x, self.scatter.diagonal(), torch.float32)
        return self.scatter.masked_fill(flat, 0)

    def uncentred(self) -> Tensor:
        """Sum over rows of y x^T, (Dy, Dx)."""
        return torch.addr(self.scatter, self.mean_y, self.mean_x * self.n)


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows about their mean, and the mean in float64: what rounding left of it in the rows is added to it."""
    mean = rows.mean(0)
    rows = rows - mean
    return rows, mean.double() + rows.mean(0, dtype=torch.float64)


def principal_axes(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,) and eigenvectors (D, D) of a symmetric second moment, strongest first."""
    values, vectors = torch.linalg.eigh(second_moment)
    return values.flip(0).clamp_min(0), vectors.flip(1)


class LayerCka:
    """Linear CKA (Kornblith et al. 2019) of every layer of x with every layer of y, over all rows seen.

    Biased upward as every CKA of finitely many rows: independent features of width D give about D / (rows + D), which
    thousands of images make negligible. Memory: 8 (sum of Dy) (sum of Dx) bytes.
    """

    def __init__(self, widths_x: list[int], widths_y: list[int], device: torch.device) -> None:
        self._widths = widths_x, widths_y
        self._cross = CrossMoments(sum(widths_x), sum(widths_y), device)
        self._own = [[CrossMoments(w, w, device) for w in widths] for widths in self._widths]

    def update(self, x: list[Tensor], y: list[Tensor]) -> None:
        """Add the same rows as each layer gives them: (M, D) each, all with the same M."""
        self._cross.update(torch.cat(x, 1), torch.cat(y, 1))
        for layers, own in zip((x, y), self._own, strict=True):
            for rows, moments in zip(layers, own, strict=True):
                moments.update(rows, rows)

    def merge_over_ranks(self) -> None:
        """Cover all ranks' rows. Collective."""
        for moments in (self._cross, *self._own[0], *self._own[1]):
            moments.merge_over_ranks()

    def matrix(self) -> Tensor:
        """(layers of x, layers of y) float64, 0 to 1; 0 where a layer is constant."""
        norm_x, norm_y = (torch.stack([m.spread().norm() for m in own]) for own in self._own)
        widths_x, widths_y = self._widths
        cross = [
            torch.stack([block.square().sum() for block in rows.split(widths_x, 1)])
            for rows in self._cross.scatter.split(widths_y, 0)
        ]
        denominator = norm_x[:, None] * norm_y
        return torch.where(denominator > 0, torch.stack(cross, 1) / denominator, 0.0)
