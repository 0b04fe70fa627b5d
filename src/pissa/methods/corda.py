"""CorDA: Context-Oriented Decomposition Adaptation (arXiv 2406.05223 and the authors' code).

    C = covariance + 0.01 mean(diag covariance) I,  W C = U S Vh,
    left = U_i sqrt(S_i / s),  right = sqrt(S_i / s) Vh_i inv(C),  frozen = W - s left right

The r largest S are the instruction-previewed mode ("ipm", covariance of the data to be trained on),
the r smallest the knowledge-preserved mode ("kpm", covariance of the data not to be forgotten).

Deviations: ``S Vh inv(C) = U^T W``, so no inverse is taken and the damping never has to grow; the
covariance is normalised to trace = in, without which its unit decides how the product is shared
between the factors (`normalised=False` for the authors' share); directions that W does not write
along get a live right factor and a zero left one. Everything is in float64: the least S of an
ill-conditioned covariance are below float32's rounding.

`weighting="root"` is not CorDA: U of ``W C^(1/2)`` (that of ``W cholesky(C)`` is the same) gives
the projection of W with the least error on the outputs, ``E |W x - W_r x|^2``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.linalg import LowRank, full_svd, truncated_svd
from pissa.registry import method
from pissa.splits import Split

DAMPING = 0.01
"""Of the mean of the covariance's diagonal, added to it."""


@method(
    "corda",
    title="CorDA",
    paper="2406.05223",
    trains="the part of the weight that matters most, or least, for given data",
    verdict="kpm trains what the given data hardly use, ipm what they use most, which wants small learning rates",
    needs="covariance",
)
def corda(
    weight: Tensor,
    rank: int,
    *,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
    covariance: Tensor,
    mode: Literal["ipm", "kpm"] = "ipm",
    weighting: Literal["covariance", "root"] = "covariance",
    normalised: bool = True,
) -> Split:
    """The singular directions of W seen through its inputs, leading ("ipm") or last ("kpm").

    Raises:
        InputError: the covariance is not [in, in], or zero.
    """
    W = weight.double()
    C = _damped(covariance, W, normalised, name)
    weighted = W @ (torch.linalg.cholesky(C) if weighting == "root" else C)
    if mode == "ipm":
        part = truncated_svd(weighted, rank, svd, seed=seed, name=name)
    else:
        full = full_svd(weighted)
        part = LowRank(full.U[:, -rank:], full.S[-rank:], full.Vh[-rank:])
    compute = torch.promote_types(weight.dtype, torch.float32)
    left, right = (
        factor.to(compute) for factor in _factors(part, W, scale, torch.finfo(compute).eps)
    )
    return Split(weight, left, right, scale=scale)


def _damped(covariance: Tensor, W: Tensor, normalised: bool, name: str) -> Tensor:
    """The covariance as all else uses it, [in, in] float64, positive definite."""
    width = W.shape[1]
    if covariance.shape != (width, width):
        raise InputError(
            f"the covariance of `{name}` is {list(covariance.shape)}, expected [{width}, {width}]"
        )
    C = covariance.to(W)
    mean = C.diagonal().mean()
    if not mean > 0:
        raise InputError(
            f"the covariance of `{name}` is zero: no calibration row reaches this layer; "
            "give more rows or leave it out of --targets"
        )
    if normalised:
        C, mean = C / mean, torch.ones_like(mean)
    return C + DAMPING * mean * torch.eye(width).to(C)


def _factors(part: LowRank, W: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """left and right with ``scale * left @ right = U U^T W``; where that is rounding, zero and a unit vector."""
    read = part.U.T @ W
    dead = read.norm(dim=1) <= eps * max(W.shape) * W.norm()
    left = torch.where(dead, 0.0, part.U * (part.S / scale).sqrt())
    return left, torch.where(dead[:, None], part.Vh, read / (part.S * scale).sqrt()[:, None])
