"""Chebyshev-filtered subspace iteration: the leading singular triplets in a few products with the matrix.

The subspace is improved by a polynomial of W^T W that is small on the part of the spectrum below the subspace and
grows steeply above it (Zhou, Saad, Tiago, Chelikowsky 2006). Products run in bf16 where the device has units for it:
they only steer the subspace, and what is returned comes from one last projection in the compute dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]

ROUNDS = 2
"""Filters after the first power step; each is a polynomial of degree 2 in W^T W, four products with the matrix."""
ROUGH_ROUNDS, SHARP_ROUNDS = 4, 3
"""For certified triplets: filters in the product dtype, then at most so many in the compute dtype."""
SLOWEST = 0.95
"""A last Ritz value above this share of the rank's own says that the spectrum is too flat for a subspace."""
BLOCK_ROWS = 512
"""Rows that the last projection widens at a time, so that they stay in the cache."""


def leading_triplets(weight: Tensor, width: int, seed: int) -> Triplets:
    """Approximate the `width` leading singular triplets.

    Args:
        weight: [m, n] with entries of ordinary size, any float dtype; computed in at least float32.
        width: 1 to min(m, n); the last of the triplets are rough, so ask for more than are needed.
        seed: of the random start, drawn on the CPU.

    Returns:
        U [m, width], S [width] descending, Vh [width, n].
    """
    if weight.shape[0] < weight.shape[1]:
        return _swapped(leading_triplets(weight.T, width, seed))
    rough = weight.to(_product_dtype(weight))
    basis = _filtered(rough, _start(rough, weight, width, seed), ROUNDS)
    image = _project(weight, basis)
    if _same_values(rough, weight):
        return _triplets(image, basis)
    # The products saw a rounded matrix: half a step more with all of its bits.
    left = _orthonormal(image)
    return _swapped(_triplets(weight.T @ left, left))


def certified_triplets(
    weight: Tensor, rank: int, width: int, seed: int, tolerance: float
) -> tuple[Triplets, float, float] | None:
    """The `rank` leading triplets with bounds on what they miss, or None where the spectrum falls too slowly.

    With Ritz values t_1 >= t_2 >= ... of G = W^T W, Ritz vectors V and residuals E_k = G V_k - V_k T_k of the first k,

        G  <=  diag(T_k + E_k^T E_k / c,  t_(k+1) + c)      for any c > 0      (in the order of symmetric matrices)

    so that with c = t_r - t_(k+1) a squared singular value exceeds the one found by at most |E_k|_2^2 / c, and their
    sum over the first r by at most |E_k|_F^2 / c. The best k from r up is taken; residuals are computed in the compute
    dtype. That nothing outside the subspace is above t_(k+1) rests on its random start, whose chance to miss a
    direction is negligible with tens of extra columns.

    Args:
        weight: as for `leading_triplets`.
        rank: how many triplets are wanted.
        width: columns of the subspace, above `rank`.
        seed: of the random start.
        tolerance: for the relative error of each singular value, and for the energy missed relative to the tail.

    Returns:
        The triplets (of `rank`), the bound on sigma and the bound on the gap.
    """
    if weight.shape[0] < weight.shape[1]:
        found = certified_triplets(weight.T, rank, width, seed, tolerance)
        return found and (_swapped(found[0]), *found[1:])
    rough = weight.to(_product_dtype(weight))
    basis = _filtered(rough, _start(rough, weight, width, seed), 1)
    ritz = _triplets((rough @ basis.to(rough.dtype)).to(basis.dtype), basis)[1]
    if ritz[-1] > SLOWEST * ritz[rank - 1]:
        return None
    basis = _filtered(rough, basis, ROUGH_ROUNDS - 1)
    wide = weight.to(basis.dtype)
    energy = float(torch.dot(wide.reshape(-1), wide.reshape(-1)))
    for _ in range(SHARP_ROUNDS):
        basis = _filtered(wide, basis, 1)
        U, S, Vh = _triplets(wide @ basis, basis)
        residual = (wide.T @ U) * S - Vh.T * S.square()
        sigma, energy_missed = _bounds(residual, S.double().square(), rank)
        tail = max(energy - float(S[:rank].double().square().sum()), torch.finfo(wide.dtype).eps * energy)
        gap = energy_missed / tail
        if max(sigma, gap) <= tolerance:
            return (U[:, :rank], S[:rank], Vh[:rank]), sigma, gap
    return None


def _bounds(residual: Tensor, squares: Tensor, rank: int) -> tuple[float, float]:
    """(relative error of a singular value, energy missed) as `certified_triplets` derives them; inf where unknown."""
    norms = torch.linalg.vector_norm(residual, dim=0).double().square().cumsum(0)
    room = squares[rank - 1] - squares[rank:]
    excess = torch.where(room > 0, norms[rank - 1 : -1] / room, torch.inf)
    best = int(excess.argmin())
    kept = residual[:, : rank + best]
    largest = float(torch.linalg.eigvalsh((kept.T @ kept).double())[-1])
    if not room[best] > 0:
        return float("inf"), float("inf")
    return largest / float(room[best]) / (2 * float(squares[rank - 1])), float(excess[best])


def _start(rough: Tensor, weight: Tensor, width: int, seed: int) -> Tensor:
    """An orthonormal basis after one power step from a seeded random block."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    block = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _orthonormal(_gram_product(rough, block.to(weight.device, compute)))


def _filtered(weight: Tensor, basis: Tensor, rounds: int) -> Tensor:
    """The basis after `rounds` Chebyshev filters, with products in the weight's dtype."""
    for _ in range(rounds):
        image = weight @ basis.to(weight.dtype)
        ritz = torch.linalg.eigvalsh(image.to(basis.dtype).T @ image.to(basis.dtype))
        if ritz[0] <= torch.finfo(basis.dtype).eps * ritz[-1]:
            break  # the matrix has no more than `width` directions, and the basis holds them
        # Degree 2: T_2(t) = 2 t^2 - 1 with t mapping [0, smallest Ritz value] to [-1, 1].
        slope = 2 / ritz[0]
        first = slope * (weight.T @ image).to(basis.dtype) - basis
        basis = _orthonormal(2 * (slope * _gram_product(weight, first) - first) - basis)
    return basis


def _swapped(triplets: Triplets) -> Triplets:
    """Those of the transposed matrix."""
    U, S, Vh = triplets
    return Vh.T, S, U.T


def _triplets(image: Tensor, basis: Tensor) -> Triplets:
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
