"""OLoRA: Orthonormal Low-Rank Adaptation (arXiv 2406.01775, algorithm 1).

    W = Q R,  left = Q[:, :r],  right = R[:r],  frozen = W - s left right

As in the author's code the factors are not divided by s: with alpha = rank the first r columns of W
move to the adapter, with another alpha the frozen part makes up the difference. Deviation: the sign
of each pair is fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.registry import method
from pissa.splits import Split


@method(
    "olora",
    title="OLoRA",
    paper="2406.01775",
    trains="what the first r input features write (QR of the weight)",
    verdict="cheap orthonormal start; its directions depend on the order of the features, not on their importance",
)
def olora(
    weight: Tensor, rank: int, *, scale: float, svd: str | float, seed: int, name: str
) -> Split:
    """The leading columns of Q and rows of R, diagonal of R positive."""
    # A power of two keeps huge and tiny values away from overflow in the norms and rounds nothing.
    exponent = 2.0 ** float(torch.frexp(weight.abs().max().double()).exponent)
    Q, R = torch.linalg.qr(weight.to(torch.promote_types(weight.dtype, torch.float32)) / exponent)
    signs = torch.where(R.diagonal()[:rank] < 0, -1.0, 1.0).to(R)
    left, right = Q[:, :rank] * signs, exponent * signs[:, None] * R[:rank]
    return Split(weight, left, right, scale=scale)
