"""What a split kept: singular values of a thin product, shares of energy, relative errors."""

from __future__ import annotations

import torch
from torch import Tensor


def product_singular_values(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Singular values of ``scale * left [m, k] @ right [k, n]``, descending, without forming it, in their dtype."""
    left_small = torch.linalg.qr(left, mode="r").R
    right_small = torch.linalg.qr(right.T, mode="r").R
    small = left_small.double() @ right_small.double().T
    values: Tensor = torch.linalg.svdvals(small)
    return scale * values.to(left.dtype)


def frobenius(matrix: Tensor) -> float:
    """The Frobenius norm; one pass in the matrix's dtype unless the squares would leave its range."""
    flat = matrix.reshape(-1)
    square = float(torch.dot(flat, flat))
    if 1e-30 < square < 1e30:
        return float(square**0.5)
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def nuclear(matrix: Tensor) -> float:
    """The nuclear norm, the sum of the singular values, from the smaller Gram matrix in float64."""
    wide = matrix.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return float(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum())


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|`` in the Frobenius norm; 0 where both are zero."""
    norm, difference = frobenius(expected), frobenius(got - expected)
    return difference / norm if norm > 0 else difference


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles in radians, ascending, between the column spaces of ``first [m, k]`` and ``second [m,
    l]``.

    Cosines are the singular values of ``Q1.T @ Q2``, which says nothing of angles below 1e-8; sines
    are those of what of Q2 lies outside the space of Q1, which says nothing near a right angle.
    Each is taken where it is exact, float64.

    Args:
        first: its columns span the one space; should be of full rank.
        second: the same for the other.

    Returns:
        [min(k, l)].
    """
    one, other = (torch.linalg.qr(matrix.double()).Q for matrix in (first, second))
    if one.shape[1] < other.shape[1]:
        one, other = other, one
    inner = one.T @ other
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(other - one @ inner).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, torch.arccos(cosines), torch.arcsin(sines))


def effective_rank(values: Tensor) -> float:
    """How many singular values carry a matrix: exp of the entropy of their shares; k for k equal ones, 0 for zeros."""
    total = values.double().sum()
    return float(torch.special.entr(values.double() / total).sum().exp()) if total > 0 else 0.0
