"""What a split kept: singular values of a thin product, shares of energy, relative errors."""

from __future__ import annotations

import torch
from torch import Tensor


def product_singular_values(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Singular values of ``scale * left [m, k] @ right [k, n]``, descending, without forming it; float64."""
    left_small = torch.linalg.qr(left.double(), mode="r").R
    right_small = torch.linalg.qr(right.double().T, mode="r").R
    return scale * torch.linalg.svdvals(left_small @ right_small.T)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|`` in the Frobenius norm; 0 where both are zero."""
    norm = torch.linalg.vector_norm(expected, dtype=torch.float64)
    difference = torch.linalg.vector_norm(got - expected, dtype=torch.float64)
    return float(difference / norm) if norm > 0 else float(difference)
