"""PiSSA: Principal Singular values and Singular vectors Adaptation (arXiv 2404.02948, equations 2
to 4).

    W = U S Vh,  left = U_r sqrt(S_r / s),  right = sqrt(S_r / s) Vh_r,  frozen = W - s left right

With a quantised rest it is QPiSSA (section 4): `pissa.linalg.alternate` from the principal part.

Deviations: the factors carry 1/s, so that any alpha starts at W; the residual is taken by
difference, so that it is right whatever the accuracy of the SVD; the random SVD is a seeded Krylov
space. QPiSSA ends with one more SVD than the authors' code, which lowers the error.
"""

from __future__ import annotations

from torch import Tensor

from pissa.linalg import alternate, truncated_svd
from pissa.method import Quantisation
from pissa.registry import method
from pissa.splits import Split


@method(
    "pissa",
    title="PiSSA",
    paper="2404.02948",
    trains="the principal singular part of the weight",
    verdict="falls faster than LoRA at small learning rates; wants a smaller one than LoRA's best",
)
def pissa(
    weight: Tensor,
    rank: int,
    *,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
    quantisation: Quantisation | None,
) -> Split:
    """The top singular triplets, balanced between the factors."""
    if quantisation:
        return alternate(
            weight, rank, quantisation, principal=True, scale=scale, svd=svd, seed=seed, name=name
        )
    left, right = truncated_svd(weight, rank, svd, seed=seed, name=name).balanced(scale)
    return Split(weight, left, right, scale=scale)
