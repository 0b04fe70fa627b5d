"""Chebyshev-filtered subspace iteration: the leading singular triplets in a few products with the matrix.

The subspace is improved by a polynomial of W^T W that is small on the part of the spectrum below the subspace and
grows steeply above it (Zhou, Saad, Tiago, Chelikowsky 2006). Products run in bf16 where the device has units for it:
they only steer the subspace, and what is returned comes from one last projection in the compute dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 2
"""Filters after the first power step; each is a polynomial of degree 2 in W^T W, four products with the matrix."""
BLOCK_ROWS = 512
"""Rows that the last projection widens at a time, so that they stay in the cache."""


def leading_triplets(weight: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate the `width` leading singular triplets.

    Args:
        weight: [m, n] with entries of ordinary size, any float dtype; computed in at least float32.
        width: 1 to min(m, n); the last of the triplets are rough, so ask for more than are needed.
        seed: of the random start, drawn on the CPU.

    Returns:
        U [m, width], S [width] descending, Vh [width, n].
    """
    if weight.shape[0] < weight.shape[1]:
        V, S, Uh = leading_triplets(weight.T, width, seed)
        return Uh.T, S, V.T
    compute = torch.promote_types(weight.dtype, torch.float32)
    rough = weight.to(_product_dtype(weight))
    start = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = _orthonormal(_gram_product(rough, start.to(weight.device, compute)))
    for _ in range(ROUNDS):
        image = rough @ basis.to(rough.dtype)
        ritz = torch.linalg.eigvalsh(image.to(compute).T @ image.to(compute))
        if ritz[0] <= torch.finfo(compute).eps * ritz[-1]:
            break  # the matrix has no more than `width` directions, and the basis holds them
        # Degree 2: T_2(t) = 2 t^2 - 1 with t mapping [0, smallest Ritz value] to [-1, 1].
        slope = 2 / ritz[0]
        first = slope * (rough.T @ image).to(compute) - basis
        basis = _orthonormal(2 * (slope * _gram_product(rough, first) - first) - basis)
    image = _project(weight, basis)
    if _same_values(rough, weight):
        return _triplets(image, basis)
    # The products saw a rounded matrix: half a step more with all of its bits.
    left = _orthonormal(image)
    V, S, Uh = _triplets(weight.T @ left, left)
    return Uh.T, S, V.T


def _triplets(image: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets of ``image @ basis.T`` for an orthonormal basis [n, k] and image = W basis [m, k]."""
    wide = image.double()
    squares, turn = torch.linalg.eigh(wide.T @ wide)
    if squares[0] <= 1e-10 * squares[-1]:
        # A Gram matrix says nothing of values this far below the largest.
        U, S, Vh = torch.linalg.svd(image, full_matrices=False)
        return U, S, Vh @ basis.T
    S, turn = squares.flip(0).sqrt().to(image.dtype), turn.flip(1).to(image.dtype)
    return (image @ turn) / S, S, (basis @ turn).T


def _product_dtype(weight: Tensor) -> torch.dtype:
    """bf16 where the device multiplies it faster than float32."""
    fast = weight.is_cuda or torch.cpu._is_avx512_bf16_supported()
    return (
        torch.bfloat16 if fast and weight.dtype != torch.float64 else torch.promote_types(weight.dtype, torch.float32)
    )


def _same_values(rough: Tensor, weight: Tensor) -> bool:
    """Whether rounding for the products lost nothing; one row settles it for most weights that are not bf16."""
    return rough.dtype == weight.dtype or all(
        torch.equal(rough[rows].to(weight.dtype), weight[rows]) for rows in (slice(0, 1), slice(1, None))
    )


def _gram_product(weight: Tensor, block: Tensor) -> Tensor:
    """``W^T W block`` in the weight's dtype, given back in the block's."""
    return (weight.T @ (weight @ block.to(weight.dtype))).to(block.dtype)


def _project(weight: Tensor, basis: Tensor) -> Tensor:
    """``W basis`` in the basis' dtype."""
    if weight.dtype == basis.dtype:
        return weight @ basis
    return torch.cat([rows.to(basis.dtype) @ basis for rows in weight.split(BLOCK_ROWS)])


def _orthonormal(block: Tensor) -> Tensor:
    """An orthonormal basis of the columns: Cholesky of the Gram matrix where that is sound, else Householder."""
    scaled = block / torch.linalg.vector_norm(block, dim=0).clamp_min(torch.finfo(block.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex((scaled.T @ scaled).double())
    pivots = factor.diagonal()
    if failed or pivots.min() < 1e-2:
        return torch.linalg.qr(block).Q
    identity = torch.eye(len(pivots), dtype=factor.dtype, device=factor.device)
    return scaled @ torch.linalg.solve_triangular(factor, identity, upper=False).T.to(block.dtype)
