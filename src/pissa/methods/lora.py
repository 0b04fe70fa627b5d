"""LoRA: Low-Rank Adaptation (arXiv 2106.09685).

    left = 0,  right ~ U(-1/sqrt(in), 1/sqrt(in)),  frozen = W

No deviations from the reference start (Kaiming uniform with a = sqrt 5, which evaluates to these bounds).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.randomness import tensor_seed
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
def lora(weight: Tensor, rank: int, *, scale: float, svd: str | float, seed: int, name: str) -> Split:
    """Noise on the right, zero on the left."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(tensor_seed(seed, name))
    uniform = torch.rand(rank, columns, generator=generator, dtype=torch.float64)
    right = ((2 * uniform - 1) / columns**0.5).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return Split(weight, right.new_zeros(rows, rank), right, scale=scale)
