"""LoftQ: LoRA-fine-tuning-aware quantisation (arXiv 2310.08659, algorithm 1).

    Q = quantised(W - s left right),  U S Vh = W - Q,  left = U_r sqrt(S_r / s),  right = sqrt(S_r / s) Vh_r,  T times

from left right = 0. Deviations: the factors carry 1/s, which the authors' code and peft leave out,
so that any alpha starts at the least error; stops when the error no longer falls and keeps the best
round.
"""

from __future__ import annotations

from torch import Tensor

from pissa.linalg import alternate
from pissa.method import Quantisation
from pissa.registry import method
from pissa.splits import Split


@method(
    "loftq",
    title="LoftQ",
    paper="2310.08659",
    trains="what quantisation lost of the weight",
    verdict="only for a quantised base; starts closer to it than QLoRA, further than QPiSSA at equal rounds",
    needs="quantiser",
)
def loftq(
    weight: Tensor,
    rank: int,
    *,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
    quantisation: Quantisation,
) -> Split:
    """The best low-rank part of the quantisation error, in turn with the quantised rest."""
    return alternate(
        weight, rank, quantisation, principal=False, scale=scale, svd=svd, seed=seed, name=name
    )
