"""An orthonormal basis of the block Krylov space of W^T W, grown a block at a time, with W's image of it."""

from __future__ import annotations

import torch
from torch import Tensor

DEAD = 16
"""A new direction below so many rounding errors of its block is none; a random one takes its place."""


class KrylovSpace:
    """The space spanned by X, G X, G^2 X, ... with G = W^T W and a seeded random block X.

    Every block is projected and orthonormalised twice, which keeps the basis orthonormal to rounding. A matrix with no
    directions to give, or fewer copies of a singular value than it has, gets fresh random ones.

    Attributes:
        size: columns in use.
        basis: [capacity, n], an orthonormal row for each column of the space.
        images: [capacity, m], W times each of them, in the precision of the products.
        projected: [capacity, capacity], basis G basis^T.
        coupling: [b, b], what G takes out of the space from its last block of b; see `outside`.

    Args:
        weight: [m, n] in the dtype of the products (float32, float64 or bfloat16); everything else is in at least
            float32.
        block: columns that are added at a time, b.
        capacity: most columns.
        seed: of the random blocks, drawn on the CPU.
    """

    def __init__(self, weight: Tensor, block: int, capacity: int, seed: int) -> None:
        rows, columns = weight.shape
        self.weight, self.size = weight, 0
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self._generator = torch.Generator().manual_seed(seed)

        def empty(width: int) -> Tensor:
            return torch.empty(capacity, width, dtype=self.dtype, device=weight.device)

        self.basis, self.images, self.projected = empty(columns), empty(rows), empty(capacity)
        self._last_image = self.images[:0].T
        self._outside: Tensor | None
        self.follow(block)

    def grow(self, size: int) -> None:
        """Add blocks until the space has `size` columns or a few more."""
        while self.size < size:
            self._append(self.outside())

    def follow(self, block: Tensor | int) -> None:
        """Go on from a block [n, b], or from b fresh random columns, instead of from where the space ends."""
        self._outside = self._orthonormal(self._random(block) if isinstance(block, int) else block)

    def outside(self) -> Tensor:
        """The next block [n, b]: G times the last one = (inside the space) + outside @ coupling."""
        if self._outside is None:
            self._outside = self._orthonormal(self._times(self.weight.T, self._last_image))
        return self._outside

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values [size] of G, descending, and the turn [size, size] that makes the basis their vectors."""
        values, turn = torch.linalg.eigh(self.projected[: self.size, : self.size])
        return values.flip(0), turn.flip(1)

    def turn_from_images(self) -> Tensor:
        """The turn of `ritz` without squaring: right for singular values down to rounding, not to its root."""
        R = torch.linalg.qr(self.images[: self.size].T, mode="r").R
        return torch.linalg.svd(R.double()).Vh.T.to(self.dtype)

    def turned(self, turn: Tensor) -> tuple[Tensor, Tensor]:
        """(basis [n, k], images [m, k]) in the directions `turn` [size, k]."""
        return self.basis[: self.size].T @ turn, self.images[: self.size].T @ turn

    def _append(self, block: Tensor) -> None:
        image = self._times(self.weight, block)
        old, self.size = self.size, self.size + block.shape[1]
        self.basis[old : self.size], self.images[old : self.size] = block.T, image.T
        gram = self.images[: self.size] @ image
        self.projected[: self.size, old : self.size], self.projected[old : self.size, : self.size] = gram, gram.T
        self._last_image, self._outside = image, None

    def _orthonormal(self, block: Tensor) -> Tensor:
        """An orthonormal block spanning what `block` has outside the space; sets `coupling`."""
        scale = torch.linalg.vector_norm(block, dim=0).max()
        directions, coupling = torch.linalg.qr(self._project_out(block))
        dead = coupling.diagonal().abs() <= DEAD * torch.finfo(self.dtype).eps * scale
        if dead.any():
            directions[:, dead] = self._project_out(self._random(block.shape[1])[:, dead])
        # Again: the first time, rounding grew by as much as the columns of the block lean on one another.
        directions, turn = torch.linalg.qr(self._project_out(directions))
        self.coupling = turn @ coupling
        return directions

    def _project_out(self, block: Tensor) -> Tensor:
        basis = self.basis[: self.size]
        return block - basis.T @ (basis @ block)

    def _random(self, columns: int) -> Tensor:
        block = torch.randn(self.weight.shape[1], columns, generator=self._generator, dtype=torch.float32)
        return block.to(self.weight.device, self.dtype)

    def _times(self, matrix: Tensor, block: Tensor) -> Tensor:
        return (matrix @ block.to(matrix.dtype)).to(self.dtype)
