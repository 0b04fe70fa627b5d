"""Truncated singular value decomposition, exact and fast, the same bits at every call.

The sketch of the fast form is drawn on the CPU from the seed and the tensor's name, so results depend neither on
the order of the tensors nor on the device's generator. Signs are fixed, so equal decompositions are equal files.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.linalg.subspace import leading_triplets

EXTRA = 32
"""Least number of columns beyond the rank in the fast form; a third of the rank where that is more."""
ORDINARY = (1e-6, 1e6)
"""Largest entries between these need no scaling."""


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
        weight: [m, n], any float dtype, finite; computed in at least float32 on its device.
        rank: 1 to min(m, n).
        accuracy: "exact" (LAPACK's divide and conquer) or "fast" (`pissa.linalg.subspace`; the energy missed is
            below 0.1 % of the optimal tail on the spectra of trained weights).
        seed: fixes the random start of the fast form together with `name`.
        name: the tensor's name.

    Raises:
        InputError: unknown accuracy.
    """
    if accuracy not in ("exact", "fast"):
        raise InputError(f"svd is {accuracy!r}, expected 'fast' or 'exact'")
    compute = torch.promote_types(weight.dtype, torch.float32)
    largest = max(abs(float(extreme)) for extreme in torch.aminmax(weight))
    if largest == 0.0:
        return _zero(weight.to(compute), rank)
    # Values near 1e30 overflow when squared; a power of two scales without rounding.
    exponent = 1.0 if ORDINARY[0] < largest < ORDINARY[1] else 2.0 ** math.frexp(largest)[1]
    scaled = weight if exponent == 1.0 else weight.to(compute) / exponent
    width = rank + max(EXTRA, rank // 3)
    if accuracy == "exact" or 2 * width >= min(weight.shape):
        U, S, Vh = torch.linalg.svd(scaled.to(compute), full_matrices=False)
    else:
        U, S, Vh = leading_triplets(scaled, width, tensor_seed(seed, name))
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    signs = _signs(U)
    return LowRank((U * signs).contiguous(), S * exponent, (signs[:, None] * Vh).contiguous())


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
