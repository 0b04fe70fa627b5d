"""Truncated singular value decomposition, exact and fast, the same bits at every call.

The sketch of the fast form is drawn on the CPU from the seed and the tensor's name, so results
depend neither on the order of the tensors nor on the device's generator. Signs are fixed, so equal
decompositions are equal files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pissa.checks import tolerance_of
from pissa.linalg.lanczos import FLOOR, Triplets, certified_triplets, leading_triplets
from pissa.randomness import tensor_seed

SMALL = 384
"""Up to this size LAPACK is as quick as certifying."""
ORDINARY = (1e-6, 1e6)
"""Largest entries between these need no scaling."""


@dataclass(frozen=True)
class Certificate:
    """What is known of an exact decomposition: from computed residuals for "lanczos".

    For "lapack" nothing is computed: the bounds are its rounding level, by backward stability.

    Attributes:
        engine: "lanczos" or "lapack".
        sigma: bound on the error of each singular value, relative to it (to the largest where it is
            below 1e-6 of it).
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

    def leading(self, rank: int) -> LowRank:
        """The first `rank` of the triplets."""
        return replace(self, U=self.U[:, :rank], S=self.S[:rank], Vh=self.Vh[:rank])

    def balanced(self, scale: float = 1.0, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``left = U sqrt(S / scale)``, ``right = sqrt(S / scale) Vh``, so that scale * left @
        right = U S Vh.

        Where a singular value is zero both factors would be, and would never learn: there `left` is
        zero and `right` the singular vector itself (the product is the same, its gradient is not).

        Args:
            scale: alpha / rank.
            largest: the matrix's largest singular value, against which zero is judged; S[0] by
                default.
        """
        floor = torch.finfo(self.S.dtype).eps * max(self.U.shape[0], self.Vh.shape[1])
        dead = self.S <= floor * (self.S[0] if largest is None else largest)
        root = (self.S / scale).sqrt()
        left = torch.where(dead, 0.0, self.U * root)
        return left, torch.where(dead[:, None], self.Vh, root[:, None] * self.Vh)


def truncated_svd(
    weight: Tensor,
    rank: int,
    accuracy: str | float = "exact",
    *,
    seed: int = 0,
    name: str = "",
    near: LowRank | None = None,
) -> LowRank:
    """The `rank` leading singular triplets of a matrix.

    Args:
        weight: [m, n], any float dtype, finite; returned in at least float32, on its device.
        rank: 1 to min(m, n).
        accuracy: "fast" (no check; on the spectra of trained weights the energy missed is below 0.1
            % of the optimal tail), "exact" (singular values and captured energy certified to 1e-5),
            or a tolerance for the certificate, 5e-6 to 1. Where no certificate is met LAPACK
            decides.
        seed: fixes the random start together with `name`.
        name: the tensor's name.
        near: that of a matrix nearby, from which "fast" starts: two blocks instead of many.

    Raises:
        InputError: unknown accuracy.
    """
    tolerance, seed = tolerance_of(accuracy), tensor_seed(seed, name)
    scaled, exponent = _ordinary(weight)
    if scaled is None:
        return _zero(weight, rank)
    if tolerance is not None:
        return _signed(*_certified(scaled, rank, seed, tolerance), exponent)
    triplets = leading_triplets(scaled, rank, seed, (near.U, near.S, near.Vh) if near else None)
    return _signed(triplets, None, exponent) if triplets else full_svd(weight).leading(rank)


def full_svd(weight: Tensor) -> LowRank:
    """All min(m, n) singular triplets, by LAPACK in at least float32."""
    scaled, exponent = _ordinary(weight)
    if scaled is None:
        return _zero(weight, min(weight.shape))
    triplets, _ = _lapack(
        scaled, min(weight.shape), torch.promote_types(weight.dtype, torch.float32)
    )
    return _signed(triplets, None, exponent)


def _ordinary(weight: Tensor) -> tuple[Tensor | None, float]:
    """The weight and 1, or scaled by a power of two, which rounds nothing: squares of 1e30 overflow. None if zero."""
    largest = max(abs(float(extreme)) for extreme in torch.aminmax(weight))
    if largest == 0.0:
        return None, 1.0
    if ORDINARY[0] < largest < ORDINARY[1]:
        return weight, 1.0
    exponent = 2.0 ** (math.frexp(largest)[1] - 1)
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) / exponent, exponent


def _certified(
    weight: Tensor, rank: int, seed: int, tolerance: float
) -> tuple[Triplets, Certificate]:
    compute = torch.promote_types(weight.dtype, torch.float32)
    found = certified_triplets(weight, rank, seed, tolerance) if min(weight.shape) > SMALL else None
    if found:
        triplets, certificate = found[0], Certificate("lanczos", *found[1])
    else:
        triplets, certificate = _lapack(weight, rank, compute, tolerance)
    U, S, Vh = (part.to(compute) for part in triplets)
    return (U, S, Vh), certificate


def _lapack(
    weight: Tensor, rank: int, dtype: torch.dtype, tolerance: float = math.inf
) -> tuple[Triplets, Certificate]:
    """The full decomposition, cut off; in float64 if that of `dtype` does not meet the tolerance."""
    # CUDA's default is Jacobi's method, which stops where singular values are off by 5e-4 in
    # float32.
    driver = "gesvd" if weight.is_cuda else None
    U, S, Vh = torch.linalg.svd(weight.to(dtype), full_matrices=False, driver=driver)
    # How far from the given matrix the decomposed one is; three times what was seen from 128 to
    # 4096 columns.
    noise = 4 * torch.finfo(dtype).eps * max(weight.shape) ** 0.25
    returned = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
    first, last, energies = float(S[0]), float(S[rank - 1]), S.double().square()
    energy = float(energies.sum())
    tail = max(float(energies[rank:].sum()), float(torch.finfo(torch.float32).eps) * energy)
    sigma = noise * first / (last if last > FLOOR * first else first) + returned
    gap = noise * (4 * first / tail**0.5 + energy / tail) + returned
    if max(sigma, gap) > tolerance and dtype != torch.float64:
        return _lapack(weight, rank, torch.float64)
    return (U[:, :rank], S[:rank], Vh[:rank]), Certificate("lapack", sigma, gap)


def _signed(triplets: Triplets, certificate: Certificate | None, exponent: float) -> LowRank:
    """With the sign of each pair fixed: in its left vector the entry of largest magnitude is positive."""
    U, S, Vh = triplets
    picked = U.gather(0, U.abs().argmax(dim=0, keepdim=True))[0]
    signs = torch.where(picked < 0, -1.0, 1.0).to(U)
    return LowRank(
        (U * signs).contiguous(), S * exponent, (signs[:, None] * Vh).contiguous(), certificate
    )


def _zero(weight: Tensor, rank: int) -> LowRank:
    """Any orthonormal bases serve a zero matrix; unit vectors are the ones that need no arithmetic."""
    (rows, columns), dtype = weight.shape, torch.promote_types(weight.dtype, torch.float32)
    return LowRank(
        torch.eye(rows, rank, dtype=dtype, device=weight.device),
        torch.zeros(rank, dtype=dtype, device=weight.device),
        torch.eye(rank, columns, dtype=dtype, device=weight.device),
    )
