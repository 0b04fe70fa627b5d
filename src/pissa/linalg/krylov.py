"""An orthonormal basis of the block Krylov space of W^T W, grown a block at a time, with W's image of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SOUND = 0.1
"""Least pivot of normalised columns with which Cholesky keeps them orthonormal nearly to rounding."""
PANEL = 256
"""Rows of the matrix that are multiplied from both sides while they are in the cache."""
DEAD = 16
"""A new direction below so many rounding errors of its block is none; a random one takes its place."""


def thin_qr(block: Tensor) -> tuple[Tensor, Tensor]:
    """Q [m, k] with orthonormal columns and R [k, k], Q R = block; by Cholesky if that is sound."""
    norms = torch.linalg.vector_norm(block, dim=0).clamp_min(torch.finfo(block.dtype).tiny)
    scaled = block / norms
    factor, failed = torch.linalg.cholesky_ex((scaled.T @ scaled).double())
    if failed or factor.diagonal().min() < SOUND:
        Q, R = torch.linalg.qr(block)
        return Q, R
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return scaled @ inverse.T.to(block.dtype), factor.T.to(block.dtype) * norms


class KrylovSpace:
    """The space spanned by X, G X, G^2 X, ... with G = W^T W and a seeded random block X.

    Every block is projected and orthonormalised twice, which keeps the basis orthonormal to
    rounding. A matrix with no directions to give, or fewer copies of a singular value than it has,
    gets fresh random ones.

    Attributes:
        size: columns in use.
        basis: [capacity, n], an orthonormal row for each column of the space.
        images: [capacity, m], W times each of them, in the precision of the products.
        projected: [capacity, capacity], basis G basis^T.
        coupling: [b, b], what G takes out of the space from its last block of b; see `outside`.

    Args:
        weight: [m, n], any float dtype; widened a few rows at a time where the products are wider.
        products: dtype of the products, float32, float64 or bfloat16; everything else is in at
            least float32.
        block: columns that are added at a time, b.
        capacity: most columns.
        seed: of the random blocks, drawn on the CPU.
    """

    def __init__(
        self, weight: Tensor, products: torch.dtype, block: int, capacity: int, seed: int
    ) -> None:
        rows, columns = weight.shape
        self.weight, self.products, self.size = weight, products, 0
        self.dtype = torch.promote_types(products, torch.float32)
        self._generator = torch.Generator().manual_seed(seed)

        def empty(width: int) -> Tensor:
            return torch.empty(capacity, width, dtype=self.dtype, device=weight.device)

        self.basis, self.images, self.projected = empty(columns), empty(rows), empty(capacity)
        self._returned: Tensor | None = None
        self._outside: Tensor
        self.follow(None, block)

    def grow(self, size: int) -> None:
        """Add blocks until the space has `size` columns or a few more."""
        while self.size < size:
            self._append(self.outside())

    def follow(self, block: Tensor | None, fresh: int = 0) -> None:
        """Go on from a block [n, b] and `fresh` random columns, instead of from where the space ends."""
        random = self._random(fresh)
        self._returned = None
        self._outside = self._orthonormal(
            random if block is None else torch.cat([block, random], dim=1)
        )

    def outside(self) -> Tensor:
        """The next block [n, b]: G times the last one = (inside the space) + outside @ coupling."""
        if self._returned is not None:
            self._outside, self._returned = self._orthonormal(self._returned), None
        return self._outside

    def times(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """(W block [m, b], W^T W block [n, b]) in one pass over the matrix."""
        narrow = block.to(self.products)
        image = torch.empty(len(self.weight), block.shape[1], dtype=self.dtype, device=block.device)
        returned = torch.zeros_like(block)
        for rows, out in self._panels(image):
            out.copy_(rows @ narrow)
            returned += rows.T @ out.to(self.products)
        return image, returned

    def transposed_times(self, image: Tensor) -> Tensor:
        """``W^T image``, [n, b]."""
        returned = torch.zeros(
            self.weight.shape[1], image.shape[1], dtype=self.dtype, device=image.device
        )
        for rows, part in self._panels(image):
            returned += rows.T @ part.to(self.products)
        return returned

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values [size] of G, descending, and the turn [size, size] that makes the basis their vectors."""
        projected = self.projected[: self.size, : self.size]
        # CUDA's float32 routine for these sizes is Jacobi's, whose vectors are less orthonormal
        # than rounding asks.
        values, turn = torch.linalg.eigh(projected.double() if projected.is_cuda else projected)
        return values.to(self.dtype).flip(0), turn.to(self.dtype).flip(1)

    def turn_from_images(self) -> Tensor:
        """The turn of `ritz` without squaring: right for singular values down to rounding, not to its root."""
        R = torch.linalg.qr(self.images[: self.size].T, mode="r").R
        turn: Tensor = torch.linalg.svd(R.double()).Vh.T
        return turn.to(self.dtype)

    def turned(self, turn: Tensor) -> tuple[Tensor, Tensor]:
        """(basis [n, k], images [m, k]) in the directions `turn` [size, k]."""
        return self.basis[: self.size].T @ turn, self.images[: self.size].T @ turn

    def _append(self, block: Tensor) -> None:
        image, self._returned = self.times(block)
        old, self.size = self.size, self.size + block.shape[1]
        self.basis[old : self.size], self.images[old : self.size] = block.T, image.T
        gram = self.images[: self.size] @ image
        (
            self.projected[: self.size, old : self.size],
            self.projected[old : self.size, : self.size],
        ) = gram, gram.T

    def _orthonormal(self, block: Tensor) -> Tensor:
        """An orthonormal block spanning what `block` has outside the space; sets `coupling`."""
        scale = torch.linalg.vector_norm(block, dim=0).max()
        directions, coupling = thin_qr(self._project_out(block))
        dead = coupling.diagonal().abs() <= DEAD * torch.finfo(self.dtype).eps * scale
        if dead.any():
            directions[:, dead] = self._project_out(self._random(block.shape[1])[:, dead])
        # Again: the first time, rounding grew by as much as the columns of the block lean on one
        # another.
        directions, turn = thin_qr(self._project_out(directions))
        self.coupling = turn @ coupling
        return directions

    def _project_out(self, block: Tensor) -> Tensor:
        basis = self.basis[: self.size]
        return block - basis.T @ (basis @ block)

    def _random(self, columns: int) -> Tensor:
        block = torch.randn(
            self.weight.shape[1], columns, generator=self._generator, dtype=torch.float32
        )
        return block.to(self.weight.device, self.dtype)

    def _panels(self, image: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the matrix in the dtype of the products, and the same rows of `image`."""
        # Whole where the device is not fed from a cache, or its units want large products.
        fed = image.device.type == "cpu" and self.products != torch.bfloat16
        size = PANEL if fed else len(image)
        same = self.weight.dtype == self.products
        # One buffer for all: mapping a new one for every panel takes as long as its products.
        buffer = self.weight if same else torch.empty_like(self.weight[:size], dtype=self.products)
        pieces = zip(torch.split(self.weight, size), torch.split(image, size), strict=True)
        for rows, part in pieces:
            yield rows if same else buffer[: len(rows)].copy_(rows), part
