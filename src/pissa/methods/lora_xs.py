"""LoRA-XS: an r x r core between frozen singular factors (arXiv 2405.17604, equation 2).

    W ~ U S Vh,  left = U_r,  right = S_r Vh_r,  core = 0,  frozen = W;     only the core trains

As in the authors' code all of S lies on the input side. Deviations: the core starts at zero rather
than at noise of 1e-5, so that the first step is the base exactly; the factors are certified or
seeded, see `pissa.linalg.truncated_svd`; a singular value that is zero counts as the smallest that
is not, since with it a column of the core would never learn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.linalg import truncated_svd
from pissa.registry import method
from pissa.splits import Split


@method(
    "lora_xs",
    title="LoRA-XS",
    paper="2405.17604",
    trains="an r x r core between the frozen principal factors",
    verdict="for adapters of kilobytes: r^2 parameters a layer; wants a learning rate 10 to 100 times LoRA's",
    parts=("core",),
    zero_start=True,
)
def lora_xs(
    weight: Tensor, rank: int, *, scale: float, svd: str | float, seed: int, name: str
) -> Split:
    """The top singular triplets, frozen, around a core of zeros."""
    top = truncated_svd(weight, rank, svd, seed=seed, name=name)
    alive = top.S[top.S > top.S[0] * torch.finfo(top.S.dtype).eps * max(weight.shape)]
    S = top.S.clamp(min=float(alive[-1]) if len(alive) else 1.0)
    return Split(weight, top.U, S[:, None] * top.Vh, S.new_zeros(rank, rank), scale)
