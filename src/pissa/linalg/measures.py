"""What a split kept: singular values of a thin product, shares of energy, relative errors."""

from __future__ import annotations

import torch
from torch import Tensor


def product_singular_values(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Singular values of ``scale * left [m, k] @ right [k, n]``, descending, without forming it, in their dtype."""
    left_small = torch.linalg.qr(left, mode="r").R
    right_small = torch.linalg.qr(right.T, mode="r").R
    return scale * torch.linalg.svdvals(left_small.double() @ right_small.double().T).to(left.dtype)


def frobenius(matrix: Tensor) -> float:
    """The Frobenius norm; one pass in the matrix's dtype unless the squares would leave its range."""
    flat = matrix.reshape(-1)
    square = float(torch.dot(flat, flat))
    if 1e-30 < square < 1e30:
        return square**0.5
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
