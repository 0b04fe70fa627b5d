"""EVA: Explained Variance Adaptation (arXiv 2410.07170).

    left = 0,  right = V[:r],  frozen = W

with V the principal components of the layer's inputs, rows centred. Over the whole model rank x
layers components are taken in the order of the share of their layer's variance that they explain,
at most round(rho rank) in a layer.

No deviations in the start. Layers keep one scale whatever their rank, as in peft (the authors' own
code divides alpha = 1 by each layer's rank).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.linalg import Components
from pissa.method import Allotment
from pissa.registry import method
from pissa.splits import Split


def _shares(weight: Tensor, components: Components, rank: int, *, rho: float) -> Tensor:
    """What each component explains of its layer's variance, as many as the layer may get."""
    if not rho >= 1:
        raise InputError(
            f"eva: rho is {rho}, expected at least 1, which gives every layer the same rank"
        )
    return components.shares[: min(round(rho * rank), *weight.shape)]


def _most_explained(shares: dict[str, Tensor], rank: int, *, rho: float) -> dict[str, int]:
    """Ranks with which the explained shares add up to the most, rank x layers in all or what there is."""
    found = [(float(share), name) for name, layer in shares.items() for share in layer]
    chosen = sorted(found, key=lambda pair: -pair[0])[: rank * len(shares)]
    ranks = Counter(name for _, name in chosen)
    return {name: ranks[name] for name in shares}


@method(
    "eva",
    title="EVA",
    paper="2410.07170",
    trains="a new low-rank part that reads where the inputs vary most",
    verdict="starts at the base itself; spends ranks where few directions of the inputs explain most of them",
    zero_start=True,
    needs="components",
    allotment=Allotment(_shares, _most_explained),
)
def eva(
    weight: Tensor,
    rank: int,
    *,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
    components: Components,
    rho: float = 2.0,
) -> Split:
    """The leading components on the right, zero on the left.

    Raises:
        InputError: fewer components than the rank, or of another width.
    """
    vectors = components.vectors
    if vectors.shape[1] != weight.shape[1]:
        raise InputError(
            f"the inputs of `{name}` are {vectors.shape[1]} wide, expected {weight.shape[1]}"
        )
    if len(vectors) < rank:
        raise InputError(
            f"{components.rows} rows of inputs of `{name}` gave {len(vectors)} components, rank {rank} needs as many: "
            "give more calibration rows or a smaller --rank"
        )
    right = vectors[:rank].to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return Split(weight, right.new_zeros(weight.shape[0], rank), right.clone(), scale=scale)
