"""The leading singular triplets from a block Krylov space: approximate at a fixed size, or grown
until certified.

The space of W^T W started from a random block holds the leading right singular vectors long before
a power iteration of the same cost does (Golub and Underwood 1977; bounds for random blocks in Musco
and Musco 2015), and narrow blocks reach furthest. Products run in bf16 where the device has units
for it and nothing is certified: what is returned comes from one last projection in the compute
dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pissa.linalg.krylov import KrylovSpace, thin_qr

Triplets = tuple[Tensor, Tensor, Tensor]
Bounds = tuple[float, float]
"""Of the relative error of each singular value, and of the energy missed as a share of the tail."""

BLOCK = (3 / 8, 16, 64)
"""Columns of a block: share of the rank, least, most. Narrower products waste the processor, wider ones reach less."""
SIZE = (2.1, 3.0)
"""Columns of the fast form's space: so many times the rank, and so many blocks."""
FIRST_SIZE, STEEP_SIZE = (2.6, 2.0), (1.8, 2.0)
"""The same of the space that is first tried for a certificate, and where the spectrum falls steeply."""
FRESH = 16
"""Random columns beside those of triplets to start from."""
DROWNED = {torch.bfloat16: 1e-3, torch.float32: 1e-5}
"""A squared singular value below this share of the largest is lost in the rounding of such products."""
DROWNED_FOR_BOUNDS = {torch.float32: 3e-4}
ROUNDING = 32
"""So many units of rounding, at least, are added to a certified bound, for the arithmetic that the
derivation takes as exact."""
FLOOR = 1e-6
"""Singular values below this share of the largest are certified relative to that share."""
BESIDE = 1 / 8
"""The bounds lean on the pair this far into the space's extra columns; further out pairs have not settled."""
PROBE, PROBES = 16, 2
"""Columns of a fresh random start, and blocks from it, that must find nothing new before a certificate is given."""
MOST = 0.9
"""Share of the matrix's columns beyond which LAPACK does it."""


def leading_triplets(
    weight: Tensor, rank: int, seed: int, near: Triplets | None = None
) -> Triplets | None:
    """The `rank` leading singular triplets, approximately.

    Args:
        weight: [m, n] with entries of ordinary size, any float dtype; computed in at least float32.
        rank: 1 to min(m, n).
        seed: of the random blocks, drawn on the CPU.
        near: triplets of a matrix nearby to start from.

    Returns:
        U [m, rank], S [rank] descending, Vh [rank, n]; None where the space would be nearly the
        whole one.
    """
    if weight.shape[0] < weight.shape[1]:
        found = leading_triplets(weight.T, rank, seed, near and _swapped(near))
        return found and _swapped(found)
    size = _size(rank, SIZE) if near is None else 2 * (near[0].shape[1] + FRESH)
    if size > MOST * weight.shape[1]:
        return None
    if near is None:
        space = _space(weight, _product_dtypes(weight), DROWNED, rank, size, seed)
    else:
        space = KrylovSpace(weight, _product_dtypes(weight)[0], FRESH, size, seed)
        space.follow(near[2].T, FRESH)
    space.grow(size)
    values, turn = space.ritz()
    if values[rank - 1] < DROWNED[torch.float32] * values[0]:
        turn = space.turn_from_images()
    basis, image = space.turned(turn[:, :rank])
    if space.products != torch.bfloat16:
        return _rotated(image, basis)
    # These products only steered. One pass with all bits gives the images, and half a step more
    # beside them.
    space.products = space.dtype
    image, returned = space.times(basis)
    left, R = thin_qr(image)
    return _swapped(
        _rotated(torch.linalg.solve_triangular(R, returned, upper=True, left=False), left)
    )


def certified_triplets(
    weight: Tensor, rank: int, seed: int, tolerance: float
) -> tuple[Triplets, Bounds] | None:
    """The `rank` leading singular triplets with bounds on what they miss, both at most `tolerance`.

    With Ritz values t_1 >= t_2 >= ... of G = W^T W, the first k > r Ritz vectors V, their residuals
    E = G V - V diag(t), and u at least the largest eigenvalue of G on the complement of V,

        G  <=  diag(t) + E^T E / c  beside  u + c           for any c > 0      (in the order of symmetric matrices)

    so the i-th squared singular value is at most max(u + c, the i-th eigenvalue of diag(t) + E^T E
    / c), and at least t_i. Residuals are computed, not taken from the recurrence. u is t_(k+1) and
    its residual; that nothing above it is missed rests on the random start and on a probe from a
    fresh one.

    Args:
        weight: as for `leading_triplets`.
        rank: likewise.
        seed: likewise.
        tolerance: for both bounds, at least 1e-6.

    Returns:
        The triplets and their bounds, or None where the spectrum falls too slowly for a space
        smaller than the matrix.
    """
    if weight.shape[0] < weight.shape[1]:
        found = certified_triplets(weight.T, rank, seed, tolerance)
        return found and (_swapped(found[0]), found[1])
    most, block = int(MOST * weight.shape[1]), _block(rank)
    if _size(rank, FIRST_SIZE) > most:
        return None
    capacity = most + PROBES * PROBE + block
    space = _space(weight, [torch.float32, torch.float64], DROWNED_FOR_BOUNDS, rank, capacity, seed)
    size = _size(rank, FIRST_SIZE if space.products == torch.float32 else STEEP_SIZE)
    norms = torch.linalg.vector_norm(
        weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32)
    )
    energy = float(norms.double().square().sum())
    reached: list[tuple[int, float]] = []
    while size <= most:
        space.grow(size)
        bounds = _expected_bounds(space, rank, energy, tolerance)
        if max(bounds) <= tolerance:
            space.follow(None, PROBE)
            space.grow(space.size + PROBES * PROBE)
            triplets, residual, bounds = _bounded_triplets(space, rank, energy, tolerance)
            if max(bounds) <= tolerance:
                return triplets, bounds
            space.follow(
                residual @ torch.linalg.eigh(residual.T @ residual).eigenvectors[:, -block:]
            )
        reached.append((space.size, max(bounds)))
        size = _next_size(reached, tolerance, block)
        if space.size < most:
            size = min(size, most)
    return None


def _expected_bounds(space: KrylovSpace, rank: int, energy: float, tolerance: float) -> Bounds:
    """What the recurrence says of the residuals, at no product."""
    values, turn = space.ritz()
    space.outside()
    pairs = _pairs(rank, space.size)
    residual = space.coupling @ turn[-len(space.coupling) :, :pairs]
    return _bounds(values[:pairs], residual.T @ residual, rank, energy, tolerance)


def _bounded_triplets(
    space: KrylovSpace, rank: int, energy: float, tolerance: float
) -> tuple[Triplets, Tensor, Bounds]:
    """The triplets, the residuals [n, k + 1] of the pairs that the bounds lean on, and the bounds."""
    basis, image = space.turned(space.ritz()[1][:, : _pairs(rank, space.size)])
    U, S, Vh = _rotated(image, basis)
    residual = space.transposed_times(U * S) - Vh.T * S.square()
    sigma, gap = _bounds(S.square(), residual.T @ residual, rank, energy, tolerance)
    returned = torch.finfo(torch.float32).eps
    rounding = max(ROUNDING * torch.finfo(S.dtype).eps, returned, _inexactness(S, Vh, residual))
    bounds = sigma + rounding, gap + rounding
    return (U[:, :rank], S[:rank], Vh[:rank]), residual, bounds


def _inexactness(S: Tensor, Vh: Tensor, residual: Tensor) -> float:
    """How far singular values can be from those of W on the span of Vh, relative to each.

    The bounds take for granted that Vh is orthonormal and that Vh^T diag(S^2) Vh is G on its span.
    Here both are looked at, since not every eigensolver and every product of every device is as
    exact as it should be. A relative change of a Gram matrix by x changes its eigenvalues by at
    most as much (Ostrowski 1959), their roots by x / 2.
    """
    turned = (Vh @ Vh.T).double()
    turned.diagonal().sub_(1)
    scale = S.double().clamp_min(FLOOR * float(S[0]))
    within = (Vh @ residual).double() / scale / scale[:, None]
    return sum(
        float(torch.linalg.eigvalsh((part + part.T) / 2).abs().max()) / 2
        for part in (turned, within)
    )


def _bounds(values: Tensor, squares: Tensor, rank: int, energy: float, tolerance: float) -> Bounds:
    """The bounds of `certified_triplets`.

    Args:
        values: [k + 1] Ritz values, descending.
        squares: [k + 1, k + 1] = E^T E of their residuals.
        rank: r.
        energy: of the matrix, |W|_F^2.
        tolerance: how far c may lift u + c above t_r, relative to t_r.
    """
    values, squares = values.double().clamp_min(0), squares.double()
    kept = values[:-1]
    rest = float(values[-1] + squares[-1, -1].clamp_min(0).sqrt())
    last, floor = float(kept[rank - 1]), FLOOR**2 * float(kept[0])
    room = max(last - rest, tolerance * last, floor)
    highest = (
        torch.linalg.eigvalsh(torch.diag(kept) + squares[:-1, :-1] / room)
        .flip(0)[:rank]
        .clamp_min(rest + room)
    )
    kept = kept[:rank]
    missed = (highest - kept).clamp_min(0)
    scale = torch.where(kept > floor, kept, kept[0])
    tail = max(energy - float(kept.sum()), float(torch.finfo(torch.float32).eps) * energy)
    return float(((highest.sqrt() - kept.sqrt()) / scale.sqrt()).max()), float(missed.sum()) / tail


def _next_size(reached: list[tuple[int, float]], tolerance: float, block: int) -> int:
    """Where the bounds should meet the tolerance if their logarithm goes on falling as it did."""
    size, bound = reached[-1]
    step = size / 4
    if len(reached) > 1:
        before, higher = reached[-2]
        if math.isfinite(higher) and bound < higher:
            step = (size - before) * math.log(bound / tolerance) / math.log(higher / bound)
    return size + int(min(max(step, block), size / 3))


def _space(
    weight: Tensor,
    dtypes: list[torch.dtype],
    drowned: dict[torch.dtype, float],
    rank: int,
    capacity: int,
    seed: int,
) -> KrylovSpace:
    """A space begun in the first of the dtypes in which the wanted singular values do not drown, or the last."""
    block = _block(rank)
    for dtype in dtypes:
        space = KrylovSpace(weight, dtype, block, capacity, seed)
        if dtype != dtypes[-1]:
            space.grow(rank + 2 * block)
            values = space.ritz()[0]
            if values[rank - 1] < drowned[dtype] * values[0]:
                continue
        break
    return space


def _block(rank: int) -> int:
    """Columns of a block, a multiple of 16."""
    share, least, most = BLOCK
    return min(max(math.ceil(share * rank / 16) * 16, least), most)


def _size(rank: int, law: tuple[float, float]) -> int:
    """Columns of the space, whole blocks."""
    return math.ceil(law[0] * rank / _block(rank) + law[1]) * _block(rank)


def _pairs(rank: int, size: int) -> int:
    """How many Ritz pairs the bounds look at: k + 1."""
    return rank + max(int(BESIDE * (size - rank)), 1) + 1


def _rotated(image: Tensor, basis: Tensor) -> Triplets:
    """The singular triplets of ``image @ basis.T`` for an orthonormal basis [n, k] and image = W basis [m, k]."""
    Q, R = thin_qr(image)
    U, S, Vh = torch.linalg.svd(R.double())
    return Q @ U.to(Q.dtype), S.to(Q.dtype), Vh.to(Q.dtype) @ basis.T


def _swapped(triplets: Triplets) -> Triplets:
    """Those of the transposed matrix."""
    U, S, Vh = triplets
    return Vh.T, S, U.T


def _product_dtypes(weight: Tensor) -> list[torch.dtype]:
    """bf16 first where the device multiplies it faster than float32."""
    if weight.dtype == torch.float64:
        return [torch.float64]
    fast = weight.is_cuda or torch.cpu._is_avx512_bf16_supported()
    return [torch.bfloat16, torch.float32] if fast else [torch.float32]
