"""SVDQuant: 4-bit weights and activations beside a low-rank branch in 16 bits (arXiv 2411.05007,
equations 3 to 6).

    W' = W diag(smooth),   L = best rank r of W',   R = W' - L,   y = Q(R) Q(x / smooth) + L (x / smooth)

`smooth` is the candidate (`pissa.linalg.smoothings`) whose output on calibration rows is nearest to
W x, branch included. Then L = best rank r of W' - Q(R) and R = W' - L in turn (deepcompressor)
until the output is no nearer.

As a split: ``left right = L diag(1 / smooth)`` and ``quantised = Q(R) diag(1 / smooth)``, both of x
itself. Deviations: factors are rounded to float16 before R is taken, so that R makes up for it;
`smooth` is a layer's own and stays in the layer (deepcompressor shares it among layers of one input
and folds it into the one before); no unsigned codes after GELU, no GPTQ. "exact" and "fast" are the
SVDs of this package, in place of float64 LAPACK.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.linalg import frobenius, truncated_svd
from pissa.linalg.int4 import Int4, pack, quantise
from pissa.linalg.smoothing import smoothings
from pissa.registry import method
from pissa.splits import Quantised, Split


@dataclass(frozen=True, eq=False)
class _Try:
    """One way to store the layer, and the norm of what its output on the calibration rows misses."""

    smooth: Tensor
    left: Tensor
    right: Tensor
    rest: Int4
    missed: float


@method(
    "svdquant",
    title="SVDQuant",
    paper="2411.05007",
    trains="nothing: a model for inference in 4 bits, activations too",
    verdict="to serve, not to fine-tune; needs calibration rows, and pays where a few input channels stand out",
    parts=(),
    needs="inputs",
)
def svdquant(
    weight: Tensor,
    rank: int,
    *,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
    inputs: Tensor,
    smoothing: bool = True,
    rounds: int = 10,
) -> Split:
    """The nearest output over the grid of smoothings, then over `rounds` of alternation; rank 0 is no branch."""
    _check(weight, inputs, rounds, name)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rows = inputs.to(wide)
    outputs = rows @ wide.T

    def attempt(smooth: Tensor, rest: Int4 | None = None) -> _Try:
        factors = smooth.to(wide.dtype)
        smoothed = wide * factors
        aim = smoothed if rest is None else smoothed - rest.dense()
        left, right = _low_rank(aim, rank, scale, svd, seed, name)
        left, right = _half(left), _half(right / factors)
        rest = quantise((wide - scale * left @ right) * factors)
        branch = scale * (rows @ right.T) @ left.T
        missed = frobenius(outputs - branch - quantise(rows / factors).dense() @ rest.dense().T)
        return _Try(smooth, left, right, rest, missed if math.isfinite(missed) else math.inf)

    candidates = (
        smoothings(rows, wide) if smoothing else [torch.ones_like(rows[0], dtype=torch.float16)]
    )
    best = min(map(attempt, candidates), key=lambda found: found.missed)
    if best.missed == math.inf:
        raise InputError(
            f"`{name}` leaves float16, in which scales are stored: its largest is {weight.abs().max():.3g}"
        )
    for _ in range(rounds - 1):
        further = attempt(best.smooth, best.rest)
        if not further.missed < best.missed:
            break
        best = further
    dense = best.rest.dense() / best.smooth.float()
    parts = {"codes": pack(best.rest.codes), "scales": best.rest.scales, "smooth": best.smooth}
    return Split(weight, best.left, best.right, scale=scale, quantised=Quantised(parts, dense))


def _low_rank(
    matrix: Tensor, rank: int, scale: float, svd: str | float, seed: int, name: str
) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` part, balanced; nothing for rank 0."""
    if rank == 0:
        return matrix[:, :0], matrix[:0]
    return truncated_svd(matrix, rank, svd, seed=seed, name=name).balanced(scale)


def _half(factor: Tensor) -> Tensor:
    """As float16 stores it, in its own dtype."""
    return factor.to(torch.float16).to(factor.dtype)


def _check(weight: Tensor, inputs: Tensor, rounds: int, name: str) -> None:
    if inputs.ndim != 2 or inputs.shape[1] != weight.shape[1] or not len(inputs):
        raise InputError(
            f"the inputs seen of `{name}` are {list(inputs.shape)}, expected [rows, {weight.shape[1]}] with a row or "
            "more: observe the model that is split"
        )
    if rounds < 1:
        raise InputError(f"svdquant: rounds is {rounds}, expected 1 or more")
