"""Alternation between the best low-rank part and the quantised rest, W ~ Q + s left right.

    Q  <-  quantised(W - s left right)              left, right  <-  best rank r of (W - Q)

QPiSSA (arXiv 2404.02948, section 4 and the authors' code) starts from the principal part of W and
stops after quantizing; LoftQ (arXiv 2310.08659, algorithm 1) starts from nothing and stops after
the low-rank part. Both end with the low-rank part here: it costs QPiSSA one more SVD, and the error
can only fall (Eckart-Young).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.linalg.measures import frobenius
from pissa.linalg.svd import LowRank, truncated_svd
from pissa.method import Quantisation
from pissa.splits import Quantised, Split

LEAST_GAIN = 1e-4
"""A round that lowers the error by less, relative to it, is the last."""


def alternate(
    weight: Tensor,
    rank: int,
    quantisation: Quantisation,
    *,
    principal: bool,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
) -> Split:
    """Split a weight around a quantised rest; of all rounds the one with the least error.

    Args:
        weight: [out, in], any float dtype; computed in at least float32.
        rank: r.
        quantisation: how to quantize, and how many rounds, 1 or more.
        principal: start from the best rank-r part of W (QPiSSA), else from nothing (LoftQ).
        scale: s = alpha / rank.
        svd: see `truncated_svd`; later rounds of "fast" begin where the last one ended.
        seed: with `name` it fixes every random number.
        name: the tensor's name.

    Returns:
        The split, its factors balanced.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))

    def best_part(matrix: Tensor, near: LowRank | None) -> LowRank:
        return truncated_svd(matrix, rank, svd, seed=seed, name=name, near=near)

    def attempt(near: LowRank | None) -> tuple[float, Quantised, LowRank]:
        quantised = quantisation.quantise(wide if near is None else _less(wide, near))
        rest = wide - quantised.dense
        part = best_part(rest, near)
        return frobenius(_less(rest, part)), quantised, part

    best = attempt(best_part(weight, None) if principal else None)
    last = best
    for _ in range(quantisation.rounds - 1):
        last = attempt(last[2])
        if last[0] >= best[0] * (1 - LEAST_GAIN):
            break
        best = last
    left, right = best[2].balanced(scale)
    return Split(weight, left, right, scale=scale, quantised=best[1])


def _less(matrix: Tensor, part: LowRank) -> Tensor:
    """``matrix - U S Vh``."""
    return torch.addmm(matrix, part.U * part.S, part.Vh, alpha=-1)
