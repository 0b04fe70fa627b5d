"""MiLoRA: Minor singular component adaptation (arXiv 2406.09044, equations 3 to 5).

    W = U S Vh,  left = U_minor sqrt(S_minor / s),  right = sqrt(S_minor / s) Vh_minor,  frozen = W - s left right

Deviations: always a full SVD (a sketch of the leading part says nothing of the minor one). The zero
singular values of a rank-deficient weight get a live right factor, see `LowRank.balanced`.
"""

from __future__ import annotations

from torch import Tensor

from pissa.linalg import LowRank, full_svd
from pissa.registry import method
from pissa.splits import Split


@method(
    "milora",
    title="MiLoRA",
    paper="2406.09044",
    trains="the minor singular part of the weight",
    verdict="keeps what the model knows; behaves much like LoRA with alpha = rank",
)
def milora(
    weight: Tensor, rank: int, *, scale: float, svd: str | float, seed: int, name: str
) -> Split:
    """The last singular triplets, balanced between the factors."""
    full = full_svd(weight)
    minor = LowRank(full.U[:, -rank:], full.S[-rank:], full.Vh[-rank:])
    left, right = minor.balanced(scale, largest=full.S[0])
    return Split(weight, left, right, scale=scale)
