"""LoRA-XS: an r x r core between frozen singular factors (arXiv 2405.17604, equation 2).

    W ~ U S Vh,  left = U_r,  right = S_r Vh_r,  core = 0,  frozen = W;     only the core trains

As in the authors' code all of S lies on the input side. Deviations: the core starts at zero rather than at noise of
1e-5, so that the first step is the base exactly; the factors are certified or seeded, see `pissa.linalg.truncated_svd`.
"""

from __future__ import annotations

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
def lora_xs(weight: Tensor, rank: int, *, scale: float, svd: str | float, seed: int, name: str) -> Split:
    """The top singular triplets, frozen, around a core of zeros."""
    top = truncated_svd(weight, rank, svd, seed=seed, name=name)
    return Split(weight, top.U, top.S[:, None] * top.Vh, top.S.new_zeros(rank, rank), scale)
