"""LoRA: Low-Rank Adaptation (arXiv 2106.09685).

    left = 0,  right ~ U(-1/sqrt(in), 1/sqrt(in)),  frozen = W

No deviations from the reference start (Kaiming uniform with a = sqrt 5, which evaluates to these
bounds).
"""

from __future__ import annotations

from torch import Tensor

from pissa.randomness import noise_beside_zero, tensor_seed
from pissa.registry import method
from pissa.splits import Split


@method(
    "lora",
    title="LoRA",
    paper="2106.09685",
    trains="a new low-rank part that starts at zero",
    verdict="the reference; tune its learning rate before believing that another method is better",
    zero_start=True,
)
def lora(
    weight: Tensor, rank: int, *, scale: float, svd: str | float, seed: int, name: str
) -> Split:
    """Noise on the right, zero on the left."""
    return noise_beside_zero(weight, rank, scale, tensor_seed(seed, name))
