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
from pissa.linalg.subspace import Triplets, certified_triplets, leading_triplets

EXTRA = 32
"""Least number of columns beyond the rank in the fast form; a third of the rank where that is more."""
TOLERANCE = 1e-5
"""What "exact" certifies, for the singular values and for the energy."""
SMALL = 512
"""Below this size LAPACK is as quick as certifying."""
ORDINARY = (1e-6, 1e6)
"""Largest entries between these need no scaling."""


@dataclass(frozen=True)
class Certificate:
    """What is known of an exact decomposition: from computed residuals for "subspace".

    For "lapack" nothing is computed; the bounds are its rounding level, by backward stability, relative to the largest
    singular value.

    Attributes:
        engine: "subspace" or "lapack".
        sigma: bound on the relative error of each singular value.
        gap: bound on the energy missed, as a share of the energy of the optimal tail.
    """

    engine: str
    sigma: float
    gap: float


@dataclass(frozen=True, eq=False)
class LowRank:
    """Leading singular triplets, ``U [m, k]``, ``S [k]`` descending, ``Vh [k, n]``; a certificate if exact."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    certificate: Certificate | None = None

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
        accuracy: "exact" (singular values and captured energy certified to 1e-5; LAPACK where the spectrum falls too
            slowly, or the matrix is small) or "fast" (the energy missed is below 0.1 % of the optimal tail on the
            spectra of trained weights). Both in `pissa.linalg.subspace`.
        seed: fixes the random start together with `name`.
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
    solve = _fast if accuracy == "fast" else _exact
    (U, S, Vh), certificate = solve(scaled, rank, tensor_seed(seed, name))
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    signs = _signs(U)
    return LowRank((U * signs).contiguous(), S * exponent, (signs[:, None] * Vh).contiguous(), certificate)


def _fast(weight: Tensor, rank: int, seed: int) -> tuple[Triplets, Certificate | None]:
    width = rank + max(EXTRA, rank // 3)
    if 2 * width >= min(weight.shape):
        return _lapack(weight)
    return leading_triplets(weight, width, seed), None


def _exact(weight: Tensor, rank: int, seed: int) -> tuple[Triplets, Certificate | None]:
    width = rank + max(EXTRA, 3 * rank // 4)
    if min(weight.shape) >= max(SMALL, 3 * width):
        found = certified_triplets(weight, rank, width, seed, TOLERANCE)
        if found:
            return found[0], Certificate("subspace", found[1], found[2])
    return _lapack(weight)


def _lapack(weight: Tensor) -> tuple[Triplets, Certificate]:
    compute = torch.promote_types(weight.dtype, torch.float32)
    noise = torch.finfo(compute).eps * max(weight.shape) ** 0.5
    return torch.linalg.svd(weight.to(compute), full_matrices=False), Certificate("lapack", noise, noise)


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
