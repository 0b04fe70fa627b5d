"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (arXiv 2407.05000 and the authors'
code).

    G = mean gradient of the loss = U g Vh,  kappa = out^(1/4) / sqrt(gamma),
    left = kappa U[:, r:2r],  right = kappa Vh[:r],  frozen = W - s left right

The first step of SGD moves the weight by ``-lr s^2 (left left^T G + G right^T right)``, which is
then ``-lr s^2 kappa^2`` times the best rank-2r part of G, the most that rank r can do.

As in the authors' code neither factor is divided by s. Deviation: an exact SVD by default, where
theirs is a sketch of 4r columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.linalg import truncated_svd
from pissa.registry import method
from pissa.splits import Split


@method(
    "lora_ga",
    title="LoRA-GA",
    paper="2407.05000",
    trains="along the leading singular directions of the first gradient",
    verdict="the first step is the closest to full fine-tuning's; says nothing about the later ones",
    needs="gradient",
)
def lora_ga(
    weight: Tensor,
    rank: int,
    *,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
    gradient: Tensor,
    gamma: float = 16.0,
) -> Split:
    """Singular vectors r + 1 to 2r of the gradient on the left, 1 to r on the right.

    Raises:
        InputError: 2r is above min(out, in), the gradient is zero or of another shape, or gamma is
            not above 0.
    """
    _check(weight, rank, name, gradient, gamma)
    compute = torch.promote_types(weight.dtype, torch.float32)
    leading = truncated_svd(
        gradient.to(weight.device, compute), 2 * rank, svd, seed=seed, name=name
    )
    kappa = weight.shape[0] ** 0.25 / gamma**0.5
    return Split(weight, kappa * leading.U[:, rank:], kappa * leading.Vh[:rank], scale=scale)


def _check(weight: Tensor, rank: int, name: str, gradient: Tensor, gamma: float) -> None:
    most = min(weight.shape) // 2
    if rank > most:
        raise InputError(
            f"LoRA-GA takes 2 x {rank} directions of the gradient of `{name}` {list(weight.shape)}, which has "
            f"{min(weight.shape)}: ranks up to {most} fit; take one with --rank or leave it out of --targets"
        )
    if gradient.shape != weight.shape:
        raise InputError(
            f"the gradient of `{name}` is {list(gradient.shape)}, expected {list(weight.shape)}"
        )
    if not gradient.any():
        raise InputError(
            f"the gradient of `{name}` is zero: no calibration row reaches this layer; "
            "give more rows or leave it out of --targets"
        )
    if not gamma > 0:
        raise InputError(
            f"lora_ga: gamma is {gamma}, expected a number above 0; the authors take 16"
        )
