"""Principal components of rows that come batch by batch: the incremental SVD of Ross et al. (IJCV
2008), as in EVA.

Two sets of rows are joined by one SVD of what is kept of each, and of one row more for the distance
of their means:

    [ diag(S) V ;  diag(S') V' ;  sqrt(n n' / (n + n')) (mean - mean') ]

Without truncation that is the decomposition of all centred rows, whatever the order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pissa.linalg.svd import truncated_svd


@dataclass(frozen=True, eq=False)
class Components:
    """The leading principal components of the rows seen so far, float32 (float64 for rows in
    float64).

    Attributes:
        mean: [in].
        values: [k], singular values of the centred rows, descending.
        vectors: [k, in], orthonormal rows; in each the entry of largest magnitude is positive.
        rows: how many were seen.
        energy: sum of squares of all centred rows, exact whatever was cut off.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor
    rows: int
    energy: float

    @classmethod
    def of(cls, rows: Tensor, most: int) -> Components:
        """The components of rows [n, in], n >= 1: at most `most`, and no more than there are rows or columns."""
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        mean = wide.mean(0)
        centred = wide - mean
        return cls(mean, *_leading(centred, most), len(rows), _energy(centred))

    def joined(self, other: Components, most: int) -> Components:
        """The components of both sets of rows, at most `most`."""
        rows = self.rows + other.rows
        step = other.mean - self.mean
        between = (self.rows * other.rows / rows) ** 0.5 * step
        stack = torch.cat(
            [
                self.values[:, None] * self.vectors,
                other.values[:, None] * other.vectors,
                between[None],
            ]
        )
        energy = self.energy + other.energy + _energy(between)
        return Components(
            self.mean + other.rows / rows * step, *_leading(stack, most), rows, energy
        )

    def leading(self, most: int) -> Components:
        """The first `most` of the components."""
        return replace(self, values=self.values[:most], vectors=self.vectors[:most])

    @property
    def shares(self) -> Tensor:
        """The part of the variance that each component explains, [k], from 0 to 1."""
        return self.values.square() / self.energy if self.energy else torch.zeros_like(self.values)

    def converged(self, previous: Components, tau: float = 0.99) -> Tensor:
        """Which components were among the previous ones already, [k] of bool.

        EVA (arXiv 2410.07170) compares the i-th with the i-th; here each is matched with the
        nearest, since two of nearly equal variance keep changing places. Those without variance
        have no direction to wait for.

        Args:
            previous: before the last update.
            tau: least cosine.
        """
        cosines = (self.vectors @ previous.vectors.T).abs().amax(1)
        floor = torch.finfo(self.values.dtype).eps * max(self.vectors.shape) * self.values[0]
        return (cosines >= tau) | (self.values <= floor)


def _leading(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Singular values and right vectors of a matrix, at most `most`."""
    found = truncated_svd(matrix, min(most, *matrix.shape), "fast")
    largest = found.Vh.gather(1, found.Vh.abs().argmax(dim=1, keepdim=True))
    return found.S, torch.where(largest < 0, -found.Vh, found.Vh)


def _energy(rows: Tensor) -> float:
    return float(rows.square().sum(dtype=torch.float64))
