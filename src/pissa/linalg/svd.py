"""Truncated singular value decomposition, exact and fast, the same bits at every call.

The sketch of the fast form is drawn on the CPU from the seed and the tensor's name, so results depend neither on
the order of the tensors nor on the device's generator. Signs are fixed, so equal decompositions are equal files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa.errors import InputError

ROUNDS = 8
"""Subspace iterations of the fast form: with the extra columns it misses less than 0.1 % of the best energy where
singular values fall like k^-0.5 or faster, and less than 1 % where they hardly fall (k^-0.1)."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """Leading singular triplets, ``U [m, k]``, ``S [k]`` descending, ``Vh [k, n]``."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def balanced(self, scale: float = 1.0, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``left = U sqrt(S / scale)``, ``right = sqrt(S / scale) Vh``, so that scale * left @ right = U S Vh.

        Where a singular value is zero both factors would be, and would never learn: there `left` is zero and
        `right` the singular vector itself (the product is the same, its gradient is not).

        Args:
            scale: alpha / rank.
            largest: the matrix's largest singular value, against which zero is judged; S[0] by default.
        """
        floor = torch.finfo(self.S.dtype).eps * max(self.U.shape[0], self.Vh.shape[1])
        dead = self.S <= floor * (self.S[0] if largest is None else largest)
        root = (self.S / scale).sqrt()
        left = torch.where(dead, 0.0, self.U * root)
        return left, torch.where(dead[:, None], self.Vh, root[:, None] * self.Vh)


def tensor_seed(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and the tensor's name, equal on every machine."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def truncated_svd(weight: Tensor, rank: int, accuracy: str = "exact", *, seed: int = 0, name: str = "") -> LowRank:
    """The `rank` leading singular triplets of a matrix.

    Args:
        weight: [m, n], float32 or float64, finite; computed in its dtype and on its device.
        rank: 1 to min(m, n).
        accuracy: "exact" (LAPACK's divide and conquer) or "fast" (randomised subspace iteration with
            oversampling, Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4).
        seed: fixes the sketch together with `name`.
        name: the tensor's name.

    Raises:
        InputError: unknown accuracy.
    """
    if accuracy not in ("exact", "fast"):
        raise InputError(f"svd is {accuracy!r}, expected 'fast' or 'exact'")
    # Values near 1e30 overflow when squared; a power of two scales without rounding.
    largest = float(weight.abs().max())
    if largest == 0.0:
        return _zero(weight, rank)
    exponent = 2.0 ** torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent.item()
    scaled = weight / exponent
    width = rank + max(16, rank // 2)
    if accuracy == "exact" or 2 * width >= min(weight.shape):
        U, S, Vh = torch.linalg.svd(scaled, full_matrices=False)
    else:
        U, S, Vh = _subspace_iteration(scaled, width, tensor_seed(seed, name))
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    signs = _signs(U)
    return LowRank((U * signs).contiguous(), S * exponent, (signs[:, None] * Vh).contiguous())


def _subspace_iteration(weight: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    if weight.shape[0] < weight.shape[1]:
        V, S, Uh = _subspace_iteration(weight.T, width, seed)
        return Uh.T, S, V.T
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(weight.shape[1], width, generator=generator, dtype=torch.float64)
    basis = sketch.to(weight)
    for _ in range(ROUNDS):
        basis, _ = torch.linalg.qr(weight.T @ (weight @ basis))
    range_basis, small = torch.linalg.qr(weight @ basis)
    small_U, S, small_Vh = torch.linalg.svd(small)
    return range_basis @ small_U, S, small_Vh @ basis.T


def _signs(U: Tensor) -> Tensor:
    """+1 or -1 per column so that its entry of largest magnitude becomes positive."""
    rows = U.abs().argmax(dim=0)
    picked = U[rows, torch.arange(U.shape[1], device=U.device)]
    return torch.where(picked < 0, -1.0, 1.0).to(U)


def _zero(weight: Tensor, rank: int) -> LowRank:
    """Any orthonormal bases serve a zero matrix; unit vectors are the ones that need no arithmetic."""
    rows, columns = weight.shape
    return LowRank(
        torch.eye(rows, rank, dtype=weight.dtype, device=weight.device),
        torch.zeros(rank, dtype=weight.dtype, device=weight.device),
        torch.eye(rank, columns, dtype=weight.dtype, device=weight.device),
    )
